"""LoRA on a transformers model, all of it in one flat float32 buffer.

PEFT inserts the adapter; its parameters then become views of one buffer, so that clipping, the optimizer, all-reduce
and export are one kernel each. Knows torch and PEFT; knows neither engines nor objectives.
"""

from collections.abc import Sequence
from typing import Protocol, TypedDict, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from actors.models.adapter import AdapterError, check_adapter
from actors.types import Adapter, AdapterEntry, AdapterLayout

PREFIX = "base_model.model."


class LoraArguments(TypedDict):
    """What describes an adapter, as keyword arguments of `adapter_layout` and `FlatLora`."""

    rank: int
    alpha: float
    target_modules: Sequence[str]


class _Linear(Protocol):
    in_features: int
    out_features: int


def adapter_layout(model: torch.nn.Module, *, rank: int, alpha: float, target_modules: Sequence[str]) -> AdapterLayout:
    """The place of each matrix of an adapter on `model`, from names and shapes alone (weights may be absent).

    Raises AdapterError if a target names no module.
    """
    leaves = {
        name: cast(_Linear, module)
        for name, module in model.named_modules()
        if name.rsplit(".", 1)[-1] in target_modules
    }
    missing = sorted(set(target_modules) - {name.rsplit(".", 1)[-1] for name in leaves})
    if missing:
        raise AdapterError(f"model.lora.target_modules {missing} match no module of {type(model).__name__}")
    entries, offset = [], 0
    for side in "AB":
        for name, module in leaves.items():
            shape = (rank, int(module.in_features)) if side == "A" else (int(module.out_features), rank)
            entries.append(AdapterEntry(name, side, shape, offset))
            offset += entries[-1].size
    return AdapterLayout(rank, alpha, tuple(entries))


def lora_arguments_of(layout: AdapterLayout) -> LoraArguments:
    """The arguments that give `layout` on the same model."""
    targets = sorted({entry.module.rsplit(".", 1)[-1] for entry in layout.entries})
    return {"rank": layout.rank, "alpha": layout.alpha, "target_modules": targets}


class FlatLora:
    """A PEFT model whose LoRA weights and gradients are views of `flat` and `flat.grad` (both [layout.size]).

    A is initialized from `seed` as PEFT does (Kaiming uniform), B with zeros, so the adapter starts as the identity.
    """

    def __init__(
        self, model: PreTrainedModel, *, rank: int, alpha: float, target_modules: Sequence[str], seed: int
    ) -> None:
        self.layout = adapter_layout(model, rank=rank, alpha=alpha, target_modules=target_modules)
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
            self.model = cast(PeftModel, get_peft_model(model, config, autocast_adapter_dtype=True))
        named = dict(self.model.named_parameters())
        parameters = [named[f"{PREFIX}{e.module}.lora_{e.side}.default.weight"] for e in self.layout.entries]
        self.flat = torch.nn.Parameter(torch.empty(self.layout.size, dtype=torch.float32, device=model.device))
        self.flat.grad = torch.zeros_like(self.flat)
        with torch.no_grad():
            for entry, parameter in zip(self.layout.entries, parameters, strict=True):
                view = entry.view(self.flat.detach())
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = entry.view(self.flat.grad)

    def export(self, version: int, into: torch.Tensor | None = None) -> Adapter:
        """A copy of the weights, on their device or in `into`."""
        flat = self.flat.detach()
        return Adapter(version, self.layout, flat.clone() if into is None else into.copy_(flat))

    def load(self, adapter: Adapter) -> None:
        """Copy `adapter` in. Raises AdapterError if it has another layout or is not finite."""
        check_adapter(adapter, self.layout)
        with torch.no_grad():
            self.flat.copy_(adapter.flat)


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
