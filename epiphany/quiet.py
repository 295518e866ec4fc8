"""Silences what libraries say and a user can do nothing about."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """To be called before they are imported."""
    for name in ("bitsandbytes", "liger_kernel", "torch._library.triton"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # vLLM's capture of CUDA graphs, datasets
    warnings.filterwarnings("ignore", module=r"vllm|torch")


def quiet_transformers() -> None:
    """For transformers, which this imports."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
