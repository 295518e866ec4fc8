"""task=doctor: what this machine has, what does not fit together, and what will be slow, before anything is loaded."""

import math
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path

import psutil
from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table
from rich.text import Text

from conf.schema import Settings
from epiphany.machine import container_limit

GIB = 2**30
FEW_CORES = 4
SMALL_DISK, SMALL_MEMORY, SMALL_SHARED = 10 * GIB, 8 * GIB, 1 * GIB
BFLOAT16 = (8, 0)  # compute capability from which on a card has it
OLDEST_CARD = (7, 0)  # that vLLM runs on
GOOD, NOTE, PROBLEM = "ok", "note", "problem"
COLORS = {GOOD: "green", NOTE: "yellow", PROBLEM: "red"}
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """One line: how it is (GOOD, NOTE: it works, but; PROBLEM: it does not), of what, and what to do about it."""

    state: str
    topic: str
    text: str


def examine(settings: Settings) -> list[Finding]:
    """Everything that can be said of this machine for these settings."""
    return [finding for check in CHECKS for finding in check(settings)]


def show(console: Console, findings: list[Finding]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=False)
    for finding in findings:
        table.add_row(Text(finding.state, style=COLORS[finding.state]), finding.topic, finding.text)
    console.print(table)
    problems = sum(finding.state == PROBLEM for finding in findings)
    console.print(
        f"{problems} of these must be mended" if problems else "nothing is in the way; task=plan says what would run"
    )


def _python(settings: Settings) -> Iterator[Finding]:
    yield Finding(GOOD, "Python", f"{platform.python_version()} in {sys.prefix}")
    cores, memory = _processors(), psutil.virtual_memory()
    limit = container_limit("memory.max")
    state = NOTE if cores < FEW_CORES else GOOD
    slow = ": sampling and scoring share them, and a GPU waits" if cores < FEW_CORES else ""
    yield Finding(state, "processors", f"{cores}{slow}")
    available = memory.available if limit is None else min(memory.available, limit)
    text = f"{memory.available / GIB:.0f} of {memory.total / GIB:.0f} GiB are free"
    if limit is not None and limit < memory.total:
        text += f", of which this container may use {limit / GIB:.0f} GiB in all"
    yield Finding(NOTE if available < SMALL_MEMORY else GOOD, "memory", text)


def _processors() -> int:
    """Those that this process may use, with a container's quota."""
    quota = container_limit("cpu.max")
    allowed = len(os.sched_getaffinity(0))
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _packages(settings: Settings) -> Iterator[Finding]:
    """Whether what is installed is what Epiphany asks for."""
    try:
        needs = [Requirement(line) for line in requires("epiphany-rl") or []]
        name = f"Epiphany {metadata('epiphany-rl')['Version']}"
    except PackageNotFoundError:
        yield Finding(PROBLEM, "packages", "Epiphany is not installed here: run make, or pip install -e .")
        return
    wrong = []
    for need in needs:
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(need.name)
        except PackageNotFoundError:
            wrong.append(f"{need} is missing")
            continue
        if not need.specifier.contains(installed, prereleases=True):
            wrong.append(f"{need.name} is {installed}, needed is {need.specifier}")
    if wrong:
        yield Finding(PROBLEM, "packages", f"{'; '.join(wrong)}: run make again, or pip install -e .")
    else:
        yield Finding(GOOD, "packages", f"{name}, and what it needs in the versions that it needs")


