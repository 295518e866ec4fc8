"""A LoRA adapter in a folder in PEFT's layout: written, and read if it computes what is computed here, whoever wrote
it. Knows files; knows no model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from actors.models.adapter import WEIGHTS, AdapterError
from actors.models.lora import PREFIX, LoraArguments, flat_from_peft, peft_tensors
from actors.types import Adapter, AdapterLayout

CONFIG = "adapter_config.json"
# Settings of PEFT that change what an adapter computes, unless they are None, False, empty, or as here.
CHANGING: dict[str, object] = {
    "bias": "none",
    **dict.fromkeys(
        (
            *("use_dora", "fan_in_fan_out", "use_qalora", "lora_bias"),
            *("modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication"),
            *("trainable_token_indices", "target_parameters", "alora_invocation_tokens"),
        )
    ),
}


@dataclass(frozen=True)
class PeftFolder:
    """An adapter as it is stored in `folder`. `alpha` is that of a scale alpha / rank, also for rsLoRA, and
    `base_model` what its config calls the base model."""

    folder: Path
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    base_model: str | None

    @property
    def lora(self) -> LoraArguments:
        """What describes the adapter."""
        return {"rank": self.rank, "alpha": self.alpha, "target_modules": list(self.target_modules)}

    def load(self, layout: AdapterLayout, *, version: int = 0) -> Adapter:
        """The adapter in the flat buffer that `layout` describes. Raises AdapterError if it does not fit."""
        try:
            return Adapter(version, layout, flat_from_peft(load_file(self.folder / WEIGHTS), layout))
        except AdapterError as error:
            raise AdapterError(f"model.adapter={self.folder}: made for another model than this one: {error}") from error


def write_peft_folder(folder: Path, adapter: Adapter, *, base_model: str) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT and vLLM read them. Raises OSError."""
    modules = sorted({entry.module for entry in adapter.layout.entries})
    # Beside an image encoder, whose layers have the same names, PEFT needs the whole names.
    is_part = any(".language_model." in module for module in modules)
    target_modules = modules if is_part else sorted({module.rsplit(".", 1)[-1] for module in modules})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "bias": "none",
        "r": adapter.layout.rank,
        "lora_alpha": adapter.layout.alpha,
        "lora_dropout": 0.0,
        "target_modules": target_modules,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # save_file would raise an error of its own where the disk does not take the file.
    (folder / WEIGHTS).write_bytes(to_bytes(peft_tensors(adapter), metadata={"format": "pt"}))
    (folder / CONFIG).write_text(json.dumps(config, indent=2))


def read_peft_folder(folder: Path) -> PeftFolder:
    """What the adapter in `folder` is. Raises AdapterError if there is none, or if no engine here computes it."""
    config, names = _read(folder)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"model.adapter={folder}: peft_type is {config.get('peft_type')}; only LORA is known here")
    for name, neutral in CHANGING.items():
        value = config.get(name)
        if value and value != neutral:
            raise AdapterError(f"model.adapter={folder}: no engine here computes an adapter with {name}={value}")
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    modules = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in names}
    return PeftFolder(
        folder,
        rank,
        alpha * rank**0.5 if config.get("use_rslora") else alpha,
        tuple(sorted({module.rpartition(".")[2] for module in modules})),
        config.get("base_model_name_or_path"),
    )


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The config, and the names of the tensors."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return config, list(file.keys())
    except FileNotFoundError as error:
        raise AdapterError(f"model.adapter={folder}: there is no {CONFIG} with {WEIGHTS} beside it") from error
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise AdapterError(f"model.adapter={folder}: a file of the adapter is damaged: {error}") from error
