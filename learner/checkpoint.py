"""Checkpoints: written completely or not at all, and verified when read.

A checkpoint is a folder: the adapter in PEFT's layout, optimizer.safetensors (the learner's other tensors: moments,
step count, critic and random state), and state.json with the caller's state, the adapter's version and the checksum
of every other file. Knows files and tensors; knows neither the learner nor the settings.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from actors.models.adapter import WEIGHTS
from actors.models.lora import flat_from_peft
from actors.models.peft_folder import write_peft_folder
from actors.replay.journal import sync
from actors.types import Adapter, AdapterLayout
from conf.errors import UsageError, disk_errors

STATE = "state.json"
TENSORS = "optimizer.safetensors"


class CheckpointError(UsageError):
    """A checkpoint that is asked for and cannot be used."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint on disk, and the content of its state.json."""

    folder: Path
    state: dict[str, Any]


def save(
    root: Path,
    *,
    adapter: Adapter,
    tensors: dict[str, torch.Tensor],
    state: Mapping[str, object],
    base_model: str,
    keep: int,
) -> Path:
    """Write step-<version> under `root`, point `latest` at it, and delete all but the newest `keep` checkpoints.

    `state` must be JSON; state.json adds "version", "files" and "checksum" to it. Returns the checkpoint's folder.
    Raises DiskError if the disk does not take it; the checkpoints before it stay.
    """
    with disk_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        final, scratch = root / _name(adapter.version), root / f".writing-{os.getpid()}"
        _remove_unfinished(root)
        try:
            write_peft_folder(scratch, adapter, base_model=base_model)
            (scratch / TENSORS).write_bytes(to_bytes(tensors))
            checksums = {file.name: _checksum(file) for file in scratch.iterdir()}
            content = {**state, "version": adapter.version, "files": checksums}
            (scratch / STATE).write_text(json.dumps({**content, "checksum": _digest(content)}, indent=1))
        except OSError:
            _remove_unfinished(root)
            raise
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


def _remove_unfinished(root: Path) -> None:
    """Give back the space of a checkpoint that could not be finished, here or in a process that died."""
    for folder in root.glob(".writing-*"):
        shutil.rmtree(folder, ignore_errors=True)


def find(root: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to resume from, as run.resume says.

    "auto": the newest valid one, or None; damaged ones are skipped with a warning. "never": None. A number: the
    checkpoint of that step; raises CheckpointError if it is missing or damaged.
    """
    if resume == "never":
        return None
    candidates = _folders(root) if resume == "auto" else [root / _name(int(resume))]
    for folder in candidates:
        try:
            return Checkpoint(folder, _verified(folder))
        except (OSError, ValueError) as error:
            if resume != "auto":
                raise CheckpointError(f"run.resume={resume}: {folder} cannot be used: {error}") from error
            warnings.warn(f"skipping the damaged checkpoint {folder}: {error}", stacklevel=2)
    return None


def load(checkpoint: Checkpoint, layout: AdapterLayout) -> tuple[Adapter, dict[str, torch.Tensor]]:
    """The adapter and the tensors that `save` got, on the CPU. Raises AdapterError if `layout` does not match."""
    flat = flat_from_peft(load_file(checkpoint.folder / WEIGHTS), layout)
    return Adapter(checkpoint.state["version"], layout, flat), load_file(checkpoint.folder / TENSORS)


def _verified(folder: Path) -> dict[str, Any]:
    """The content of state.json. Raises OSError or ValueError if a file is missing or damaged."""
    content = json.loads((folder / STATE).read_text())
    if content.pop("checksum") != _digest(content):
        raise ValueError(f"{STATE} does not match its checksum")
    for name, checksum in content["files"].items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} does not match its checksum")
    return content


def _folders(root: Path) -> list[Path]:
    """The checkpoints under `root`, newest first. The file `latest` is for people and is not read."""
    return sorted(root.glob("step-*"), reverse=True)


def _name(version: int) -> str:
    return f"step-{version:08d}"


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _checksum(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