def _torch(settings: Settings) -> Iterator[Finding]:
    import torch

    has_driver, built_for = _has_driver(), torch.version.cuda
    yield Finding(GOOD, "torch", f"{torch.__version__}, built for {'CUDA ' + built_for if built_for else 'the CPU'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield from _card(index)
    elif has_driver and built_for is None:
        yield Finding(PROBLEM, "GPU", "there is one, but this torch is built for the CPU: make clean, then make")
    elif has_driver:
        yield Finding(
            PROBLEM, "GPU", f"torch cannot use it: its driver may be too old for CUDA {built_for} (see nvidia-smi)"
        )
    elif settings.hardware.device == "cuda":
        yield Finding(PROBLEM, "GPU", "there is none, and hardware.device=cuda asks for one")
    else:
        yield Finding(NOTE, "GPU", "none: models of up to about 0.5B train here, slowly, in float32")


def _has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _card(index: int) -> Iterator[Finding]:
    import torch

    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    free, total = torch.cuda.mem_get_info(index)
    text = f"{name}, {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
    if capability < OLDEST_CARD:
        yield Finding(PROBLEM, f"GPU {index}", f"{text}; vLLM does not run on it: engine.name=transformers does")
    elif capability < BFLOAT16:
        yield Finding(NOTE, f"GPU {index}", f"{text}; it has no bfloat16: runs compute in float16")
    elif free < 0.8 * total:
        yield Finding(NOTE, f"GPU {index}", f"{text}; something else uses it, and the memory plan takes what is left")
    else:
        yield Finding(GOOD, f"GPU {index}", text)


def _engine(settings: Settings) -> Iterator[Finding]:
    import torch

    from actors.engines.base import EngineUnavailable
    from actors.engines.vllm.environment import check_nf4, check_version

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        yield Finding(GOOD, "vLLM", check_version())
    except EngineUnavailable as missing:
        yield Finding(NOTE, "vLLM", f"{missing}: the engine of transformers is used, which is many times slower")
        return
    if device == "cpu":
        return
    try:
        check_nf4(device)
        import bitsandbytes

        yield Finding(GOOD, "nf4", f"bitsandbytes {bitsandbytes.__version__}: saves memory, not time")
    except (EngineUnavailable, ImportError, RuntimeError) as missing:
        yield Finding(NOTE, "nf4", f"not with vLLM: {missing}")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        yield Finding(PROBLEM, "compiler", "there is no C compiler, which Triton needs: install gcc")
    elif not header.is_file():
        yield Finding(PROBLEM, "compiler", f"{header} is missing, which Triton needs: install python3-dev")
    else:
        yield Finding(GOOD, "compiler", "a C compiler and Python's headers, for Triton")


def _disk(settings: Settings) -> Iterator[Finding]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from actors.models.source import cache_folder

    for topic, folder in (
        ("run folder", Path(settings.run.folder)),
        ("hub cache", Path(HF_HUB_CACHE)),
        ("our cache", cache_folder()),
    ):
        existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        text = f"{folder}, {free / GIB:.0f} GiB are free"
        if not os.access(existing, os.W_OK):
            yield Finding(PROBLEM, topic, f"{text}; this user may not write there")
        else:
            yield Finding(NOTE if free < SMALL_DISK else GOOD, topic, text)
    shared = Path("/dev/shm")
    if settings.runtime.name == "ray" and shared.exists() and shutil.disk_usage(shared).total < SMALL_SHARED:
        yield Finding(NOTE, "shared memory", f"{shared} is under 1 GiB, so that Ray is slow: docker run --shm-size=8g")


def _hub(settings: Settings) -> Iterator[Finding]:
    from huggingface_hub import get_session, get_token
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        yield Finding(NOTE, "hub", "not asked, because HF_HUB_OFFLINE is set: models and data must lie here")
        return
    try:
        get_session().head(ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # noqa: BLE001 - each of its HTTP libraries has errors of its own
        reason = type(error).__name__
        yield Finding(NOTE, "hub", f"cannot be reached ({reason}): models and data must lie here, or behind a proxy")
        return
    token = "with a token" if get_token() else "without a token, which gated models need (HF_TOKEN)"
    yield Finding(GOOD, "hub", f"reached, {token}")


def _exports(settings: Settings) -> Iterator[Finding]:
    from conf.errors import UsageError
    from epiphany.export.gguf import check_gguf
    from epiphany.export.proof import check_llama_cpp

    try:
        check_gguf(settings.export.llama_cpp, "q8_0")
        check_llama_cpp()
    except UsageError as missing:
        yield Finding(NOTE, "GGUF", str(missing))
    else:
        yield Finding(GOOD, "GGUF", "llama.cpp's converter and its Python binding are here")


CHECKS: tuple[Callable[[Settings], Iterator[Finding]], ...] = (
    _python,
    _packages,
    _torch,
    _engine,
    _disk,
    _hub,
    _exports,
)
