"""What the benchmarks of peers share: TRL's configuration of the same work, and the seconds of each step."""

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from peft import LoraConfig
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from actors.models.families import FAMILIES
from conf.schema import Settings


def be_one_process() -> None:
    """Set what a launcher would set for one process."""
    values = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}
    for name, value in values.items():
        os.environ.setdefault(name, value)


def grpo_config(settings: Settings, folder: Path, steps: int, **more: object) -> TrainingArguments:
    """TRL's configuration of `steps` steps with these settings, and `more` of its arguments."""
    from trl import GRPOConfig

    make_config = cast("Callable[..., TrainingArguments]", GRPOConfig)
    return make_config(
        output_dir=str(folder),
        num_generations=settings.algorithm.group_size,
        max_completion_length=settings.sampling.max_tokens,
        temperature=settings.sampling.temperature,
        learning_rate=settings.learner.learning_rate,
        beta=0.0,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        shuffle_dataset=False,
        **more,
    )


def lora_config(settings: Settings) -> LoraConfig:
    """PEFT's configuration of the same adapter."""
    lora = settings.model.lora
    return LoraConfig(
        r=lora.rank,
        lora_alpha=int(lora.alpha),
        task_type="CAUSAL_LM",
        target_modules=list(lora.target_modules or FAMILIES["qwen2"].targets),
    )


class StepTimes(TrainerCallback):
    """Collects step, reward and seconds of each optimizer step, generation and scoring included."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._started = time.monotonic()

    def on_step_begin(self, *_arguments: object, **_more: object) -> None:
        self._started = time.monotonic()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **_more: object,
    ) -> None:
        if logs and "reward" in logs:
            took = time.monotonic() - self._started
            self.rows.append({"step": state.global_step, "reward": logs["reward"], "seconds": took})
