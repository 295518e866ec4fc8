"""The memory plan: what fits on the card is decided before anything is loaded.

`plan` counts what a run needs, part by part, and fills the settings that were left null so that the sum stays under
`hardware.vram_gib` (or what is free). Pure arithmetic over the model's shape: knows neither engines nor devices.
Figures beside constants were measured on one H200 with vLLM 0.25.1 and torch 2.11 (benchmarks.memory).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from conf.errors import UsageError
from conf.schema import Settings

GIB = 2**30
ENTRY = 2  # bytes of a 16-bit value
BLOCK = 32  # tokens by which a sequence's cache is rounded up, at most
# What the driver counts and torch does not: CUDA context, libraries and graphs, and their growth with the batch.
OUTSIDE_TORCH, OUTSIDE_PER_SEQUENCE = 0.86, 0.0014
# What vLLM keeps whether it samples or not: counts of tokens for each sequence, logits to cut, and the workspaces of cuBLAS.
LOGITS_TO_CUT, WORKSPACES = 128, 4 * 33 * 2**20
RESERVE = 0.03  # of the budget: fragments between blocks
MOST_SEQUENCES = 512
MICRO_BATCHES = (49152, 24576, 16384, 8192, 4096, 2048, 1024)
BOTH = frozenset({"rollout", "learner"})  # what one process may do
WITHOUT_GPU = {"max_num_seqs": 64, "micro_batch_tokens": 8192, "logit_chunk_tokens": 1024}


class MemoryPlanError(UsageError):
    """The run does not fit; the message says by how much, and which settings would make it fit."""


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs of a model. Sizes count elements; `linear` is what nf4 would pack, `other` what stays."""

    layers: int
    hidden: int
    intermediate: int
    queries: int
    keys: int
    vocabulary: int
    linear: int
    largest_linear: int
    other: int
    lora: int

    @classmethod
    def of(cls, model: Any, lora_size: int, kept: frozenset[str] = frozenset()) -> "ModelShape":
        """The shape of a transformers model, whose parameters may be on the meta device."""
        import torch

        c = model.config
        head = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        packed = [
            m.weight.numel()
            for name, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and m is not model.get_output_embeddings() and name not in kept
        ]
        everything = sum(p.numel() for p in model.parameters())
        return cls(
            layers=c.num_hidden_layers, hidden=c.hidden_size, intermediate=c.intermediate_size,
            queries=c.num_attention_heads * head, keys=(c.num_key_value_heads or c.num_attention_heads) * head,
            vocabulary=c.vocab_size, linear=sum(packed), largest_linear=max(packed, default=0),
            other=everything - sum(packed), lora=lora_size,
        )  # fmt: skip

    def spread(self, devices: int) -> "ModelShape":
        """What each of several devices has of it; where there are fewer keys' heads than devices, they are repeated, which this
        leaves out."""

        def part(size: int) -> int:
            return -(-size // devices)

        names = ("intermediate", "queries", "keys", "linear", "largest_linear", "other")
        return dataclasses.replace(self, **{name: part(getattr(self, name)) for name in names})

    def weights(self, quantization: str) -> int:
        """Bytes of the base. nf4: half a byte and one float32 scale for 64 values."""
        linear = self.linear / 2 + self.linear / 16 if quantization == "nf4" else ENTRY * self.linear
        return int(linear) + ENTRY * self.other

    def kv_cache(self, settings: Settings, *, entry: int = ENTRY) -> int:
        """Bytes of keys and values (`entry` bytes each, or one in fp8) for every sequence at full length, each rounded up
        to a block, and for the block that vLLM keeps."""
        e = settings.engine
        assert e.max_num_seqs is not None
        per_token = 2 * self.layers * self.keys * (1 if e.kv_cache_dtype.startswith("fp8") else entry)
        return per_token * (e.max_num_seqs + 1) * (_longest(settings) + BLOCK)

    @property
    def saved_per_layer(self) -> int:
        """Bytes a token that one layer keeps for backward: norms and residuals, attention, SwiGLU."""
        return ENTRY * (4 * self.hidden + 3 * self.queries + 4 * self.keys + 3 * self.intermediate)

    @property
    def working(self) -> int:
        """Bytes a token that one layer's backward holds beyond what was saved."""
        return ENTRY * (4 * self.hidden + 3 * self.intermediate)


@dataclass(frozen=True)
class Plan:
    """`settings` with every null that the plan decides filled in, and the `parts` (bytes) that add up to `total`."""

    settings: Settings
    parts: dict[str, int]
    budget: int
    shared: bool
    roles: frozenset[str] = BOTH

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def allocator_bytes(self) -> int:
        """What torch's allocator may take so that the process stays within the budget."""
        return self.budget - self.parts["CUDA context and graphs"]

    def lines(self) -> list[str]:
        """The plan as a table."""
        e, t = self.settings.engine, self.settings.learner
        kept = (
            "offloaded checkpoints" if t.offload_activations else "checkpoints" if t.gradient_checkpointing else "all"
        )
        head = f"memory plan: {self.total / GIB:.2f} of {self.budget / GIB:.2f} GiB"
        rows = [f"  {name:<34}{size / GIB:6.2f} GiB" for name, size in self.parts.items()]
        chosen = (
            f"  {e.max_num_seqs} sequences at a time, {e.max_num_batched_tokens} batched tokens"
            f"{', the cache lent to the learner' if e.release_cache else ''}; learner: {t.micro_batch_tokens} tokens a "
            f"micro-batch, activations: {kept}, {t.logit_chunk_tokens} tokens of logits"
        )
        return [head, *rows, chosen]


def without_gpu(settings: Settings, shape: ModelShape, *, entry: int) -> Settings:
    """The settings with the nulls filled where no card limits them; the cache's values have `entry` bytes."""
    settings = _filled(
        settings, max_num_seqs=WITHOUT_GPU["max_num_seqs"], max_num_batched_tokens=None,
        micro_batch_tokens=WITHOUT_GPU["micro_batch_tokens"], logit_chunk_tokens=WITHOUT_GPU["logit_chunk_tokens"],
        gradient_checkpointing=False, offload_activations=False, release_cache=False,
    )  # fmt: skip
    return _filled(settings, kv_cache_gib=shape.kv_cache(settings, entry=entry) / GIB)


def plan(settings: Settings, shape: ModelShape, *, budget: int, shared: bool, roles: frozenset[str] = BOTH) -> Plan:
    """The first way to run that fits `budget` bytes, of the ways in order of speed, for a process that samples, learns, or
    both. Raises MemoryPlanError."""
    smallest: Plan | None = None
    for candidate in _candidates(settings, shape, budget):
        found = Plan(candidate, _parts(candidate, shape, budget, shared=shared, roles=roles), budget, shared, roles)
        if found.total <= budget:
            return found
        if smallest is None or found.total < smallest.total:
            smallest = found
    assert smallest is not None
    raise MemoryPlanError(_refusal(settings, shape, smallest))


def _candidates(settings: Settings, shape: ModelShape, budget: int) -> Iterator[Settings]:
    """Full concurrency before a smaller one; for each, what keeps activations longest and packs most tokens."""
    a, length = settings.algorithm, _longest(settings)
    wanted = min(MOST_SEQUENCES, a.prompts_per_step * a.group_size * (1 + settings.runtime.max_staleness))
    batch_tokens = _batch(settings)
    chunk = 2 ** math.floor(math.log2(max(128, min(4096, 0.04 * budget / (ENTRY * shape.vocabulary)))))
    sequences = [max(1, wanted >> i) for i in range(wanted.bit_length())]
    # Checkpointing, offloading, lending the cache. With lag, sequences are under way while the learner works.
    ways = [(False, False, False), (True, False, False), (False, False, True), (True, False, True), (True, True, False),
            (True, True, True)]  # fmt: skip
    if settings.runtime.max_staleness:
        ways = [way for way in ways if not way[2]]
    for seqs, (checkpointing, offload, lends) in itertools.product(sequences, ways):
        # A micro-batch smaller than a sequence cannot be, and one that holds the longest is the least where that is long.
        for tokens in MICRO_BATCHES if length < 2 * MICRO_BATCHES[0] else (length,):
            # A micro-batch larger than the batch buys nothing.
            if tokens >= 2 * batch_tokens and tokens != MICRO_BATCHES[-1]:
                continue
            if tokens < length and tokens * 2 <= length:
                continue
            # Small micro-batches are bound by launches: rather recompute than cut the batch that fine.
            if not offload and tokens < min(8192 if not checkpointing else 4096, batch_tokens):
                continue
            found = _filled(
                settings, max_num_seqs=seqs, max_num_batched_tokens=max(2048, seqs), release_cache=lends,
                micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, offload_activations=offload,
                logit_chunk_tokens=chunk,
            )  # fmt: skip
            yield _filled(found, kv_cache_gib=shape.kv_cache(found) / GIB)


def _filled(settings: Settings, **values: Any) -> Settings:
    """`settings` with those of `values` that are null there."""

    def fill(section: Any) -> Any:
        names = {f.name for f in dataclasses.fields(section)} & values.keys()
        return dataclasses.replace(section, **{n: values[n] for n in names if getattr(section, n) is None})

    return dataclasses.replace(settings, engine=fill(settings.engine), learner=fill(settings.learner))


def _kv_bytes(settings: Settings) -> int:
    assert settings.engine.kv_cache_gib is not None
    return int(settings.engine.kv_cache_gib * GIB)


def _longest(settings: Settings) -> int:
    return settings.data.max_prompt_tokens + settings.sampling.max_tokens


def _batch(settings: Settings) -> int:
    """Tokens of a batch at full length, in which a group's prompt comes once."""
    a = settings.algorithm
    return a.prompts_per_step * (settings.data.max_prompt_tokens + a.group_size * settings.sampling.max_tokens)


def _parts(
    settings: Settings, shape: ModelShape, budget: int, *, shared: bool, roles: frozenset[str]
) -> dict[str, int]:
    e, t, model = settings.engine, settings.learner, settings.model
    assert e.max_num_seqs is not None and t.micro_batch_tokens is not None and t.logit_chunk_tokens is not None
    weights = shape.weights(model.quantization)
    moments = 2 if t.optimizer == "adamw8bit" else 8
    # The learner holds float32 weights, gradient, moments and a 16-bit cast; the engine its slot and a staging copy.
    lora = shape.lora * ((4 + 4 + moments + ENTRY) * ("learner" in roles) + 2 * ENTRY * ("rollout" in roles))
    shared |= roles != BOTH
    tokens = max(min(t.micro_batch_tokens, _batch(settings)), _longest(settings))
    if t.offload_activations:
        kept = 3 * ENTRY * shape.hidden + shape.saved_per_layer
    elif t.gradient_checkpointing:
        kept = shape.layers * ENTRY * shape.hidden + shape.saved_per_layer
    else:
        kept = shape.layers * shape.saved_per_layer
    unpacked = 2 * ENTRY * shape.largest_linear if model.quantization == "nf4" else 0
    learning = tokens * (kept + shape.working + 6 * ENTRY * shape.hidden) + unpacked
    logits = t.logit_chunk_tokens * shape.vocabulary * ENTRY
    if settings.algorithm.name == "ppo":
        learning += tokens * 3 * 4 * shape.hidden  # the value head's features, in float32
    if settings.algorithm.entropy_coefficient:
        learning += tokens * ENTRY * shape.hidden  # the entropy's direction
        logits *= 4  # and what it is made of
    prefill = (e.max_num_batched_tokens or 2048) * ENTRY * (4 * shape.hidden + 4 * shape.intermediate) + unpacked
    sampling = e.max_num_seqs * shape.vocabulary * (ENTRY + 4 + 4)
    buffers = (e.max_num_seqs + LOGITS_TO_CUT) * shape.vocabulary * 4 + WORKSPACES
    # The engine and the learner take turns, and torch's allocator serves both.
    kv, of_learner, of_engine = _kv_bytes(settings), learning + logits, prefill + sampling
    if "learner" not in roles:
        of_learner = 0
    if "rollout" not in roles:
        kv = of_engine = buffers = 0
    if e.release_cache:
        in_turns = {"activations and logits, or the cache": max(of_learner, kv + of_engine)}
    else:
        in_turns = {"key-value cache": kv, "activations and logits": max(of_learner, of_engine)}
    return {
        "base weights" + ("" if shared else " (two copies)"): weights if shared else 2 * weights,
        "adapter, gradient and optimizer": lora,
        **in_turns,
        "the engine's buffers": buffers,
        "CUDA context and graphs": int((OUTSIDE_TORCH + OUTSIDE_PER_SEQUENCE * e.max_num_seqs) * GIB),
        "reserve": int(RESERVE * budget),
    }


def _refusal(settings: Settings, shape: ModelShape, smallest: Plan) -> str:
    over = smallest.total - smallest.budget
    model, t = settings.model, settings.learner
    knobs = {
        "model.quantization=nf4": dataclasses.replace(settings, model=dataclasses.replace(model, quantization="nf4")),
        "learner.optimizer=adamw8bit": dataclasses.replace(settings, learner=dataclasses.replace(t, optimizer="adamw8bit")),
        "engine.kv_cache_dtype=fp8": dataclasses.replace(
            settings, engine=dataclasses.replace(settings.engine, kv_cache_dtype="fp8")
        ),
        f"sampling.max_tokens={settings.sampling.max_tokens // 2}": dataclasses.replace(
            settings, sampling=dataclasses.replace(settings.sampling, max_tokens=settings.sampling.max_tokens // 2)
        ),
        f"model.lora.rank={max(1, model.lora.rank // 2)}": settings,
    }  # fmt: skip
    lines = []
    for name, changed in knobs.items():
        smaller = dataclasses.replace(shape, lora=shape.lora // 2) if "rank" in name else shape
        least = min(
            sum(_parts(c, smaller, smallest.budget, shared=smallest.shared, roles=smallest.roles).values())
            for c in _candidates(changed, smaller, smallest.budget)
        )
        if least < smallest.total:
            fits = "fits" if least <= smallest.budget else "is not enough by itself"
            lines.append(f"  {name}: {least / GIB:.2f} GiB, {fits}")
    return "\n".join(
        [
            f"hardware.vram_gib: {smallest.budget / GIB:.2f} GiB cannot hold this run; the smallest way to run it takes "
            f"{smallest.total / GIB:.2f} GiB, {over / GIB:.2f} too much",
            *smallest.lines()[1:], "what would take less:", *lines, "  or a smaller model",
        ]
    )  # fmt: skip
