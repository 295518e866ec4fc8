"""Peers at the work of benchmarks.step: `python -m benchmarks.peer_step trl|unsloth w|qlora [--utilization 0.12]`.

TRL (colocated vLLM; w only) and Unsloth (fast_inference) where they are installed, on the same random weights, batch and
number of tokens. One JSON line: seconds a step, the memory of the process as the driver counts it, and the engine's cache
in it, which takes what is left of the share of the card that the engine is given. benchmarks.compare runs all of them.
"""

import argparse
import importlib
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

if sys.argv[1:2] == ["unsloth"]:
    importlib.import_module("unsloth")  # before transformers and TRL, which it changes

from transformers import AutoConfig

from benchmarks.coin import coin
from benchmarks.common import report
from benchmarks.peers import StepTimes, be_one_process
from benchmarks.step import DriverMemory, used_before
from benchmarks.work import CASES, PROMPT_TOKENS, work_settings
from conf.schema import Settings
from rewards.sample import Sample

WARM = 2


def trainer_arguments(settings: Settings, folder: Path, steps: int, **more: Any) -> Any:
    from trl import GRPOConfig

    a = settings.algorithm
    return GRPOConfig(
        output_dir=str(folder), per_device_train_batch_size=a.group_size, gradient_accumulation_steps=a.prompts_per_step,
        num_generations=a.group_size, max_completion_length=settings.sampling.max_tokens, max_steps=steps, logging_steps=1, save_strategy="no",
        learning_rate=1e-9, temperature=1.0, beta=0.0, bf16=True, report_to=[], gradient_checkpointing=True,
        shuffle_dataset=False, use_vllm=True, **more,
    )  # fmt: skip


def trl_trainer(settings: Settings, arguments: argparse.Namespace, folder: Path, **shared: Any) -> Any:
    from peft import LoraConfig
    from trl import GRPOTrainer

    lora = settings.model.lora
    length = PROMPT_TOKENS + 32 + settings.sampling.max_tokens
    args = trainer_arguments(
        settings, folder, arguments.steps, vllm_mode="colocate", vllm_gpu_memory_utilization=arguments.utilization,
        vllm_max_model_length=length,
    )  # fmt: skip
    config = LoraConfig(
        r=lora.rank, lora_alpha=int(lora.alpha), task_type="CAUSAL_LM", target_modules=list(lora.target_modules)
    )
    return GRPOTrainer(model=settings.model.path, args=args, peft_config=config, **shared)


def unsloth_trainer(settings: Settings, arguments: argparse.Namespace, folder: Path, **shared: Any) -> Any:
    from unsloth import FastLanguageModel

    lora = settings.model.lora
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=settings.model.path, max_seq_length=PROMPT_TOKENS + 32 + settings.sampling.max_tokens,
        load_in_4bit=settings.model.quantization == "nf4", fast_inference=True, max_lora_rank=lora.rank,
        gpu_memory_utilization=arguments.utilization,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=lora.rank, target_modules=list(lora.target_modules), lora_alpha=int(lora.alpha),
        use_gradient_checkpointing="unsloth", random_state=0,
    )  # fmt: skip
    from trl import GRPOTrainer

    args = trainer_arguments(settings, folder, arguments.steps)
    return GRPOTrainer(model=model, args=args, **{**shared, "processing_class": tokenizer})


def cache_gib(engine: Any, settings: Settings) -> float:
    """The key-value cache of a vLLM engine."""
    cache, model = engine.llm_engine.vllm_config.cache_config, AutoConfig.from_pretrained(settings.model.path)
    width = model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    return cache.num_gpu_blocks * cache.block_size * 2 * model.num_hidden_layers * width * 2 / 2**30


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=["trl", "unsloth"])
    parser.add_argument("case", choices=[case for case in CASES if case in ("w", "qlora")])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--utilization", type=float, default=0.12)
    arguments, overrides = parser.parse_known_args()
    before = used_before()
    be_one_process()
    from datasets import Dataset

    from actors.models import ModelSource, load_tokenizer

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = work_settings(arguments.case, folder, *overrides)
        tokenizer = load_tokenizer(
            ModelSource(settings.model.path, None, ""), chat_template=None, trust_remote_code=False
        )
        count = arguments.steps * settings.algorithm.prompts_per_step
        dataset = Dataset.from_list([{"prompt": "".join(chr(97 + (i * 7 + j) % 26) for j in range(PROMPT_TOKENS))} for i in range(count)])  # fmt: skip

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [coin(Sample("", text, None)) for text in completions]

        times = StepTimes()
        shared = {"reward_funcs": reward, "train_dataset": dataset, "processing_class": tokenizer, "callbacks": [times]}
        make = {"trl": trl_trainer, "unsloth": unsloth_trainer}[arguments.peer]
        trainer = make(settings, arguments, folder, **shared)
        memory = DriverMemory(folder / "none")
        trainer.train()
        held = [gib - before for _, gib in memory.finish()]
        engine = trainer.vllm_generation.llm if arguments.peer == "trl" else trainer.model.vllm_engine
        cache = cache_gib(engine, settings)
    steady = [row["seconds"] for row in times.rows[WARM:]]
    report(
        benchmark="peer_step", peer=arguments.peer, case=arguments.case, engine_share_of_card=arguments.utilization,
        steps=len(times.rows), first_step_s=times.rows[0]["seconds"], seconds_median=statistics.median(steady),
        seconds_mean=statistics.mean(steady), process_gib_highest=max(held),
        kv_cache_gib=cache,
        highest_over_median=max(held) / statistics.median(held),
    )  # fmt: skip


if __name__ == "__main__":
    main()
