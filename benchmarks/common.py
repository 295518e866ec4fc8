"""What the benchmarks share: settings from overrides, and a name for the machine."""

import gc
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerBase

from actors.build import build_engine, build_machine, build_model_source, choose_engine
from actors.rollout import RolloutWorker
from actors.types import Group, Prompt, Sampling
from conf.schema import Settings, register
from learner.build import Blueprint, build_learner, draw
from learner.learner import Learner


def settings_from(*overrides: str) -> Settings:
    """The settings that `python launch.py <overrides>` would have."""
    register()
    with initialize_config_module("conf", version_base="1.3"):
        return OmegaConf.to_object(compose("config", list(overrides)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Workers:
    """What a run would have, of one process."""

    blueprint: Blueprint
    tokenizer: PreTrainedTokenizerBase
    engine: Any
    learner: Learner


def build_workers(settings: Settings) -> Workers:
    """An engine and a learner as a run would build them, the engine with the learner's first adapter."""
    machine = build_machine(settings)
    source, tokenizer = build_model_source(settings)
    blueprint = draw(settings, machine, source)
    name, _ = choose_engine(blueprint.settings, machine)
    engine = build_engine(blueprint.settings, machine, name, source, tokenizer, blueprint.layout)
    learner, _ = build_learner(blueprint, engine=engine)
    engine.load_adapter(learner.adapter())
    gc.freeze()  # as a run does
    return Workers(blueprint, tokenizer, engine, learner)


def sample_groups(worker: RolloutWorker, prompts: Sequence[Prompt], sampling: Sampling, samples: int) -> list[Group]:
    """A group of each prompt, as they finish."""
    worker.dispatch(prompts, sampling, samples)
    groups = []
    while worker.unfinished:
        groups += [worker.collect(ordinal) for ordinal in worker.pump().finished]
    return groups


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
