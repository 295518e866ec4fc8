"""LoRA on a transformers model, all of it in one flat float32 buffer.

PEFT puts the adapter in; here its parameters become views of one buffer, so that clipping, the optimizer,
all-reduce and export are one kernel each. Knows torch and PEFT; knows neither engines nor objectives.
"""

from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from actors.engine import AdapterError, check_adapter
from actors.types import Adapter, AdapterEntry, AdapterLayout

PREFIX = "base_model.model."


class FlatLora:
    """A PEFT model whose LoRA weights and gradients are views of `flat` and `flat.grad` (both [layout.size]).

    A is initialised from `seed` as PEFT does (Kaiming uniform), B with zeros, so the adapter starts as the identity.
    Raises AdapterError if a target names no module.
    """

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int
    ) -> None:
        names = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
        missing = sorted(set(target_modules) - names)
        if missing:
            raise AdapterError(f"model.lora.target_modules {missing} match no module of {type(model).__name__}")
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type] - a float is as good
            target_modules=list(target_modules),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self.model: PeftModel = get_peft_model(model, config, autocast_adapter_dtype=True)  # type: ignore[assignment]
        self.layout, parameters = _layout(self.model, rank, alpha)
        self.flat = torch.nn.Parameter(torch.empty(self.layout.size, dtype=torch.float32, device=model.device))
        self.flat.grad = torch.zeros_like(self.flat)
        with torch.no_grad():
            for entry, parameter in zip(self.layout.entries, parameters, strict=True):
                view = entry.view(self.flat.detach())
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = entry.view(self.flat.grad)

    def export(self, version: int, *, device: str | None = None) -> Adapter:
        """A copy of the weights, on `device` or where they are."""
        return Adapter(version, self.layout, self.flat.detach().to(device or self.flat.device, copy=True))

    def load(self, adapter: Adapter) -> None:
        """Copy `adapter` in. Raises AdapterError if its layout is another one or it is not finite."""
        check_adapter(adapter)
        if adapter.layout != self.layout:
            raise AdapterError("the adapter was made for other modules, another rank or another alpha")
        with torch.no_grad():
            self.flat.copy_(adapter.flat)


def _layout(model: PeftModel, rank: int, alpha: float) -> tuple[AdapterLayout, list[torch.nn.Parameter]]:
    sides: dict[str, list[tuple[str, torch.nn.Parameter]]] = {"A": [], "B": []}
    for name, parameter in model.named_parameters():
        for side in sides:
            marker = f".lora_{side}.default.weight"
            if name.endswith(marker):
                sides[side].append((name.removeprefix(PREFIX).removesuffix(marker), parameter))
    entries, parameters, offset = [], [], 0
    for side, found in sides.items():
        for module, parameter in found:
            entry = AdapterEntry(module, side, (parameter.shape[0], parameter.shape[1]), offset)
            entries.append(entry)
            parameters.append(parameter)
            offset += entry.size
    return AdapterLayout(rank, alpha, tuple(entries)), parameters


def peft_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """The adapter under the names of PEFT's adapter_model.safetensors (float32, on the CPU)."""
    flat = adapter.flat.detach().to("cpu")
    return {f"{PREFIX}{e.module}.lora_{e.side}.weight": e.view(flat).clone() for e in adapter.layout.entries}


def flat_from_peft(tensors: dict[str, torch.Tensor], layout: AdapterLayout) -> torch.Tensor:
    """The inverse of `peft_tensors`. Raises AdapterError on missing, surplus or misshapen tensors."""
    flat = torch.empty(layout.size, dtype=torch.float32)
    names = {f"{PREFIX}{e.module}.lora_{e.side}.weight": e for e in layout.entries}
    if names.keys() != tensors.keys():
        raise AdapterError(f"adapter file and model differ in {sorted(names.keys() ^ tensors.keys())[:4]}")
    for name, entry in names.items():
        if tuple(tensors[name].shape) != entry.shape:
            raise AdapterError(f"{name} has shape {tuple(tensors[name].shape)}, expected {entry.shape}")
        entry.view(flat).copy_(tensors[name])
    return flat
