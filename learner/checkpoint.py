"""Checkpoints: written whole or not at all, checked when read.

A checkpoint is a folder: the adapter in PEFT layout, optimizer.safetensors (moments, step, critic and random state), and
state.json with the ledger, the resolved settings and the checksum of every other file. Knows files and tensors.
"""

import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from actors.disk import sync
from actors.lora import flat_from_peft, peft_tensors
from actors.types import Adapter
from conf.errors import UsageError
from learner.learner import Learner

STATE = "state.json"


class CheckpointError(UsageError):
    """A checkpoint that is asked for and cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A sound checkpoint on disk and what its state.json holds."""

    folder: Path
    state: dict[str, Any]


def save_adapter(folder: Path, adapter: Adapter, *, base_model: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT and vLLM read them."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(peft_tensors(adapter), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({entry.module.rsplit(".", 1)[-1] for entry in adapter.layout.entries})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base_model, "bias": "none",
        "r": adapter.layout.rank, "lora_alpha": adapter.layout.alpha, "lora_dropout": 0.0, "target_modules": targets,
        "inference_mode": True, "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "modules_to_save": None,
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def save(root: Path, learner: Learner, state: dict[str, Any], *, base_model: str, keep: int) -> Path:
    """Write step-<version> under `root`, point `latest` at it and delete all but the newest `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    final, scratch = root / _name(learner.version), root / f".writing-{os.getpid()}"
    shutil.rmtree(scratch, ignore_errors=True)
    save_adapter(scratch, learner.adapter(), base_model=base_model)
    save_file(_optimizer_tensors(learner), scratch / "optimizer.safetensors")
    sums = {file.name: _checksum(file) for file in scratch.iterdir()}
    content = {**state, "version": learner.version, "kl_coefficient": learner.objective.kl_coefficient, "files": sums}
    (scratch / STATE).write_text(json.dumps({**content, "checksum": _digest(content)}, indent=1))
    for file in scratch.iterdir():
        sync(file)
    sync(scratch)
    shutil.rmtree(final, ignore_errors=True)
    scratch.rename(final)
    sync(root)
    pointer = root / ".latest"
    pointer.write_text(final.name)
    sync(pointer)
    pointer.rename(root / "latest")
    sync(root)
    for old in _folders(root)[keep:]:
        shutil.rmtree(old)
    return final


def find(root: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from: for "auto" the newest sound one or None, for a number that step's.

    Damaged ones are skipped with a warning. Raises CheckpointError if the step asked for is missing or damaged.
    """
    if resume == "never":
        return None
    wanted = _folders(root) if resume == "auto" else [root / _name(int(resume))]
    for folder in wanted:
        try:
            return Checkpoint(folder, _verified(folder))
        except (OSError, ValueError) as error:
            if resume != "auto":
                raise CheckpointError(f"run.resume={resume}: {folder} cannot be used: {error}") from error
            warnings.warn(f"skipping the damaged checkpoint {folder}: {error}", stacklevel=2)
    return None


def load(checkpoint: Checkpoint, learner: Learner) -> None:
    """Put adapter, optimizer and random state back as they were."""
    layout = learner.policy.lora.layout
    flat = flat_from_peft(load_file(checkpoint.folder / "adapter_model.safetensors"), layout)
    learner.load(Adapter(checkpoint.state["version"], layout, flat.to(learner.policy.device)))
    tensors = load_file(checkpoint.folder / "optimizer.safetensors", device=str(learner.policy.device))
    learner.objective.kl_coefficient = checkpoint.state.get("kl_coefficient", learner.objective.kl_coefficient)
    random_state = {name: tensors.pop(name).cpu() for name in ("random_cpu", "random_cuda") if name in tensors}
    if learner.critic is not None:
        learner.critic.load({name: tensors.pop(name) for name in list(tensors) if name.startswith("critic")})
    if tensors:
        learner.optimizer.state[learner.policy.lora.flat] = {
            name: int(x) if x.dtype == torch.int64 else x for name, x in tensors.items()
        }
    torch.set_rng_state(random_state["random_cpu"])
    if "random_cuda" in random_state:
        torch.cuda.set_rng_state(random_state["random_cuda"])


def _optimizer_tensors(learner: Learner) -> dict[str, torch.Tensor]:
    state = learner.optimizer.state[learner.policy.lora.flat]
    # bitsandbytes counts its steps in a plain number.
    tensors = {name: x if isinstance(x, torch.Tensor) else torch.tensor(x) for name, x in state.items()}
    if learner.critic is not None:
        tensors |= learner.critic.state()
    tensors["random_cpu"] = torch.get_rng_state()
    if learner.policy.device.type == "cuda":
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    return tensors


def _verified(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / STATE).read_text())
    if content.pop("checksum") != _digest(content):
        raise ValueError(f"{STATE} does not match its checksum")
    for name, checksum in content["files"].items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    return content


def _folders(root: Path) -> list[Path]:
    """Newest first; `latest` only tells people, and is not trusted."""
    return sorted(root.glob("step-*"), reverse=True)


def _name(version: int) -> str:
    return f"step-{version:08d}"


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
