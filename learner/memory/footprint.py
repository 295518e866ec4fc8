"""What each part of a run takes on the card and of the host's memory, in bytes: arithmetic over the model's shape and
one way to run.

Knows neither engines nor devices nor settings. Figures beside constants were measured on one H200 with vLLM 0.25.1 and
torch 2.11 (benchmarks.memory).
"""

import math
from dataclasses import dataclass

from learner.memory.shape import VALUE_BYTES, ModelShape

GIB = 2**30
# What the driver counts and torch does not: CUDA context, libraries and graphs, and their growth with the batch (GiB).
OUTSIDE_TORCH, OUTSIDE_PER_SEQUENCE = 0.86, 0.0014
COMMUNICATION = 1.1  # NCCL's buffers, where learners meet (GiB)
# What vLLM keeps whether it samples or not: token counts of each sequence, logits for a sampler with top-k, and the
# workspaces of cuBLAS.
TOP_K_ROWS, WORKSPACES = 128, 4 * 33 * 2**20
RESERVE = 0.03  # of the budget: fragments between blocks
ROLES = frozenset({"rollout", "learner"})  # what one process may do
SLAB_BYTES = 2**26  # by which offloaded activations take memory of the host


@dataclass(frozen=True)
class Workload:
    """What memory depends on besides the model: the size of a batch, and how it is trained.

    `answers_per_unit` must be in one micro-batch. The engine's copy of the adapter is `slot_ratio` times as large.
    """

    prompts_per_step: int
    group_size: int
    max_prompt_tokens: int
    max_tokens: int
    max_staleness: int
    quantization: str
    kv_cache_dtype: str
    answers_per_unit: int
    slot_ratio: float
    has_critic: bool
    has_entropy_bonus: bool

    @property
    def longest(self) -> int:
        """Tokens of a sequence at full length."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def longest_unit(self) -> int:
        """Tokens of the answers that must be in one micro-batch, at full length, with their prompt."""
        return self.max_prompt_tokens + self.answers_per_unit * self.max_tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at full length, in which a group's prompt comes once."""
        return self.prompts_per_step * (self.max_prompt_tokens + self.group_size * self.max_tokens)


