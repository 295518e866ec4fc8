"""Peers at the work of benchmarks.gsm8k: `python -m benchmarks.peer_gsm8k trl|unsloth model.path=... [override ...]`.

The same model, prompts in the same order, reward and settings, by TRL (colocated vLLM) or Unsloth (fast_inference)
where they are installed. One JSON line: reward and seconds of each step, and memory by the driver. Needs a GPU.
"""

import argparse
import importlib
import json
import statistics
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

if sys.argv[1:2] == ["unsloth"]:
    importlib.import_module("unsloth")  # before transformers and TRL, which it changes

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from actors.reward import RewardWorker
from benchmarks.common import report
from benchmarks.gpu_memory import MemorySampler, gib_in_use_by_others
from benchmarks.gsm8k import WORK
from benchmarks.peers import TRAINERS, StepTimes, Work, be_one_process
from conf.compose import load_settings
from epiphany.reward_check import make_reward
from epiphany.rows import read_rows
from epiphany.run_data import load_data
from rewards.sample import Sample


class Reward:
    """Our reward as a function for TRL: the weighted sum of the terms, None for what cannot be scored."""

    __name__ = "reward"

    def __init__(self, worker: RewardWorker) -> None:
        self._worker = worker

    def __call__(self, completions: list[str], answer: list[str], **_columns: object) -> list[float | None]:
        pairs = zip(completions, answer, strict=True)
        return [self._worker.score_sample(Sample("", text, reference)).reward for text, reference in pairs]


def with_pad_token(model: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Path:
    """A copy of the model (links, but for the tokenizer's configuration) that pads with a token of its own.

    Unsloth refuses a model whose padding is its end of sequence.
    """
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    config.unlink()
    pad = next(token for token in tokenizer.get_vocab() if token.startswith("<|") and "pad" in token)
    config.write_text(json.dumps({**content, "pad_token": pad}))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=list(TRAINERS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--utilization", type=float, default=0.3, help="the share of the card that its engine is given")
    parser.add_argument("--micro-batch", type=int, default=16, help="completions in one micro-batch")
    arguments, overrides = parser.parse_known_args()
    others = gib_in_use_by_others()
    be_one_process()
    settings = load_settings(*WORK, *overrides)
    data, times = load_data(settings, read_rows(settings)), StepTimes()
    worker = make_reward(settings, None)
    prompts = [data.prompts.at(i) for i in range(settings.algorithm.prompts_per_step * arguments.steps)]
    shared: dict[str, object] = {
        "reward_funcs": Reward(worker),
        "train_dataset": Dataset.from_list([{"prompt": p.text, "answer": p.answer} for p in prompts]),
        "processing_class": data.tokenizer,
        "callbacks": [times],
    }
    longest = max(len(p.token_ids) for p in prompts) + settings.sampling.max_tokens
    settings.model.path = data.source.path
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory() as copy:
        if arguments.peer == "unsloth":
            settings.model.path = str(with_pad_token(Path(data.source.path), data.tokenizer, Path(copy)))
        work = Work(
            settings, Path(scratch), arguments.steps, longest, arguments.utilization, shared, arguments.micro_batch
        )
        trainer = TRAINERS[arguments.peer](work)
        sampler = MemorySampler()
        trainer.train()
        used = [gib for _, gib in sampler.finish()]
    worker.close()
    seconds = [row["seconds"] for row in times.rows]
    report(
        benchmark="peer_gsm8k",
        peer=arguments.peer,
        overrides=overrides,
        engine_share_of_card=arguments.utilization,
        micro_batch=arguments.micro_batch,
        steps=len(times.rows),
        first_step_s=seconds[0],
        step_seconds_median=statistics.median(seconds),
        minutes=[round(total / 60, 2) for total in accumulate(seconds)],
        reward=[round(row["reward"], 4) for row in times.rows],
        completion_tokens=[round(row["tokens"], 1) for row in times.rows],
        peak_gib=max(used) - others,
    )


if __name__ == "__main__":
    main()
