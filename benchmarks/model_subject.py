"""What benchmarks.models compares: an engine and a policy over one copy of a model's weights, and plain models of them.

Knows engines and policies; compares nothing.
"""

from dataclasses import dataclass

import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import PreTrainedModel

from actors.engines.base import Engine, EngineOptions
from actors.engines.registry import ENGINES, choose_engine
from actors.models.families import family_of
from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, LoraArguments, adapter_layout, lora_arguments_of
from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from actors.models.weight_sharing import (
    BaseWeights,
    Nf4Weight,
    SharesWeights,
    SharingImpossible,
    build_meta_model,
    named_base_weights,
    share_weights,
)
from actors.types import Adapter, Truncation
from benchmarks.common import ON_GPU
from learner.model.attention import NAME
from learner.model.logprobs import EVERY_TOKEN
from learner.model.policy import Policy
from learner.model.supported import check_attention, check_head

LONGEST_PROMPT = 70  # fills blocks of the prefix cache


@dataclass(frozen=True)
class Subject:
    """What is compared: an engine, a policy, and the model that plain passes are made of. `weights` says whether engine
    and policy share one copy, or why not."""

    source: ModelSource
    engine_name: str
    engine: Engine
    policy: Policy
    lora: LoraArguments
    weights: str

    def plain(self, dtype: torch.dtype, adapter: Adapter) -> FlatLora:
        """transformers' and PEFT's own model over the policy's weights, in `dtype`."""
        name = str(dtype).removeprefix("torch.")
        meta_model = build_meta_model(self.source, dtype=name, trust_remote_code=False)
        weights: BaseWeights = named_base_weights(self.policy.lora.model)
        if dtype == torch.float32:
            weights = {name: unpacked(weight).float() for name, weight in weights.items()}
        lora = FlatLora(share_weights(meta_model, weights, device=str(self.policy.device)), **self.lora, seed=0)
        lora.load(adapter)
        return lora


def unpacked(weight: torch.Tensor | Nf4Weight) -> torch.Tensor:
    """A plain weight as it is, one in 4 bits in 16."""
    return dequantize_4bit(weight.packed, weight.state) if isinstance(weight, Nf4Weight) else weight


def make_subject(
    source: ModelSource, options: EngineOptions, *, engine_name: str, truncation: Truncation = EVERY_TOKEN
) -> Subject:
    """Build an engine as `options` say and a policy, over one copy of the weights if that is possible.

    Raises EngineUnavailable if no engine of this name serves the model ("auto": the one that a run would take).
    """
    meta_model = build_meta_model(source, dtype=options.dtype, trust_remote_code=False, attention=NAME)
    check_attention(meta_model, longest=options.max_model_len)
    check_head(meta_model)
    family = family_of(meta_model.config)
    engine_name, _ = choose_engine(
        engine_name, device=options.device, quantization=options.quantization, family=family, tensor_parallel_size=1
    )
    lora: LoraArguments = {"rank": 8, "alpha": 16.0, "target_modules": family.targets}
    layout = adapter_layout(meta_model, **lora)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    # Without an end of sequence every answer has its full length.
    engine = ENGINES[engine_name].build(options, tokenizer, layout=layout, eos_token_ids=())
    model, origin = _learner_model(source, options, engine, meta_model)
    policy = Policy(
        model,
        lora=lora_arguments_of(layout),
        seed=0,
        temperature=1.0,
        truncation=truncation,
        logit_chunk_tokens=64,
        gradient_checkpointing=False,
    )
    return Subject(source, engine_name, engine, policy, lora, origin)


def _learner_model(
    source: ModelSource, options: EngineOptions, engine: Engine, meta_model: PreTrainedModel
) -> tuple[PreTrainedModel, str]:
    try:
        # The simple engine's own forward pass cannot share a model with the learner's adapter.
        if not isinstance(engine, SharesWeights) or not options.share_weights:
            raise SharingImpossible("not asked for")
        weights: BaseWeights = engine.base_weights()
        return share_weights(meta_model, weights, device=options.device), "shared"
    except SharingImpossible as reason:
        model = load_base_model(
            source,
            dtype=options.dtype,
            device=options.device,
            quantization=options.quantization,
            trust_remote_code=False,
            attention=NAME,
        )
        return model, str(reason)


def engine_options(
    path: str, *, answer_tokens: int, quantization: str = "none", enforce_eager: bool = True
) -> EngineOptions:
    """Options of an engine for this comparison on this machine."""
    return EngineOptions(
        model_path=path,
        revision=None,
        trust_remote_code=False,
        dtype="bfloat16" if ON_GPU else "float32",
        quantization=quantization,
        device="cuda" if ON_GPU else "cpu",
        threads=torch.get_num_threads(),
        max_model_len=answer_tokens + 2 * LONGEST_PROMPT,
        max_num_seqs=8,
        max_num_batched_tokens=4096,
        kv_cache_bytes=(1 << 30) if ON_GPU else (128 << 20),
        enforce_eager=enforce_eager,
        per_request_seeds=True,
        seed=0,
        share_weights=True,
    )
