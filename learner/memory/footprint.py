"""What each part of a run takes on the card, in bytes: arithmetic over the model's shape and one way to run.

Knows neither engines nor devices nor settings. Figures beside constants were measured on one H200 with vLLM 0.25.1 and
torch 2.11 (benchmarks.memory).
"""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from actors.models.families import family_of

GIB = 2**30
VALUE_BYTES = 2  # of a 16-bit number
BLOCK_TOKENS = 32  # by which a sequence's cache is rounded up, at most
# What the driver counts and torch does not: CUDA context, libraries and graphs, and their growth with the batch (GiB).
OUTSIDE_TORCH, OUTSIDE_PER_SEQUENCE = 0.86, 0.0014
# What vLLM keeps whether it samples or not: token counts of each sequence, logits for a sampler with top-k, and the
# workspaces of cuBLAS.
TOP_K_ROWS, WORKSPACES = 128, 4 * 33 * 2**20
RESERVE = 0.03  # of the budget: fragments between blocks
ROLES = frozenset({"rollout", "learner"})  # what one process may do


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs of a model. Sizes count elements; nf4 packs `linear` and leaves `other` as it is.

    `carried` are the float32 values per token that a layer of linear attention keeps for backward.
    """

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
    has_softcap: bool = False
    carried: int = 0

    @classmethod
    def of(cls, model: PreTrainedModel, lora_size: int, kept: frozenset[str] = frozenset()) -> "ModelShape":
        """The shape of a transformers model, whose parameters may be on the meta device. nf4 leaves the layers
        `kept`.
        """
        config = model.config.get_text_config()
        head = _widest(config, "head_dim") or config.hidden_size // config.num_attention_heads
        packed = [
            module.weight.numel()
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings() and name not in kept
        ]
        everything = sum(parameter.numel() for parameter in model.parameters())
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=_intermediate(config),
            queries=config.num_attention_heads * head,
            keys=(_widest(config, "num_key_value_heads") or config.num_attention_heads) * head,
            vocabulary=config.vocab_size,
            linear=sum(packed),
            largest_linear=max(packed, default=0),
            other=everything - sum(packed),
            lora=lora_size,
            has_softcap=family_of(model.config).logits(model.config).softcap is not None,
            carried=_carried(config) if family_of(model.config).has_linear_attention else 0,
        )

    def shard(self, devices: int) -> "ModelShape":
        """What each of several devices holds under tensor parallelism.

        Key-value heads that are repeated because there are more devices than heads are left out.
        """

        def part(size: int) -> int:
            return -(-size // devices)

        return replace(
            self,
            intermediate=part(self.intermediate),
            queries=part(self.queries),
            keys=part(self.keys),
            linear=part(self.linear),
            largest_linear=part(self.largest_linear),
            other=part(self.other),
        )

    def weights(self, quantization: str) -> int:
        """Bytes of the base. nf4: half a byte for each value and a float32 scale for 64 of them."""
        linear = self.linear / 2 + self.linear / 16 if quantization == "nf4" else VALUE_BYTES * self.linear
        return int(linear) + VALUE_BYTES * self.other

    def kv_cache(self, sequences: int, longest: int, *, value_bytes: int = VALUE_BYTES) -> int:
        """Bytes of keys and values for `sequences` of `longest` tokens, each rounded up, and for vLLM's own block."""
        return 2 * self.layers * self.keys * value_bytes * (sequences + 1) * (longest + BLOCK_TOKENS)

    @property
    def saved_per_layer(self) -> int:
        """Bytes per token that one layer keeps for backward: norms and residuals, attention, SwiGLU."""
        plain = VALUE_BYTES * (4 * self.hidden + 3 * self.queries + 4 * self.keys + 3 * self.intermediate)
        return plain + 4 * self.carried

    @property
    def working(self) -> int:
        """Bytes per token that one layer's backward needs beyond what was saved."""
        return VALUE_BYTES * (4 * self.hidden + 3 * self.intermediate) + 4 * self.carried


def _widest(config: PreTrainedConfig, name: str) -> int | None:
    """A size that may differ between layers, of the layer that has most."""
    # transformers refuses to read it from the configuration of the whole model then.
    layers = getattr(config, "per_layer_config", None)
    if layers is None:
        return getattr(config, name, None)
    sizes = [getattr(layers[i], name, None) for i in range(config.num_hidden_layers)]
    return max(filter(None, sizes), default=None)


