"""ModelShape: the sizes of a model that memory depends on, and what follows from them alone.

Knows models' configurations; knows neither engines nor how a run uses them.
"""

from dataclasses import dataclass, replace
from typing import cast

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from actors.models.families import family_of
from actors.models.nf4_scales import BLOCK, SCALE_BLOCK

VALUE_BYTES = 2  # of a 16-bit number
CACHE_BLOCK = 32  # tokens by which a sequence's cache is rounded up, at most


@dataclass(frozen=True)
class ModelShape:
    """What the plan needs of a model. Sizes count elements; nf4 packs `linear` and leaves `other` as it is.

    `scaled` says how many weights a process has the nf4 scales of, if not those of `linear`; `once_scaled` are those of
    them whose scales stay float32, because they do not fill the blocks of double quantization. `embedding` is the part
    of `other` that may lie in the host's memory: the embedding, if it is not the head, too. `carried` are the float32
    values per token that a layer of linear attention keeps for backward. `tiles_mlp`: the learner can compute the MLP
    of a long stream in tiles.
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
    scaled: int | None = None
    once_scaled: int = 0
    embedding: int = 0
    tiles_mlp: bool = True

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
        embedding = cast("torch.nn.Embedding", model.get_input_embeddings()).weight
        family = family_of(model.config)
        head_weight = getattr(model.get_output_embeddings(), "weight", None)
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
            has_softcap=family.logits(model.config).softcap is not None,
            carried=_carried(config) if family.has_linear_attention else 0,
            once_scaled=sum(size for size in packed if size % (BLOCK * SCALE_BLOCK)),
            embedding=0 if embedding is head_weight else embedding.numel(),
            tiles_mlp=not family.has_experts,
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
            once_scaled=part(self.once_scaled),
            embedding=part(self.embedding),
        )

    def shard_layers(self, shards: int) -> "ModelShape":
        """What one of several learners holds of a base that is split among them: its part of the linear layers, two
        whole layers while it computes, and the scales of all.
        """

        if shards == 1:
            return self
        two_layers = 2 * -(-self.linear // self.layers)
        return replace(self, linear=-(-self.linear // shards) + two_layers, scaled=self.linear)

    def weights(self, quantization: str, *, quantized_scales: bool = True) -> int:
        """Bytes of the base. nf4: half a byte for each value, and a float32 scale for 64 of them; or, if scales are
        quantized where they can be, a byte for each and two float32 numbers for 256.
        """
        linear: float = VALUE_BYTES * self.linear
        if quantization == "nf4":
            scaled = self.linear if self.scaled is None else self.scaled
            twice_scaled = scaled - self.once_scaled if quantized_scales else 0
            linear = self.linear / 2 + twice_scaled / BLOCK * (1 + 8 / SCALE_BLOCK)
            linear += 4 * (scaled - twice_scaled) / BLOCK
        return int(linear) + VALUE_BYTES * self.other

    def kv_cache(self, sequences: int, longest: int, *, value_bytes: int = VALUE_BYTES) -> int:
        """Bytes of keys and values for `sequences` of `longest` tokens, each rounded up, and for vLLM's own block."""
        tokens = sequences * (longest + CACHE_BLOCK) + 2 * CACHE_BLOCK
        return 2 * self.layers * self.keys * value_bytes * tokens

    def kept(self, tokens: int) -> int:
        """Bytes of the activations of all layers over `tokens` tokens, and of one layer's backward pass beside them."""
        norms_and_attention = 4 * self.hidden + 3 * self.queries + 4 * self.keys
        saved = VALUE_BYTES * (norms_and_attention + 3 * self.intermediate) + 4 * self.carried
        working = VALUE_BYTES * (4 * self.hidden + 3 * self.intermediate) + 4 * self.carried
        return tokens * (self.layers * saved + working)

    def recomputed(self, tokens: int, *, tile: int) -> int:
        """Bytes of one layer over `tokens` tokens that is computed again: what it saves then, and its backward pass, in
        which attention and MLP take turns; the MLP computes `tile` tokens at a time.
        """
        # Inputs of the three norms and projections; queries and keys as they are multiplied, and the result.
        saved = VALUE_BYTES * (3 * self.hidden + 2 * self.queries + 2 * self.keys) + 4 * self.carried
        attention = VALUE_BYTES * (2 * self.hidden + 4 * self.queries + 2 * self.keys) + 4 * self.carried
        in_tile = min(tokens, tile) if self.tiles_mlp else tokens
        mlp = VALUE_BYTES * (3 * self.hidden * tokens + 6 * self.intermediate * in_tile)
        return tokens * saved + max(tokens * attention, mlp)


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
