"""The memory plan: the fastest way to run that fits on the card, decided before anything is loaded.

Pure arithmetic (footprint.py) over a list of ways in the order of their speed. Knows neither engines nor devices nor
settings.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

from learner.memory.footprint import GIB, Process, Way, Workload, footprint, host_footprint
from learner.memory.shape import VALUE_BYTES, ModelShape

MAX_SEQUENCES = 512
MICRO_BATCHES = (49152, 24576, 16384, 8192, 4096, 2048, 1024)
# Tokens of a tile: the fewer, the more often the weights of an MLP are read, and unpacked if they are in nf4.
TILE, SMALL_TILE, NO_TILE = 4096, 1024, 2**30
# Without a GPU, where no card limits them.
CPU_SEQUENCES, CPU_MICRO_BATCH, CPU_LOGIT_CHUNK = 64, 8192, 1024
ADAMW, ADAMW_8BIT = "adamw", "adamw8bit"


class Measures(NamedTuple):
    """What a way to run does to need less memory, without another result.

    `compact_base`: the scales of nf4 stay quantized, and the embedding, if it is not the head, lies in the host's
    memory.
    """

    gradient_checkpointing: bool = False
    compact_base: bool = False
    sleep_mode: bool = False
    offload_activations: bool = False


# In the order of the time that they cost.
MEASURES = (
    Measures(),
    Measures(gradient_checkpointing=True),
    Measures(gradient_checkpointing=True, compact_base=True),
    Measures(sleep_mode=True),
    Measures(gradient_checkpointing=True, sleep_mode=True),
    Measures(gradient_checkpointing=True, compact_base=True, sleep_mode=True),
    Measures(gradient_checkpointing=True, compact_base=True, offload_activations=True),
    Measures(gradient_checkpointing=True, compact_base=True, sleep_mode=True, offload_activations=True),
)


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
    embedding_on_host: bool | None = None
    quantized_scales: bool | None = None
    optimizer: str | None = None

    def fix(self, way: Way) -> Way:
        """`way` with what was asked."""
        return replace(way, **{name: value for name, value in asdict(self).items() if value is not None})


@dataclass(frozen=True)
class MemoryPlan:
    """A way to run and the bytes of its `parts` on the card, which add up to `total`, and those `on_host`."""

    way: Way
    parts: dict[str, int]
    budget: int
    on_host: int

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
            *([f"  {'in the memory of the host':<34}{self.on_host / GIB:6.2f} GiB"] if self.on_host else []),
            f"  {way.max_num_seqs} sequences at a time"
            f"{f' ({way.full_length_seqs} at full length)' if way.full_length_seqs < way.max_num_seqs else ''}, "
            f"{way.max_num_batched_tokens} batched tokens"
            f"{', the engine sleeps while the learner works' if way.sleep_mode else ''}; learner: "
            f"{way.micro_batch_tokens} tokens per micro-batch, activations: {activations}, "
            f"{way.logit_chunk_tokens} tokens of logits"
            f"{', embedding in the memory of the host' if way.embedding_on_host else ''}"
            f"{', scales of nf4 quantized' if way.quantized_scales else ''}"
            f"{', moments in 8 bits' if way.optimizer == ADAMW_8BIT else ''}",
        ]


def plan_without_gpu(asked: Asked, workload: Workload, shape: ModelShape, *, value_bytes: int) -> Way:
    """The way to run where no card limits it; the cache's values have `value_bytes` bytes each."""
    way = asked.fix(
        Way(
            max_num_seqs=CPU_SEQUENCES,
            # Whole prompts: vLLM's CPU build cannot split a seeded request.
            max_num_batched_tokens=max(4096, workload.longest),
            full_length_seqs=asked.max_num_seqs or CPU_SEQUENCES,
            kv_cache_bytes=0,
            sleep_mode=False,
            micro_batch_tokens=CPU_MICRO_BATCH,
            logit_chunk_tokens=CPU_LOGIT_CHUNK,
            tile_tokens=TILE,
            gradient_checkpointing=False,
            offload_activations=False,
            embedding_on_host=False,
            quantized_scales=False,
            optimizer=ADAMW,
        )
    )
    return with_cache(way, asked, workload, shape, value_bytes=value_bytes)


def with_cache(way: Way, asked: Asked, workload: Workload, shape: ModelShape, *, value_bytes: int = VALUE_BYTES) -> Way:
    """`way` with a cache for its `full_length_seqs`, or with as many as fit into the cache that the user asked for."""
    value_bytes = 1 if workload.kv_cache_dtype.startswith("fp8") else value_bytes
    if asked.kv_cache_bytes is None:
        needed = shape.kv_cache(way.full_length_seqs, workload.longest, value_bytes=value_bytes)
        return replace(way, kv_cache_bytes=needed)
    none, one = (shape.kv_cache(count, workload.longest, value_bytes=value_bytes) for count in (0, 1))
    at_full_length = max(0, asked.kv_cache_bytes - none) // (one - none)
    return replace(way, full_length_seqs=min(way.max_num_seqs, at_full_length))


