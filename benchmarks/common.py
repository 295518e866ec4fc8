"""What the benchmarks share: settings from overrides, and a name for the machine."""

import json
import platform
from datetime import date
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from conf.schema import Settings, register


def settings_from(*overrides: str) -> Settings:
    """The settings that `python launch.py <overrides>` would have."""
    register()
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))  # type: ignore[return-value]


def report(**result: Any) -> None:
    """Print one result as a JSON line, with the machine, the versions and the day."""
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    threads = None if torch.cuda.is_available() else torch.get_num_threads()
    print(
        json.dumps(
            {**result, "machine": machine, "threads": threads, "torch": torch.__version__, "day": str(date.today())}
        ),
        flush=True,
    )
