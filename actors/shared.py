"""One copy of the base weights for the engine and the learner of one process.

A transformers model without weights (a skeleton on the meta device) takes the tensors that the engine has loaded. They
are read-only: nothing may be merged into them. Knows transformers and bitsandbytes; knows no engine.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.models import ModelSource, keep_packing
from conf.errors import UsageError


class SharingImpossible(UsageError):
    """The engine's weights cannot serve the learner; the message says why."""


@dataclass(frozen=True)
class Nf4Weight:
    """A weight in 4 bits: `packed` (uint8, two values a byte) and the bitsandbytes QuantState that unpacks it."""

    packed: torch.Tensor
    state: Any


BaseWeights = dict[str, torch.Tensor | Nf4Weight]


@runtime_checkable
class SharesWeights(Protocol):
    """An engine that can lend its base weights, named as transformers names them.

    Raises SharingImpossible where they are not plain tensors.
    """

    def base_weights(self) -> BaseWeights: ...


def build_skeleton(
    source: ModelSource, *, dtype: str, trust_remote_code: bool, attention: str = "sdpa"
) -> PreTrainedModel:
    """The model's structure: parameters on the meta device, buffers (rotary frequencies) real, nothing trainable."""
    config = AutoConfig.from_pretrained(source.path, revision=source.revision, trust_remote_code=trust_remote_code)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=attention, trust_remote_code=trust_remote_code
        )
    model.tie_weights()
    return model.requires_grad_(False)


def attach(model: PreTrainedModel, weights: BaseWeights, *, device: str) -> PreTrainedModel:
    """Give the skeleton `model` the tensors of `weights`, and check that it holds these and no copies.

    Raises SharingImpossible if a parameter is missing from `weights` or has another shape.
    """
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        given = weights.get(name)
        if given is None:
            raise SharingImpossible(f"the engine has no {name}")
        if isinstance(given, Nf4Weight):
            if tuple(given.state.shape) != tuple(parameter.shape):
                raise SharingImpossible(f"{name} is {tuple(parameter.shape)}, the engine's {tuple(given.state.shape)}")
            _become_nf4(model, owner, given)
            model.is_loaded_in_4bit = True  # type: ignore[assignment] - what PEFT asks
            continue
        if given.shape != parameter.shape or given.dtype != parameter.dtype:
            raise SharingImpossible(
                f"{name} is {tuple(parameter.shape)} {parameter.dtype}, the engine's {tuple(given.shape)} {given.dtype}"
            )
        setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(_usable_in_autograd(given), requires_grad=False))
    model.tie_weights()
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    _check_shared(model, weights)
    return model


def _usable_in_autograd(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as an ordinary tensor: one made in inference mode cannot be saved for backward."""
    return torch.from_dlpack(tensor.detach()) if tensor.is_inference() else tensor.detach()


def _become_nf4(model: PreTrainedModel, owner: str, weight: Nf4Weight) -> None:
    """Replace the linear layer `owner` by one that holds `weight`."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    make: Any = Params4bit
    old: Any = model.get_submodule(owner)
    with torch.device("meta"):
        new = Linear4bit(
            old.in_features, old.out_features, bias=old.bias is not None, compute_dtype=weight.state.dtype,
            quant_type=weight.state.quant_type,
        )  # fmt: skip
    new.weight = make(
        weight.packed, requires_grad=False, quant_state=weight.state, blocksize=weight.state.blocksize,
        compress_statistics=weight.state.nested, quant_type=weight.state.quant_type, bnb_quantized=True, module=new,
    )  # fmt: skip
    keep_packing(new)
    new.bias = old.bias
    new.quant_state = weight.state
    model.set_submodule(owner, new.requires_grad_(False))


def _check_shared(model: PreTrainedModel, weights: BaseWeights) -> None:
    for name, parameter in model.named_parameters():
        given = weights[name]
        lent = given.packed if isinstance(given, Nf4Weight) else given
        if parameter.data_ptr() != lent.data_ptr() or parameter.device != lent.device:
            raise SharingImpossible(f"{name} became a copy")


def weights_of(model: torch.nn.Module) -> BaseWeights:
    """The weights of a transformers model (PEFT's wrapping taken off), as `attach` wants them."""
    found: BaseWeights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if ".lora_" in name:
            continue
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        state = getattr(parameter, "quant_state", None)
        found[plain] = parameter if state is None else Nf4Weight(parameter.data, state)
    return found


# Layers that engines fuse into one matrix: nf4 takes or leaves them together.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def kept_in_16bit(model: torch.nn.Module, patterns: Sequence[str]) -> frozenset[str]:
    """The linear layers whose names match one of `patterns`, and what is fused with them.

    Raises UsageError if a pattern matches none.
    """
    linear = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    kept: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(linear, pattern)
        if not matched:
            raise UsageError(f"model.keep_16bit: {pattern!r} matches no linear layer, for instance not {linear[0]}")
        for name in matched:
            parent, _, leaf = name.rpartition(".")
            together = next((family for family in FUSED if leaf in family), (leaf,))
            kept |= {f"{parent}.{one}" for one in together}
    return frozenset(kept)
