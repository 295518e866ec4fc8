"""The peer: TRL's GRPO on the same sums, prompts, reward and machine, where TRL is installed.

`python -m benchmarks.peer_trl [--no-vllm] [--steps 100] [override ...]` writes runs/learning/trl-<seed>/metrics.jsonl
(step, reward, seconds) and prints one JSON line; the held-out answers come from the trained model by
transformers.generate.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.common import report
from benchmarks.learning import RUNS, SUMS
from benchmarks.peers import StepTimes, be_one_process, grpo_config, lora_config
from conf.compose import load_settings
from conf.schema import Settings
from epiphany.rows import read_rows
from epiphany.run_data import RunData, load_data
from epiphany.run_plan import choose_device
from rewards.correctness import numeric
from rewards.sample import Sample

DECODING: dict[str, dict[str, object]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
}


def score(text: str, answer: str) -> float:
    return numeric(Sample("", text, answer)) or 0.0


def reward(completions: list[str], answer: list[str], **_columns: object) -> list[float]:
    return [score(text, reference) for text, reference in zip(completions, answer, strict=True)]


def trainer_arguments(settings: Settings, arguments: argparse.Namespace, folder: Path) -> TrainingArguments:
    algorithm, device = settings.algorithm, choose_device(settings)
    engine: dict[str, object] = {"use_vllm": False}
    if not arguments.no_vllm:
        engine = {
            "use_vllm": True,
            "vllm_mode": "colocate",
            "vllm_gpu_memory_utilization": 0.12,
            "vllm_max_model_length": 192,
        }
    return grpo_config(
        settings,
        folder,
        arguments.steps,
        per_device_train_batch_size=algorithm.prompts_per_step * algorithm.group_size,
        bf16=device.dtype == "bfloat16",
        use_cpu=device.kind == "cpu",
        seed=arguments.seed,
        gradient_checkpointing=False,
        **engine,
    )


def accuracy(model: PreTrainedModel, data: RunData, max_tokens: int) -> dict[str, float]:
    """The share of right answers to the held-out questions, greedy and sampled."""
    tokenizer, prompts = data.tokenizer, data.prompts.held_out
    tokenizer.padding_side = "left"
    texts = [prompt.text for prompt in prompts]
    batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    generate = cast("Callable[..., torch.Tensor]", model.generate)
    shares = {}
    for kind, options in DECODING.items():
        with torch.no_grad():
            tokens = generate(**batch, max_new_tokens=max_tokens, use_cache=True, **options)
        answers = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        scores = [score(str(text), prompt.answer or "") for text, prompt in zip(answers, prompts, strict=True)]
        shares[kind] = statistics.mean(scores)
    return shares


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args()
    settings = load_settings(*SUMS, *RUNS["sums"], *overrides)
    data = load_data(settings, read_rows(settings))

    from trl import GRPOTrainer

    be_one_process()
    prompts = [data.prompts.at(i) for i in range(settings.algorithm.prompts_per_step * arguments.steps)]
    folder = Path(f"runs/learning/trl-{arguments.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    log = StepTimes()
    make_trainer = cast("Callable[..., Trainer]", GRPOTrainer)
    trainer = make_trainer(
        model=data.source.path,
        reward_funcs=reward,
        args=trainer_arguments(settings, arguments, folder),
        train_dataset=Dataset.from_list([{"prompt": p.text, "answer": p.answer} for p in prompts]),
        processing_class=data.tokenizer,
        peft_config=lora_config(settings),
        callbacks=[log],
    )
    trainer.train()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.rows))
    seconds = [row["seconds"] for row in log.rows]
    report(
        benchmark="peer_trl",
        seed=arguments.seed,
        steps=len(seconds),
        after=accuracy(cast("PreTrainedModel", trainer.model).eval(), data, settings.sampling.max_tokens),
        prompts=len(data.prompts.held_out),
        step_seconds_median=statistics.median(seconds),
        step_seconds_mean=statistics.mean(seconds),
    )


if __name__ == "__main__":
    main()
