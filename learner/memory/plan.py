"""The memory plan: the fastest way to run that fits on the card, decided before anything is loaded.

Pure arithmetic (footprint.py) over a list of ways in the order of their speed. Knows neither engines nor devices nor
settings.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from learner.memory.footprint import GIB, VALUE_BYTES, ModelShape, Process, Way, Workload, footprint

MAX_SEQUENCES = 512
MICRO_BATCHES = (49152, 24576, 16384, 8192, 4096, 2048, 1024)
# Without a GPU, where no card limits them.
CPU_SEQUENCES, CPU_MICRO_BATCH, CPU_LOGIT_CHUNK = 64, 8192, 1024


@dataclass(frozen=True)
class Asked:
    """What the user has fixed of a Way. None: the plan decides."""

    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    kv_cache_bytes: int | None = None
    sleep_mode: bool | None = None
    micro_batch_tokens: int | None = None
    logit_chunk_tokens: int | None = None
    gradient_checkpointing: bool | None = None
    offload_activations: bool | None = None

    def fix(self, way: Way) -> Way:
        """`way` with what was asked."""
        return replace(way, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class MemoryPlan:
    """A way to run and the bytes of its `parts`, which add up to `total`."""

    way: Way
    parts: dict[str, int]
    budget: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocator_bytes(self) -> int:
        """What torch's allocator may take so that the process stays within the budget."""
        return self.budget - self.parts["CUDA context and graphs"]

    def lines(self) -> list[str]:
        """The plan as a table."""
        way = self.way
        activations = "all"
        if way.offload_activations:
            activations = "offloaded checkpoints"
        elif way.gradient_checkpointing:
            activations = "checkpoints"
        return [
            f"memory plan: {self.total / GIB:.2f} of {self.budget / GIB:.2f} GiB",
            *(f"  {name:<34}{size / GIB:6.2f} GiB" for name, size in self.parts.items()),
            f"  {way.max_num_seqs} sequences at a time, {way.max_num_batched_tokens} batched tokens"
            f"{', the engine sleeps while the learner works' if way.sleep_mode else ''}; learner: "
            f"{way.micro_batch_tokens} tokens per micro-batch, activations: {activations}, "
            f"{way.logit_chunk_tokens} tokens of logits",
        ]


def plan_without_gpu(asked: Asked, workload: Workload, shape: ModelShape, *, value_bytes: int) -> Way:
    """The way to run where no card limits it; the cache's values have `value_bytes` bytes each."""
    way = asked.fix(
        Way(
            max_num_seqs=CPU_SEQUENCES,
            # Whole prompts: vLLM's CPU build cannot split a seeded request.
            max_num_batched_tokens=max(4096, workload.longest),
            kv_cache_bytes=0,
            sleep_mode=False,
            micro_batch_tokens=CPU_MICRO_BATCH,
            logit_chunk_tokens=CPU_LOGIT_CHUNK,
            gradient_checkpointing=False,
            offload_activations=False,
        )
    )
    return with_cache(way, asked, workload, shape, value_bytes=value_bytes)


def with_cache(way: Way, asked: Asked, workload: Workload, shape: ModelShape, *, value_bytes: int = VALUE_BYTES) -> Way:
    """`way` with a cache that holds all its sequences at full length, unless the user fixed its size."""
    if asked.kv_cache_bytes is not None:
        return way
    value_bytes = 1 if workload.kv_cache_dtype.startswith("fp8") else value_bytes
    return replace(way, kv_cache_bytes=shape.kv_cache(way.max_num_seqs, workload.longest, value_bytes=value_bytes))


def first_that_fits(
    asked: Asked, workload: Workload, shape: ModelShape, process: Process
) -> tuple[MemoryPlan | None, MemoryPlan]:
    """The first way within the budget, or None; and the way that takes least."""
    smallest: MemoryPlan | None = None
    for way in ways(asked, workload, shape, process.budget):
        plan = MemoryPlan(way, footprint(way, workload, shape, process), process.budget)
        if plan.total <= process.budget:
            return plan, plan
        if smallest is None or plan.total < smallest.total:
            smallest = plan
    assert smallest is not None  # `ways` yields one at least
    return None, smallest


def ways(asked: Asked, workload: Workload, shape: ModelShape, budget: int) -> Iterator[Way]:
    """All ways in the order of their speed: full concurrency first; for each, the one that recomputes least."""
    batch = workload.prompts_per_step * workload.group_size * (1 + workload.max_staleness)
    most_sequences = min(MAX_SEQUENCES, batch)
    chunk = 2 ** math.floor(math.log2(max(128, min(4096, 0.04 * budget / (VALUE_BYTES * shape.vocabulary)))))
    # Eighths of them down to the half, and so on: 128, 112, 96, 80, 64, 56, ...
    halves = [most_sequences >> i for i in range(most_sequences.bit_length())]
    sequences = sorted({max(1, half * eighths // 8) for half in halves for eighths in range(5, 9)}, reverse=True)
    # Checkpointing, offloading, sleeping. With staleness, sequences are in flight while the learner works.
    measures = [(False, False, False), (True, False, False), (False, False, True)]
    measures += [(True, False, True), (True, True, False), (True, True, True)]
    if workload.max_staleness:
        measures = [(checkpointing, offload, sleep) for checkpointing, offload, sleep in measures if not sleep]
    for max_num_seqs, (checkpointing, offload, sleep) in itertools.product(sequences, measures):
        for tokens in _micro_batches(workload, checkpointing=checkpointing, offload=offload):
            way = Way(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(2048, max_num_seqs),
                kv_cache_bytes=0,
                sleep_mode=sleep,
                micro_batch_tokens=tokens,
                logit_chunk_tokens=chunk,
                gradient_checkpointing=checkpointing,
                offload_activations=offload,
            )
            yield with_cache(asked.fix(way), asked, workload, shape)


def _micro_batches(workload: Workload, *, checkpointing: bool, offload: bool) -> Iterator[int]:
    """Sizes of micro-batches that make sense, the largest first. One that holds the longest sequence always does."""
    longest, batch_tokens = workload.longest, workload.batch_tokens
    for tokens in MICRO_BATCHES if longest < 2 * MICRO_BATCHES[0] else (longest,):
        is_larger_than_the_batch = tokens >= 2 * batch_tokens and tokens != MICRO_BATCHES[-1]
        is_shorter_than_a_sequence = tokens < longest and tokens * 2 <= longest
        # Small micro-batches are bound by launches: recomputing is faster than cutting the batch that fine.
        is_too_fine = not offload and tokens < min(4096 if checkpointing else 8192, batch_tokens)
        if not (is_larger_than_the_batch or is_shorter_than_a_sequence or is_too_fine):
            yield tokens
