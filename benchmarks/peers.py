"""What the benchmarks of peers share: trainers of the same work by TRL and Unsloth, and the seconds of each step.

Unsloth must be imported before this module is, for it changes transformers and TRL.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from peft import LoraConfig
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

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
        loss_type="grpo",  # TRL's defaults are DAPO's loss and a rate that falls to 0
        lr_scheduler_type="constant",
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


@dataclass(frozen=True)
class Work:
    """What a peer trains, with `shared` arguments of its trainer.

    Its engine gets the share `utilization` of the card, for sequences of up to `longest` tokens. A micro-batch has
    `micro_batch` completions (None: those of one prompt).
    """

    settings: Settings
    folder: Path
    steps: int
    longest: int
    utilization: float
    shared: dict[str, object]
    micro_batch: int | None = None


def trainer_arguments(work: Work, **more: object) -> TrainingArguments:
    algorithm = work.settings.algorithm
    micro_batch = work.micro_batch or algorithm.group_size
    return grpo_config(
        work.settings,
        work.folder,
        work.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=algorithm.prompts_per_step * algorithm.group_size // micro_batch,
        bf16=True,
        gradient_checkpointing=True,
        use_vllm=True,
        **more,
    )


def trl_trainer(work: Work) -> Trainer:
    from trl import GRPOTrainer

    args = trainer_arguments(
        work,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=work.utilization,
        vllm_max_model_length=work.longest,
    )
    make_trainer = cast("Callable[..., Trainer]", GRPOTrainer)
    return make_trainer(
        model=work.settings.model.path, args=args, peft_config=lora_config(work.settings), **work.shared
    )


def unsloth_trainer(work: Work) -> Trainer:
    from unsloth import FastLanguageModel

    settings, lora = work.settings, work.settings.model.lora
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings.model.path,
        max_seq_length=work.longest,
        load_in_4bit=settings.model.quantization == "nf4",
        fast_inference=True,
        max_lora_rank=lora.rank,
        gpu_memory_utilization=work.utilization,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=lora.rank,
        target_modules=list(lora.target_modules or FAMILIES["qwen2"].targets),
        lora_alpha=int(lora.alpha),
        use_gradient_checkpointing="unsloth",
        random_state=0,
    )
    from trl import GRPOTrainer

    make_trainer = cast("Callable[..., Trainer]", GRPOTrainer)
    return make_trainer(model=model, args=trainer_arguments(work), **{**work.shared, "processing_class": tokenizer})


TRAINERS = {"trl": trl_trainer, "unsloth": unsloth_trainer}


class StepTimes(TrainerCallback):
    """Collects of each optimizer step its number, reward, mean answer length in tokens, and seconds with generation and
    scoring.
    """

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
            self.rows.append(
                {
                    "step": state.global_step,
                    "reward": logs["reward"],
                    "tokens": logs["completions/mean_length"],
                    "seconds": took,
                }
            )
