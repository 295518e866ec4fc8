"""Peers at the work of benchmarks.step: `python -m benchmarks.peer_step trl|unsloth w|qlora [--utilization 0.12]`.

TRL (colocated vLLM; w only) and Unsloth (fast_inference) where they are installed, on the same random weights, batch
and number of tokens. One JSON line: seconds a step, the memory of the process as the driver counts it, and the engine's
cache in it, which takes what is left of the share of the card that the engine gets. benchmarks.compare runs all of
them.
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

from datasets import Dataset
from transformers import AutoConfig

from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from benchmarks.coin import coin
from benchmarks.common import report
from benchmarks.gpu_memory import MemorySampler, gib_in_use_by_others
from benchmarks.peers import TRAINERS, StepTimes, Work, be_one_process
from benchmarks.step import WARM
from benchmarks.work import CASES, PROMPT_TOKENS, work_settings
from conf.schema import Settings
from rewards.sample import Sample


def cache_gib(peer: str, trainer: Any, settings: Settings) -> float:
    """The key-value cache of the peer's vLLM engine."""
    engine = trainer.vllm_generation.llm if peer == "trl" else trainer.model.vllm_engine
    cache, model = engine.llm_engine.vllm_config.cache_config, AutoConfig.from_pretrained(settings.model.path)
    width = model.num_key_value_heads * model.hidden_size // model.num_attention_heads
    return cache.num_gpu_blocks * cache.block_size * 2 * model.num_hidden_layers * width * 2 / 2**30


def prompt(number: int) -> str:
    """PROMPT_TOKENS letters, different for each number."""
    return "".join(chr(97 + (number * 7 + j) % 26) for j in range(PROMPT_TOKENS))


def reward(completions: list[str], **_columns: object) -> list[float]:
    return [coin(Sample("", text, None)) for text in completions]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=list(TRAINERS))
    parser.add_argument("case", choices=[case for case in CASES if case in ("w", "qlora")])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--utilization", type=float, default=0.12)
    arguments, overrides = parser.parse_known_args()
    before = gib_in_use_by_others()
    be_one_process()
    times = StepTimes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        settings = work_settings(arguments.case, folder, *overrides)
        source = ModelSource(settings.model.path, None, "")
        count = arguments.steps * settings.algorithm.prompts_per_step
        shared: dict[str, object] = {
            "reward_funcs": reward,
            "train_dataset": Dataset.from_list([{"prompt": prompt(i)} for i in range(count)]),
            "processing_class": load_tokenizer(source, chat_template=None, trust_remote_code=False),
            "callbacks": [times],
        }
        longest = PROMPT_TOKENS + 32 + settings.sampling.max_tokens
        work = Work(settings, folder, arguments.steps, longest, arguments.utilization, shared)
        trainer = TRAINERS[arguments.peer](work)
        sampler = MemorySampler()
        trainer.train()
        process_gib = [gib - before for _, gib in sampler.finish()]
        cache = cache_gib(arguments.peer, trainer, settings)
    steady = [row["seconds"] for row in times.rows[WARM:]]
    report(
        benchmark="peer_step",
        peer=arguments.peer,
        case=arguments.case,
        engine_share_of_card=arguments.utilization,
        steps=len(times.rows),
        first_step_s=times.rows[0]["seconds"],
        seconds_median=statistics.median(steady),
        seconds_mean=statistics.mean(steady),
        process_gib_highest=max(process_gib),
        kv_cache_gib=cache,
        highest_over_median=max(process_gib) / statistics.median(process_gib),
    )


if __name__ == "__main__":
    main()
