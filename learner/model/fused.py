"""liger-kernel's fused rotary embedding, RMS norm and SwiGLU for the learner's model, where they apply.

They change speed and memory, not the result beyond rounding. Knows liger-kernel; knows nothing of LoRA.
"""

import importlib.util

from transformers import PreTrainedModel


def fuse(model: PreTrainedModel) -> str | None:
    """Use the fused kernels in `model`, if it is 16-bit on a GPU. Returns None, or the reason why they are not used."""
    if model.device.type != "cuda" or model.dtype.itemsize != 2:
        return "they are for 16-bit models on a GPU"
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(model.config.model_type)
    if apply is None:
        return f"liger-kernel does not support {model.config.model_type}"
    apply(rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False, model=model)
    return None