@dataclass(frozen=True)
class Way:
    """One way to run: what the engine and the learner may use at a time, and what lies where.

    The cache of `kv_cache_bytes` holds `full_length_seqs` sequences at full length; if that is fewer than
    `max_num_seqs`, the engine lets some wait when they grow long. An MLP of a longer stream is computed `tile_tokens`
    at a time.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    full_length_seqs: int
    kv_cache_bytes: int
    sleep_mode: bool
    micro_batch_tokens: int
    logit_chunk_tokens: int
    tile_tokens: int
    gradient_checkpointing: bool
    offload_activations: bool
    embedding_on_host: bool
    quantized_scales: bool
    optimizer: str


@dataclass(frozen=True)
class Process:
    """Which part of a run a process has: its `roles`, whether one copy of the base serves both, and its budget of the
    card and of the host's memory (bytes; None: not known).

    `shares_adapter`: the learner computes with the engine's copy of the adapter, which no sequence needs meanwhile.
    `ranks`: the learners that exchange gradients, or layers.
    """

    budget: int
    shared: bool
    roles: frozenset[str] = ROLES
    shares_adapter: bool = False
    ranks: int = 1
    host_budget: int | None = None


def footprint(way: Way, workload: Workload, shape: ModelShape, process: Process) -> dict[str, int]:
    """Bytes of each part of a process that runs `workload` in this `way`."""
    roles, shared = process.roles, process.shared or process.roles != ROLES
    on_host = VALUE_BYTES * shape.embedding if way.embedding_on_host else 0
    # A learner that loads its own base has the scales of nf4 quantized.
    packed = way.quantized_scales or "rollout" not in roles
    weights = shape.weights(workload.quantization, quantized_scales=packed) - on_host
    moments = 2 if way.optimizer == "adamw8bit" else 8
    # The learner holds float32 weights, gradient and moments and a 16-bit copy to compute with, the engine its own.
    learned = 4 + 4 + moments + (0 if process.shares_adapter else VALUE_BYTES)
    slot = workload.slot_ratio * VALUE_BYTES
    lora = int(shape.lora * (learned * ("learner" in roles) + slot * ("rollout" in roles)))
    unpacked = 2 * VALUE_BYTES * shape.largest_linear if workload.quantization == "nf4" else 0
    learning = _learning(way, workload, shape) + unpacked if "learner" in roles else 0
    cache = sampling = buffers = 0
    if "rollout" in roles:
        cache = way.kv_cache_bytes
        prefill = way.max_num_batched_tokens * VALUE_BYTES * (4 * shape.hidden + 4 * shape.intermediate) + unpacked
        sampling = prefill + way.max_num_seqs * shape.vocabulary * (VALUE_BYTES + 4 + 4)
        buffers = (way.max_num_seqs + TOP_K_ROWS) * shape.vocabulary * 4 + WORKSPACES
    communication = COMMUNICATION if "learner" in roles and process.ranks > 1 else 0.0
    # Engine and learner take turns, and torch's allocator serves both.
    if way.sleep_mode:
        turns = {"activations and logits, or the cache": max(learning, cache + sampling)}
    else:
        turns = {"key-value cache": cache, "activations and logits": max(learning, sampling)}
    return {
        "base weights" + ("" if shared else " (two copies)"): weights if shared else 2 * weights,
        "adapter, gradient and optimizer": lora,
        **turns,
        "the engine's buffers": buffers,
        "CUDA context and graphs": int((OUTSIDE_TORCH + OUTSIDE_PER_SEQUENCE * way.max_num_seqs + communication) * GIB),
        "reserve": int(RESERVE * process.budget),
    }


def host_footprint(way: Way, workload: Workload, shape: ModelShape, process: Process) -> int:
    """Bytes of the host's memory, pinned, that a process needs beside what every process does."""
    embedding = 0
    if way.embedding_on_host:
        copies = 1 if process.shared or process.roles != ROLES else 2
        embedding = copies * _power_of_2(VALUE_BYTES * shape.embedding)  # so torch's allocator of the host rounds
    activations = 0
    if way.offload_activations and "learner" in process.roles:
        layer = VALUE_BYTES * shape.hidden * _stream_tokens(way, workload)
        # The inputs of all layers, and what the norm behind the last one saves, at most in float32.
        activations = (shape.layers + 4) * math.ceil(layer / SLAB_BYTES) * SLAB_BYTES
    return embedding + activations


def _power_of_2(size: int) -> int:
    """The smallest power of two that is at least `size`, or 0."""
    return 1 << (size - 1).bit_length() if size else 0


def _stream_tokens(way: Way, workload: Workload) -> int:
    """The most tokens that a micro-batch may have."""
    return max(min(way.micro_batch_tokens, workload.batch_tokens), workload.longest_unit)


def _learning(way: Way, workload: Workload, shape: ModelShape) -> int:
    """Bytes of activations and logits while the learner works."""
    tokens = _stream_tokens(way, workload)
    vector = tokens * VALUE_BYTES * shape.hidden  # of each token
    logits = way.logit_chunk_tokens * shape.vocabulary * VALUE_BYTES
    ends = 6 * vector  # hidden states behind the last layer, and gradients of them
    if shape.has_softcap:
        logits *= 2  # and their derivatives
    if workload.has_critic:
        ends += tokens * 3 * 4 * shape.hidden  # the value head's features, in float32
    if workload.has_entropy_bonus:
        ends += vector  # the gradient of the entropy
        logits *= 4  # and what it is computed from
    if not way.gradient_checkpointing:
        return shape.kept(tokens) + ends + logits
    checkpoints = (4 if way.offload_activations else shape.layers) * vector
    # Logits are there before the first layer's backward pass, beside which the gradient of hidden states remains.
    return checkpoints + max(ends + logits, vector + shape.recomputed(tokens, tile=way.tile_tokens))
