"""The work that benchmarks measure, on real shapes with random weights: settings, questions, and rows of rollouts.

Work W, from which the others are cut: 8 prompts of about 110 tokens, 8 completions each, 512 tokens a completion
without an early stop, LoRA of rank 16 on all linear layers, one optimizer step.
"""

import json
import random
from pathlib import Path

import pyarrow as pa

from actors.replay.schema import to_batch
from actors.types import Completion, Group, Prompt, Score, Trajectory, VersionSpan
from benchmarks.shapes import random_model
from conf.compose import load_settings
from conf.schema import Settings

PROMPT_TOKENS = 110
W = ["algorithm.prompts_per_step=8", "algorithm.group_size=8", "sampling.max_tokens=512", "data.max_prompt_tokens=128"]
ONE_PROMPT = [*W, "algorithm.prompts_per_step=1"]
TWO_ANSWERS = [*ONE_PROMPT, "algorithm.group_size=2"]
NF4 = "model.quantization=nf4"
QWEN = "qwen2.5-1.5b"
# Each case: the shape, whether its checkpoint is in nf4 already, and overrides.
CASES: dict[str, tuple[str, bool, list[str]]] = {
    "w": (QWEN, False, W),
    "w-in-flight": (QWEN, False, [*W, "runtime.max_staleness=2"]),
    "qlora": (QWEN, False, [*ONE_PROMPT, NF4, "hardware.vram_gib=5"]),
    "7gb-nf4": (QWEN, False, [*ONE_PROMPT, "hardware=7gb", NF4, "sampling.max_tokens=1024"]),
    "7gb-bf16": (QWEN, False, [*ONE_PROMPT, "hardware=7gb", "sampling.max_tokens=1024"]),
    "7gb-sleep": (QWEN, False, [*W, "hardware=7gb", "algorithm.prompts_per_step=12"]),
    "15gb-llama-8b": ("llama-3.1-8b", True, [*ONE_PROMPT, "hardware.vram_gib=15"]),
    "15gb-qwen-7b": ("qwen2.5-7b", True, [*ONE_PROMPT, "hardware.vram_gib=15"]),
    # What fits, at its limit (benchmarks.fits).
    "3gb-qwen": (QWEN, True, [*ONE_PROMPT, "hardware.vram_gib=3"]),
    "8gb-llama-8b": ("llama-3.1-8b", True, [*ONE_PROMPT, "hardware=8gb"]),
    "8gb-qwen-16k": (QWEN, True, [*ONE_PROMPT, "hardware=8gb", "sampling.max_tokens=16000"]),
    "22gb-llama-8b-20k": ("llama-3.1-8b", True, [*ONE_PROMPT, "hardware.vram_gib=22", "sampling.max_tokens=20000"]),
    "48gb-llama-70b": ("llama-3.3-70b", True, [*ONE_PROMPT, "hardware=48gb"]),
    "80gb-llama-8b-64k": ("llama-3.1-8b", True, [*TWO_ANSWERS, "hardware=80gb", "sampling.max_tokens=65408"]),
    "80gb-llama-8b-128k": ("llama-3.1-8b", True, [*TWO_ANSWERS, "hardware=80gb", "sampling.max_tokens=130944"]),
    "15gb-phi-4": ("phi-4", True, [*ONE_PROMPT, "model=phi-4", "hardware.vram_gib=15"]),
}


def work_settings(case: str, folder: Path, *overrides: str) -> Settings:
    """The settings of CASES[case], whose run is in `folder`/run.

    Its questions are written into `folder`, and its model is written unless an override sets model.path.
    """
    shape, is_nf4, more = CASES[case]
    if not any(override.startswith("model.path=") for override in overrides):
        more = [*more, f"model.path={random_model(shape, nf4=is_nf4)}"]
    return load_settings(
        "experiment=none",
        "data=file",
        f"data.source={write_questions(folder, 200)}",
        "data.held_out=1",
        *more,
        "model.package=null",
        "evaluation.samples=0",
        "reward.terms=[{fn: 'benchmarks.coin:coin'}]",
        "reward.check_reference_answer=false",
        f"run.folder={folder / 'run'}",
        "run.checkpoint_every=1000",
        "learner.learning_rate=1.0e-9",
        *overrides,
    )


def write_questions(folder: Path, count: int) -> Path:
    """Random questions; each takes about PROMPT_TOKENS tokens with the byte tokenizer and the plain template."""
    draw = random.Random(0)
    file = folder / "questions.jsonl"
    rows = [{"question": "".join(draw.choices("abcdefgh ", k=90)), "answer": "1"} for _ in range(count)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def random_rollouts(settings: Settings, vocabulary: int) -> pa.Table:
    """A batch as the replay would hand it to the learner.

    Random tokens, every completion at full length, and rewards that give each an advantage.
    """
    draw, length = random.Random(0), settings.sampling.max_tokens

    def completion(name: str) -> Completion:
        tokens = tuple(draw.choices(range(300, vocabulary), k=length))
        return Completion(name, tokens, (-11.9,) * length, "", "length", (VersionSpan(0, length),))

    groups = []
    for ordinal in range(settings.algorithm.prompts_per_step):
        prompt = Prompt(ordinal, "", random_prompt(draw, vocabulary), "", "1", "")
        samples = range(settings.algorithm.group_size)
        trajectories = tuple(Trajectory.single_turn(completion(f"{ordinal}/{i}")) for i in samples)
        groups.append(Group(prompt, trajectories, "", scores=tuple(Score(float(i % 2)) for i in samples)))
    return pa.Table.from_batches([to_batch(group) for group in groups])


def random_prompt(draw: random.Random, vocabulary: int) -> tuple[int, ...]:
    """PROMPT_TOKENS random tokens."""
    return tuple(draw.choices(range(300, vocabulary), k=PROMPT_TOKENS))


def prompts_of(table: pa.Table) -> list[tuple[int, ...]]:
    """The prompt of each row."""
    rows, lengths = (table.column(name).to_pylist() for name in ("token_ids", "prompt_length"))
    return [tuple(row[:n]) for row, n in zip(rows, lengths, strict=True)]
