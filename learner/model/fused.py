"""liger-kernel's fused rotary embedding, RMS norm and SwiGLU for the learner's model, where they apply.

They change speed and memory, not the result beyond rounding. Knows liger-kernel; knows nothing of LoRA.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from transformers import PreTrainedModel

from actors.models.families import family_of


def fuse(model: PreTrainedModel) -> str | None:
    """Use the fused kernels in `model`, if it is 16-bit on a GPU. Returns None, or the reason why they are not used."""
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return "they are for 16-bit models on a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None or not family_of(model.config).has_fused_kernels:
        return f"liger-kernel was not seen to compute {model.config.model_type} as transformers does"
    module = sys.modules[type(model).__module__]
    before = dict(vars(module))
    # What liger-kernel does by default for the family, but for the loss.
    apply(cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    _confine(module, before)
    return None


@dataclass(frozen=True)
class _ByDevice:
    """A function of tensors: `fused` on a GPU, `plain` elsewhere."""

    fused: Callable[..., Any]
    plain: Callable[..., Any]

    def __call__(self, first: Any, *rest: Any, **keywords: Any) -> Any:
        return (self.fused if first.is_cuda else self.plain)(first, *rest, **keywords)


def _confine(module: ModuleType, before: dict[str, Any]) -> None:
    """Keep what liger-kernel changed in transformers' `module` from models that are not on a GPU.

    Its classes stay only in the model that was fused; a model made later on the CPU or the meta device must not get
    them. A function is looked up at each call, so it goes by the device.
    """
    for name, old in before.items():
        new = getattr(module, name)
        if new is old:
            continue
        if isinstance(new, FunctionType):
            setattr(module, name, _ByDevice(new, old.plain if isinstance(old, _ByDevice) else old))
        else:
            setattr(module, name, old)