def _carried(config: PreTrainedConfig) -> int:
    """Per token: ten tensors of the heads' size, three of the pairs in a chunk of 64 tokens, and the convolution's."""
    heads, keys, values = (
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    convolved = 2 * config.linear_num_key_heads * keys + heads * values
    return heads * (10 * max(keys, values) + 3 * 64) + 2 * convolved


def _intermediate(config: PreTrainedConfig) -> int:
    """The width of the MLP, of all experts that one token uses."""
    experts = getattr(config, "num_experts_per_tok", None)
    if not experts:
        # Of Gemma 4, the layers without keys of their own may be wider.
        return config.intermediate_size * (2 if getattr(config, "use_double_wide_mlp", False) else 1)
    return experts * (getattr(config, "moe_intermediate_size", None) or config.intermediate_size)


@dataclass(frozen=True)
class Workload:
    """What memory depends on besides the model: the size of a batch, and how it is trained."""

    prompts_per_step: int
    group_size: int
    max_prompt_tokens: int
    max_tokens: int
    max_staleness: int
    quantization: str
    optimizer: str
    kv_cache_dtype: str
    has_critic: bool
    has_entropy_bonus: bool

    @property
    def longest(self) -> int:
        """Tokens of a sequence at full length."""
        return self.max_prompt_tokens + self.max_tokens

    @property
    def batch_tokens(self) -> int:
        """Tokens of a batch at full length, in which a group's prompt comes once."""
        return self.prompts_per_step * (self.max_prompt_tokens + self.group_size * self.max_tokens)


@dataclass(frozen=True)
class Way:
    """One way to run: what the engine and the learner may use at a time."""

    max_num_seqs: int
    max_num_batched_tokens: int
    kv_cache_bytes: int
    sleep_mode: bool
    micro_batch_tokens: int
    logit_chunk_tokens: int
    gradient_checkpointing: bool
    offload_activations: bool


@dataclass(frozen=True)
class Process:
    """Which part of a run a process has: its `roles`, whether one copy of the base serves both, and its budget
    (bytes).
    """

    budget: int
    shared: bool
    roles: frozenset[str] = ROLES


def footprint(way: Way, workload: Workload, shape: ModelShape, process: Process) -> dict[str, int]:
    """Bytes of each part of a process that runs `workload` in this `way`."""
    roles, shared = process.roles, process.shared or process.roles != ROLES
    weights = shape.weights(workload.quantization)
    moments = 2 if workload.optimizer == "adamw8bit" else 8
    # The learner holds float32 weights, gradient, moments and a 16-bit cast; the engine its slot and a staging copy.
    lora = shape.lora * (
        (4 + 4 + moments + VALUE_BYTES) * ("learner" in roles) + 2 * VALUE_BYTES * ("rollout" in roles)
    )
    unpacked = 2 * VALUE_BYTES * shape.largest_linear if workload.quantization == "nf4" else 0
    learning = _learning(way, workload, shape) + unpacked if "learner" in roles else 0
    cache = sampling = buffers = 0
    if "rollout" in roles:
        cache = way.kv_cache_bytes
        prefill = way.max_num_batched_tokens * VALUE_BYTES * (4 * shape.hidden + 4 * shape.intermediate) + unpacked
        sampling = prefill + way.max_num_seqs * shape.vocabulary * (VALUE_BYTES + 4 + 4)
        buffers = (way.max_num_seqs + TOP_K_ROWS) * shape.vocabulary * 4 + WORKSPACES
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
        "CUDA context and graphs": int((OUTSIDE_TORCH + OUTSIDE_PER_SEQUENCE * way.max_num_seqs) * GIB),
        "reserve": int(RESERVE * process.budget),
    }


def _learning(way: Way, workload: Workload, shape: ModelShape) -> int:
    """Bytes of activations and logits while the learner works."""
    tokens = max(min(way.micro_batch_tokens, workload.batch_tokens), workload.longest)
    if way.offload_activations:
        saved = 3 * VALUE_BYTES * shape.hidden + shape.saved_per_layer
    elif way.gradient_checkpointing:
        saved = shape.layers * VALUE_BYTES * shape.hidden + shape.saved_per_layer
    else:
        saved = shape.layers * shape.saved_per_layer
    activations = tokens * (saved + shape.working + 6 * VALUE_BYTES * shape.hidden)
    logits = way.logit_chunk_tokens * shape.vocabulary * VALUE_BYTES
    if shape.has_softcap:
        logits *= 2  # and their derivatives
    if workload.has_critic:
        activations += tokens * 3 * 4 * shape.hidden  # the value head's features, in float32
    if workload.has_entropy_bonus:
        activations += tokens * VALUE_BYTES * shape.hidden  # the gradient of the entropy
        logits *= 4  # and what it is computed from
    return activations + logits
