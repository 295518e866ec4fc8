"""The peer: TRL's GRPO on the same sums, prompts, reward and machine, where TRL is installed.

python -m benchmarks.peer_trl [--no-vllm] [--steps 100] [override ...] writes runs/learning/trl-<seed>/metrics.jsonl (step,
reward, seconds) and prints one JSON line; the held-out answers come from TRL's own engine after training.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from actors.build import build_machine, build_model_source, build_prompts, build_rows
from benchmarks.common import report, settings_from
from benchmarks.learning import RUNS, SUMS
from benchmarks.peers import StepTimes, be_one_process
from rewards.answers import numeric
from rewards.sample import Sample


def score(text: str, answer: str) -> float:
    return numeric(Sample("", text, answer)) or 0.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments, overrides = parser.parse_known_args()
    settings = settings_from(*SUMS, *RUNS["sums"], *overrides)
    machine = build_machine(settings)
    source, tokenizer = build_model_source(settings)
    prompts = build_prompts(settings, *build_rows(settings), tokenizer)
    per_step, group = settings.algorithm.prompts_per_step, settings.algorithm.group_size

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from trl import GRPOConfig, GRPOTrainer

    be_one_process()
    rows = [prompts.at(i) for i in range(per_step * arguments.steps)]
    dataset = Dataset.from_list([{"prompt": p.text, "answer": p.answer} for p in rows])
    folder = Path(f"runs/learning/trl-{arguments.seed}")
    folder.mkdir(parents=True, exist_ok=True)

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        return [score(text, gold) for text, gold in zip(completions, answer, strict=True)]

    log = StepTimes()
    config = GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=per_step * group, num_generations=group,
        max_completion_length=settings.sampling.max_tokens, max_steps=arguments.steps, logging_steps=1, save_strategy="no",
        learning_rate=settings.learner.learning_rate, temperature=settings.sampling.temperature, beta=0.0,
        bf16=machine.dtype == "bfloat16", use_cpu=machine.device == "cpu", seed=arguments.seed, report_to=[],
        gradient_checkpointing=False, shuffle_dataset=False, use_vllm=not arguments.no_vllm,
        **({} if arguments.no_vllm else {"vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.12, "vllm_max_model_length": 192}),
    )  # fmt: skip
    lora = LoraConfig(
        r=settings.model.lora.rank, lora_alpha=int(settings.model.lora.alpha), task_type="CAUSAL_LM",
        target_modules=list(settings.model.lora.target_modules),
    )  # fmt: skip
    make: Any = GRPOTrainer
    trainer = make(
        model=source.path, reward_funcs=reward, args=config, train_dataset=dataset, processing_class=tokenizer,
        peft_config=lora, callbacks=[log],
    )  # fmt: skip
    trainer.train()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in log.rows))

    model = trainer.model.eval()
    tokenizer.padding_side = "left"
    after = {}
    for kind, options in {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0},
    }.items():
        batch: Any = tokenizer(
            [p.text for p in prompts.held_out], return_tensors="pt", padding=True, add_special_tokens=False
        ).to(model.device)
        with torch.no_grad():
            found = model.generate(**batch, max_new_tokens=settings.sampling.max_tokens, use_cache=True, **options)
        texts = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        after[kind] = statistics.mean(score(t, p.answer or "") for t, p in zip(texts, prompts.held_out, strict=True))
    seconds = [row["seconds"] for row in log.rows]
    report(
        benchmark="peer_trl", seed=arguments.seed, steps=len(seconds), after=after, prompts=len(prompts.held_out),
        step_seconds_median=statistics.median(seconds), step_seconds_mean=statistics.mean(seconds),
    )  # fmt: skip


if __name__ == "__main__":
    main()