def first_that_fits(
    asked: Asked, workload: Workload, shape: ModelShape, process: Process
) -> tuple[MemoryPlan | None, MemoryPlan]:
    """The first way within the budgets, or None; and the way that takes least of the card."""
    smallest: MemoryPlan | None = None
    for way in ways(asked, workload, shape, process.budget):
        parts = footprint(way, workload, shape, process)
        plan = MemoryPlan(way, parts, process.budget, host_footprint(way, workload, shape, process))
        if plan.total <= process.budget and (process.host_budget is None or plan.on_host <= process.host_budget):
            return plan, plan
        if smallest is None or plan.total < smallest.total:
            smallest = plan
    assert smallest is not None  # `ways` yields one at least
    return None, smallest


def ways(asked: Asked, workload: Workload, shape: ModelShape, budget: int) -> Iterator[Way]:
    """All ways in the order of their speed: full concurrency first; for each, the one that recomputes least."""
    chunk = 2 ** math.floor(math.log2(max(128, min(4096, 0.04 * budget / (VALUE_BYTES * shape.vocabulary)))))
    # With staleness, sequences are in flight while the learner works.
    measures = [m for m in MEASURES if not (m.sleep_mode and workload.max_staleness)]
    # What is offloaded are checkpoints.
    if asked.offload_activations:
        measures = [m for m in measures if m.gradient_checkpointing]
    if asked.gradient_checkpointing is False:
        measures = [m for m in measures if not m.offload_activations]
    for (max_num_seqs, full_length, optimizer), m in itertools.product(_sequences(asked, workload), measures):
        for tokens in _micro_batches(workload, checkpointing=m.gradient_checkpointing, offload=m.offload_activations):
            way = Way(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(2048, max_num_seqs),
                full_length_seqs=full_length,
                kv_cache_bytes=0,
                micro_batch_tokens=tokens,
                logit_chunk_tokens=chunk,
                tile_tokens=_tile(m),
                gradient_checkpointing=m.gradient_checkpointing,
                sleep_mode=m.sleep_mode,
                offload_activations=m.offload_activations,
                embedding_on_host=m.compact_base and shape.embedding > 0,
                quantized_scales=m.compact_base and workload.quantization == "nf4",
                optimizer=optimizer,
            )
            yield with_cache(asked.fix(way), asked, workload, shape)


def _tile(measures: Measures) -> int:
    if not measures.gradient_checkpointing:
        return NO_TILE
    return SMALL_TILE if measures.offload_activations else TILE


def _sequences(asked: Asked, workload: Workload) -> Iterator[tuple[int, int, str]]:
    """How many sequences run at a time, how many of them the cache holds at full length, and the optimizer.

    Rather than fewer than half of the sequences, the optimizer's moments get 8 bits, if the user leaves it open.
    """
    batch = workload.prompts_per_step * workload.group_size * (1 + workload.max_staleness)
    most = asked.max_num_seqs or min(MAX_SEQUENCES, batch)
    # Eighths of them down to the half, and so on: 128, 112, 96, 80, 64, 56, ...
    halves = [most >> i for i in range(most.bit_length())]
    counts = sorted({max(1, half * eighths // 8) for half in halves for eighths in range(5, 9)}, reverse=True)
    at_a_time = {count: asked.max_num_seqs or min(half for half in halves if half >= count) for count in counts}
    yield from ((at_a_time[n], n, ADAMW) for n in counts if asked.optimizer == ADAMW or 2 * n >= most)
    if asked.optimizer != ADAMW:
        yield from ((at_a_time[n], n, ADAMW_8BIT) for n in counts)


def _micro_batches(workload: Workload, *, checkpointing: bool, offload: bool) -> Iterator[int]:
    """Sizes of micro-batches that make sense, the largest first. One that holds the longest unit always does."""
    longest, batch_tokens = workload.longest_unit, workload.batch_tokens
    for tokens in MICRO_BATCHES if longest < 2 * MICRO_BATCHES[0] else (longest,):
        is_larger_than_the_batch = tokens >= 2 * batch_tokens and tokens != MICRO_BATCHES[-1]
        is_shorter_than_a_unit = tokens < longest and tokens * 2 <= longest
        # Small micro-batches are bound by launches: recomputing is faster than cutting the batch that fine.
        is_too_fine = not offload and tokens < min(4096 if checkpointing else 8192, batch_tokens)
        if not (is_larger_than_the_batch or is_shorter_than_a_unit or is_too_fine):
            yield tokens
