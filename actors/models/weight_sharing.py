"""One copy of the base weights for the engine and the learner of one process.

`build_meta_model` makes a transformers model without weights (on the meta device); `share_weights` gives it the tensors
that the engine has loaded. They are read-only: nothing may be merged into them. Knows transformers and bitsandbytes;
knows no engine.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast, runtime_checkable

import torch
from accelerate import init_empty_weights
from transformers import PreTrainedModel

from actors.models.families import family_of
from actors.models.loading import disable_repacking, keep_language_model, load_config, model_class
from actors.models.source import ModelSource
from conf.errors import UsageError

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


class SharingImpossible(UsageError):
    """The learner cannot compute with the engine's weights; the message says why."""


@dataclass(frozen=True)
class Nf4Weight:
    """A weight in 4 bits: `packed` (uint8, two values a byte) and the bitsandbytes state that unpacks it."""

    packed: torch.Tensor
    state: QuantState


BaseWeights = dict[str, torch.Tensor | Nf4Weight]


@runtime_checkable
class SharesWeights(Protocol):
    """An engine that can share its base weights."""

    def base_weights(self) -> BaseWeights:
        """The weights under transformers' names. Raises SharingImpossible if they are not plain tensors."""
        ...


@runtime_checkable
class SharesAdapter(Protocol):
    """An engine whose copy of the adapter a learner of its process may compute with while no sequence is unfinished."""

    def adapter_slots(self) -> list[torch.Tensor]:
        """A tensor for each entry of the layout; B is times the scaling. Raises SharingImpossible."""
        ...


def build_meta_model(
    source: ModelSource, *, dtype: str, trust_remote_code: bool, attention: str | None = None
) -> PreTrainedModel:
    """The model without weights: parameters on the meta device, real buffers (as rotary frequencies), all frozen.

    `attention` is an implementation of transformers; None takes one that computes all of the family's attention. Raises
    ModelError if the family is not known.
    """
    config = load_config(source, trust_remote_code=trust_remote_code)
    plain = family_of(config).plain_attention  # refuses what is not known
    config.use_cache = False
    config.get_text_config().use_cache = False
    with init_empty_weights(include_buffers=False):
        model = model_class(config).from_config(
            config,
            dtype=getattr(torch, dtype),
            attn_implementation=attention or plain,
            trust_remote_code=trust_remote_code,
        )
    model.tie_weights()
    keep_language_model(model)
    return model.requires_grad_(False)


def share_weights(model: PreTrainedModel, weights: BaseWeights, *, device: str) -> PreTrainedModel:
    """Make the tensors of `weights` the parameters of the meta model `model`, without a copy.

    Raises SharingImpossible if a parameter is missing from `weights`, or has another shape or dtype there.
    """
    for name, _ in list(model.named_parameters()):
        if name not in weights:
            raise SharingImpossible(f"the engine has no {name}")
        place_weight(model, name, weights[name])
    model.tie_weights()
    for path, module in model.named_modules():
        of_checkpoint = dict(persistent_buffers(module))
        for name, buffer in module._buffers.items():
            if name in of_checkpoint:
                shared = weights.get(f"{path}.{name}")
                if not isinstance(shared, torch.Tensor) or shared.shape != of_checkpoint[name].shape:
                    raise SharingImpossible(f"the engine has no {path}.{name}")
                buffer = _usable_in_autograd(shared)
            module._buffers[name] = None if buffer is None else buffer.to(device)
    _check_shared(model, weights)
    return model


def place_weight(model: PreTrainedModel, name: str, weight: torch.Tensor | Nf4Weight) -> None:
    """Make `weight` the parameter `name` of `model`, without a copy.

    Raises SharingImpossible if it has another shape or dtype.
    """
    owner, _, leaf = name.rpartition(".")
    parameter = model.get_parameter(name)
    if isinstance(weight, Nf4Weight):
        shape = tuple(weight.state.shape or ())
        if shape != tuple(parameter.shape):
            raise SharingImpossible(f"{name} is {tuple(parameter.shape)}, what is there is {shape}")
        _replace_by_nf4(model, owner, weight)
        model.is_loaded_in_4bit = True  # type: ignore[assignment] - what PEFT asks
        return
    if weight.shape != parameter.shape or weight.dtype != parameter.dtype:
        raise SharingImpossible(
            f"{name} is {tuple(parameter.shape)} {parameter.dtype}, "
            f"what is there is {tuple(weight.shape)} {weight.dtype}"
        )
    setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(_usable_in_autograd(weight), requires_grad=False))


def persistent_buffers(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The module's own tensors that a checkpoint has and that are no parameters."""
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _usable_in_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor: a tensor made in inference mode cannot be saved for backward."""
    return torch.from_dlpack(tensor.detach()) if tensor.is_inference() else tensor.detach()


def _replace_by_nf4(model: PreTrainedModel, owner: str, weight: Nf4Weight) -> None:
    """Replace the linear layer `owner` by one that holds `weight`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    old = model.get_submodule(owner)
    assert isinstance(old, torch.nn.Linear)
    state = weight.state
    with torch.device("meta"):
        new = Linear4bit(
            old.in_features,
            old.out_features,
            bias=old.bias is not None,
            compute_dtype=state.dtype,
            quant_type=state.quant_type,  # type: ignore[arg-type]
        )
    make_weight = cast("Callable[..., torch.nn.Parameter]", Params4bit)
    new.weight = make_weight(
        weight.packed,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        bnb_quantized=True,
        module=new,
    )
    disable_repacking(new)
    new.bias = old.bias
    new.quant_state = state  # type: ignore[assignment]
    model.set_submodule(owner, new.requires_grad_(False))


def _check_shared(model: PreTrainedModel, weights: BaseWeights) -> None:
    for name, parameter in model.named_parameters():
        weight = weights[name]
        shared = weight.packed if isinstance(weight, Nf4Weight) else weight
        if parameter.data_ptr() != shared.data_ptr() or parameter.device != shared.device:
            raise SharingImpossible(f"{name} became a copy")


def named_base_weights(model: torch.nn.Module) -> BaseWeights:
    """The weights of a transformers model by its own names, without PEFT's prefixes, as `share_weights` takes them."""
    weights: BaseWeights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        state = getattr(parameter, "quant_state", None)
        weights[plain] = parameter if state is None else Nf4Weight(parameter.data, state)
    for path, module in model.named_modules(remove_duplicate=False):
        plain = path.removeprefix("base_model.model.").replace(".base_layer", "")
        weights |= {f"{plain}.{name}": buffer for name, buffer in persistent_buffers(module)}
    return weights


def resolve_kept_modules(model: PreTrainedModel, patterns: Sequence[str]) -> frozenset[str]:
    """The linear layers whose names match one of `patterns`, and the layers that engines fuse with them.

    Raises UsageError if a pattern matches none.
    """
    family = family_of(model.config)
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    names: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(linear, pattern)
        if not matched:
            raise UsageError(f"model.keep_16bit: {pattern!r} matches no linear layer, for instance not {linear[0]}")
        for name in matched:
            parent, _, leaf = name.rpartition(".")
            names |= {f"{parent}.{layer}" for layer in family.fused_with(leaf)}
    return frozenset(names)
