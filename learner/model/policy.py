"""Policy: the frozen base model with its LoRA adapter, and the log-probabilities that it assigns to a micro-batch.

Knows models; knows neither rewards, losses nor optimizers. Suffixes: S stream, T completion tokens, H hidden, V
vocabulary.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from actors.models.families import family_of
from actors.models.lora import FlatLora, LoraArguments
from actors.types import Truncation
from learner.minibatches import MicroBatch
from learner.model.fused import fuse
from learner.model.linear_attention import pack_linear_attention
from learner.model.logprobs import EVERY_TOKEN, token_logprobs
from learner.model.lora_linear import FastLora
from learner.model.offload import Offload
from learner.model.supported import check_head
from learner.model.tiled import tile_mlps


class Tokens(NamedTuple):
    """Log-probability and entropy of each completion token (nats, float32 [T]), and the hidden states that predict them
    ([T, H]) if they were asked for."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    hidden_TH: torch.Tensor | None


class Policy:
    """`model` must have been loaded with the packed attention (learner.model.attention.NAME).

    `temperature` and `truncation` are the sampler's, so that log-probabilities are those of the distribution that was
    sampled from. The logits of `logit_chunk_tokens` tokens exist at a time, and with
    checkpointing the MLP activations of `tile_tokens`. `adapter_slots` are an engine's that has
    one copy of the adapter with the learner (FastLora). Raises ModelError for a head with a bias.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lora: LoraArguments,
        seed: int,
        temperature: float,
        truncation: Truncation = EVERY_TOKEN,
        logit_chunk_tokens: int,
        gradient_checkpointing: bool,
        offload_activations: bool = False,
        tile_tokens: int | None = None,
        fused_kernels: bool = True,
        adapter_slots: Sequence[torch.Tensor] | None = None,
    ) -> None:
        check_head(model)
        pack_linear_attention(model)
        if fused_kernels:
            fuse(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.lora = FlatLora(model, **lora, seed=seed)
        self._decoder = model.get_decoder()
        self._head_VH = model.get_output_embeddings().weight  # type: ignore[union-attr]
        self._transform = family_of(model.config).logits(model.config)
        self._temperature, self._truncation = temperature, truncation
        self._logit_chunk_tokens = logit_chunk_tokens
        self._offload = Offload() if offload_activations else None
        if gradient_checkpointing and tile_tokens is not None:
            tile_mlps(model, self.lora.flat, tile=tile_tokens)
        self._fast_lora = FastLora(self.lora, self._head_VH.dtype, adapter_slots)
        model.train(gradient_checkpointing)  # checkpointing is active in training mode only; there is no dropout

    @property
    def device(self) -> torch.device:
        return self.lora.flat.device

    @property
    def hidden_size(self) -> int:
        return self._head_VH.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations."""
        return self._head_VH.dtype

    def logprobs(self, batch: MicroBatch, *, entropy_requires_grad: bool = False, keep_hidden: bool = False) -> Tokens:
        """Log-probability and entropy of each completion token of `batch`, and with `keep_hidden` the hidden states.

        Gradients flow through the log-probabilities, and through the entropy with `entropy_requires_grad`.
        """
        self._fast_lora.cast_weights()
        layer_bytes = len(batch.input_ids_S) * self._head_VH.shape[1] * self._head_VH.element_size()
        with self._offload.saving(min_bytes=layer_bytes) if self._offload else contextlib.nullcontext():
            output = self._decoder(
                input_ids=batch.input_ids_S[None],
                position_ids=batch.positions_S[None],
                use_cache=False,
                packing=batch.packing,
            )
        hidden_TH = output.last_hidden_state[0].index_select(0, batch.hidden_index_T)
        logprobs_T, entropy_T = token_logprobs(
            hidden_TH,
            self._head_VH,
            batch.targets_T,
            temperature=self._temperature,
            chunk=self._logit_chunk_tokens,
            transform=self._transform,
            truncation=self._truncation,
            entropy_requires_grad=entropy_requires_grad,
        )
        return Tokens(logprobs_T, entropy_T, hidden_TH if keep_hidden else None)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within, the adapter is off, so that the policy is the reference policy, and no gradients are recorded."""
        with torch.no_grad(), self.lora.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def plain_distribution(self) -> Iterator[None]:
        """Within, log-probabilities are those of temperature 1 and of every token, however rollouts are sampled."""
        sampled_from = self._temperature, self._truncation
        self._temperature, self._truncation = 1.0, EVERY_TOKEN
        try:
            yield
        finally:
            self._temperature, self._truncation = sampled_from
