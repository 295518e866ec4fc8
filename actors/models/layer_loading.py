"""Load a base model one decoder layer after another, so that no more than one of them is whole at a time.

Knows safetensors and bitsandbytes; knows neither engines nor what is done with a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from actors.models.loading import check_finite, checkpoint_quantization, decoder_layers, local_folder
from actors.models.source import ModelError, ModelSource
from actors.models.weight_sharing import Nf4Weight, persistent_buffers, place_weight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

INDEX = "model.safetensors.index.json"
NF4_STATE = ".quant_state.bitsandbytes__nf4"


class StoredWeights:
    """The tensors of a checkpoint by name, each read when it is asked for."""

    def __init__(self, source: ModelSource) -> None:
        self._path, folder = source.path, local_folder(source)
        if (folder / INDEX).is_file():
            self._files = {
                name: folder / file for name, file in json.loads((folder / INDEX).read_text())["weight_map"].items()
            }
        else:
            self._files = {name: file for file in folder.glob("*.safetensors") for name in _names(file)}
        if not self._files:
            raise ModelError(
                f"runtime.learner_shards: {source.path} has no .safetensors files, whose tensors can be read one by "
                "one; convert it, or choose runtime.learner_shards=1"
            )

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str, *, like: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor as it is stored, or in the dtype of the tensor `like`.

        Raises ModelError if there is no such tensor, or none of that shape.
        """
        if name not in self._files:
            raise ModelError(
                f"runtime.learner_shards: {self._path} stores {name} under another name or as a part of another "
                "weight; choose another model.path, or runtime.learner_shards=1"
            )
        with safe_open(self._files[name], framework="pt") as tensors:
            tensor = tensors.get_tensor(name)
        if like is None:
            return tensor
        if tensor.shape != like.shape:
            raise ModelError(f"model.path: {self._path} has {name} in another shape; copy or download it again")
        return tensor.to(like.dtype)

    def quantization_state(self, name: str, *, device: str) -> QuantState:
        """How the 4-bit weight `name` is to be unpacked."""
        from bitsandbytes.functional import QuantState

        parts = {key: self.read(key) for key in self._files if key.startswith(f"{name}.")}
        return QuantState.from_dict(parts, device=torch.device(device))


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.keys())


def load_by_layer(
    model: PreTrainedModel,
    source: ModelSource,
    *,
    device: str,
    quantization: str,
    kept: frozenset[str],
    trust_remote_code: bool,
    after_layer: Callable[[torch.nn.Module], None],
) -> PreTrainedModel:
    """Give the meta model `model` its weights on `device`, in its dtype, or in nf4 with double quantization but for the
    linear layers `kept` and the head. A checkpoint that is in nf4 already is loaded as it is. `after_layer` is called
    with each decoder layer as soon as it has all its parameters.

    Raises ModelError if the checkpoint lacks a weight, or holds NaN or infinity.
    """
    stored, head = StoredWeights(source), model.get_output_embeddings()
    is_plain = checkpoint_quantization(source, trust_remote_code=trust_remote_code) is None
    packed = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and name not in kept
    }
    packed = packed if quantization == "nf4" and is_plain else set()
    layers = {id(layer) for layer in decoder_layers(model)}
    in_layers: set[str] = set()
    for path, module in list(model.named_modules()):
        if id(module) not in layers:
            continue
        names = [f"{path}.{name}" for name, _ in module.named_parameters()]
        in_layers |= {*names}
        for name in names:
            _place(model, name, stored, device=device, is_nf4=name in packed)
        check_finite(module, source.path)
        after_layer(module)
    for name, _ in list(model.named_parameters()):
        if name not in in_layers:
            _place(model, name, stored, device=device, is_nf4=False)
    model.tie_weights()
    for path, module in model.named_modules():
        of_checkpoint = {name for name, _ in persistent_buffers(module)}
        for name, buffer in module._buffers.items():
            if name in of_checkpoint:
                buffer = stored.read(f"{path}.{name}", like=buffer)
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model


def _place(model: PreTrainedModel, name: str, stored: StoredWeights, *, device: str, is_nf4: bool) -> None:
    from bitsandbytes.functional import quantize_4bit

    if f"{name}{NF4_STATE}" in stored:
        weight = Nf4Weight(stored.read(name).to(device), stored.quantization_state(name, device=device))
    else:
        plain = stored.read(name, like=model.get_parameter(name)).to(device)
        weight = Nf4Weight(*quantize_4bit(plain, quant_type="nf4", compress_statistics=True)) if is_nf4 else plain
    place_weight(model, name, weight)
