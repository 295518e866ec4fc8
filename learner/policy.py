"""Policy: the frozen base model with its LoRA adapter, and the log-probabilities that it gives to a micro-batch.

Knows models; knows neither rewards, objectives nor optimizers.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from actors.lora import FlatLora
from actors.models import ModelError
from learner.batch import MicroBatch
from learner.fused import fuse
from learner.logprobs import token_logprobs
from learner.lora_linear import FastLora
from learner.offload import Offload

UNSUPPORTED = ("final_logit_softcapping", "logits_scaling", "logit_scale", "lm_head_multiplier")


class Tokens(NamedTuple):
    """Of each completion token: log-probability and entropy (nats, float32 [T]), and the hidden state that predicts it, if it
    was to be kept."""

    logprobs_T: torch.Tensor
    entropy_T: torch.Tensor
    hidden_TH: torch.Tensor | None


def check_logits(model: PreTrainedModel) -> None:
    """Raises ModelError if `model` (which may be on the meta device) changes its logits after the head: the learner would train
    on other numbers than the engine's."""
    configs = (model.config, model.config.get_text_config())
    changed = [name for name in UNSUPPORTED if any(getattr(c, name, None) not in (None, 1.0) for c in configs)]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        changed.append("a bias of the head")
    if changed:
        raise ModelError(
            f"{type(model).__name__} changes its logits ({', '.join(changed)}), which the learner does not do; choose another model"
        )


class Policy:
    """`model` must have been loaded with the packed attention (learner.attention.NAME).

    `temperature` is the sampler's: log-probabilities are those of the distribution that was sampled from.
    Raises ModelError for a model that changes its logits after the head.
    """

    def __init__(
        self, model: PreTrainedModel, *, lora: dict, seed: int, temperature: float, logit_chunk_tokens: int,
        gradient_checkpointing: bool, offload_activations: bool = False, fused_kernels: bool = True,
    ) -> None:  # fmt: skip
        check_logits(model)
        if fused_kernels:
            fuse(model)
        if gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        self.lora = FlatLora(model, **lora, seed=seed)
        self._decoder = model.get_decoder()
        self._head_VH = model.get_output_embeddings().weight  # type: ignore[union-attr]
        self._temperature = temperature
        self._chunk = logit_chunk_tokens
        self._offload = Offload() if offload_activations else None
        self._fast_lora = FastLora(self.lora, self._head_VH.dtype)
        model.train(gradient_checkpointing)  # checkpointing is active in training mode only; there is no dropout

    @property
    def device(self) -> torch.device:
        return self.lora.flat.device

    @property
    def hidden_size(self) -> int:
        return self._head_VH.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return self._head_VH.dtype

    def logprobs(self, batch: MicroBatch, *, entropy_moves: bool = False, keep_hidden: bool = False) -> Tokens:
        """What the policy gives to each completion token; with `entropy_moves`, gradients flow through the entropy, too."""
        self._fast_lora.refresh()
        one_layer = len(batch.input_ids_S) * self._head_VH.shape[1] * self._head_VH.element_size()
        with self._offload.saving(min_bytes=one_layer) if self._offload else contextlib.nullcontext():
            output = self._decoder(
                input_ids=batch.input_ids_S[None], position_ids=batch.positions_S[None], use_cache=False,
                packing=batch.packing,
            )  # fmt: skip
        hidden_TH = output.last_hidden_state[0].index_select(0, batch.hidden_index_T)
        logprobs_T, entropy_T = token_logprobs(
            hidden_TH, self._head_VH, batch.targets_T, temperature=self._temperature, chunk=self._chunk,
            entropy_moves=entropy_moves,
        )  # fmt: skip
        return Tokens(logprobs_T, entropy_T, hidden_TH if keep_hidden else None)

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within, the adapter is off: the policy is the reference policy, and nothing records gradients."""
        with torch.no_grad(), self.lora.model.disable_adapter():
            yield
