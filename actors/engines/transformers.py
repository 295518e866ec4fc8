"""The simple engine: plain transformers, runs everywhere, and is the oracle for the fast one.

Requests that start together form a cohort: one left-padded batch with one key-value cache, advanced by one token a
step; finished rows are dropped from it. Knows transformers; knows neither vLLM nor the learner.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from actors.engines.base import EngineOptions, SpanLog, check_sampled
from actors.engines.stop_strings import StopStrings
from actors.models.families import family_of
from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, LoraArguments, lora_arguments_of
from actors.models.source import ModelSource
from actors.models.truncation import truncate_in_place
from actors.models.weight_sharing import BaseWeights, named_base_weights
from actors.types import Adapter, AdapterLayout, Completion, Request, VersionSpan


def build_engine(
    options: EngineOptions,
    tokenizer: PreTrainedTokenizerBase,
    *,
    layout: AdapterLayout,
    eos_token_ids: Sequence[int],
) -> TransformersEngine:
    """Load the base weights and make the engine."""
    model = load_base_model(
        ModelSource(options.model_path, options.revision, options.model_path),
        dtype=options.dtype,
        device=options.device,
        quantization=options.quantization,
        trust_remote_code=options.trust_remote_code,
        keep_16bit=options.keep_16bit,
        embedding_on_host=options.embedding_on_host,
    )
    return TransformersEngine(
        model,
        tokenizer,
        lora=lora_arguments_of(layout),
        eos_token_ids=eos_token_ids,
        max_num_seqs=options.max_num_seqs,
    )


class TransformersEngine:
    """An Engine over `model`, which gets a LoRA adapter of its own.

    `eos_token_ids` end a completion. Samples of one request depend only on its seed (on the CPU).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        lora: LoraArguments,
        eos_token_ids: Sequence[int],
        max_num_seqs: int = 64,
    ) -> None:
        self._lora = FlatLora(model, **lora, seed=0)
        self._model = self._lora.model.eval()
        self._tokenizer = tokenizer
        self._config = model.config.get_text_config()
        self._carries_state = family_of(model.config).has_linear_attention
        self._eos = frozenset(eos_token_ids)
        self._stops = cache(lambda texts: StopStrings(texts, tokenizer))
        self._max_num_seqs = max_num_seqs
        self._version = 0
        self._waiting: deque[Request] = deque()
        self._cohorts: list[_Cohort] = []
        self._spans = SpanLog()

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + self._running

    @property
    def preemptions(self) -> int:
        return 0

    @property
    def _running(self) -> int:
        return sum(len(cohort.rows) for cohort in self._cohorts)

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def partial(self) -> Mapping[str, Sequence[int]]:
        return {row.request.request_id: row.token_ids for cohort in self._cohorts for row in cohort.rows}

    def load_adapter(self, adapter: Adapter) -> None:
        self._lora.load(adapter)
        sampled = {row.request.request_id: len(row.token_ids) for cohort in self._cohorts for row in cohort.rows}
        self._spans.close(self._version, sampled)
        self._version = adapter.version

    def sleep(self) -> None:
        """Nothing to free: each cohort's cache goes with its last sequence."""

    def wake(self) -> None: ...

    def close(self) -> None: ...

    def base_weights(self) -> BaseWeights:
        return named_base_weights(self._model)

    @torch.inference_mode()
    def step(self) -> list[Completion]:
        self._start_waiting()
        finished: list[Completion] = []
        for cohort in self._cohorts:
            self._advance(cohort)
            reasons = [row.finish_reason(self._eos) for row in cohort.rows]
            finished += [
                self._complete(row, reason) for row, reason in zip(cohort.rows, reasons, strict=True) if reason
            ]
            if any(reasons):
                cohort.keep([i for i, reason in enumerate(reasons) if reason is None])
        self._cohorts = [cohort for cohort in self._cohorts if cohort.rows]
        return finished

    def _start_waiting(self) -> None:
        count = min(len(self._waiting), self._max_num_seqs - self._running)
        if count > 0:
            requests = [self._waiting.popleft() for _ in range(count)]
            rows = [_Row.start(r, self._stops(r.sampling.stop), self._model.device) for r in requests]
            for row in rows:
                self._spans.start(row.request.request_id)
            cache = DynamicCache(config=self._config) if self._carries_state else DynamicCache()
            self._cohorts.append(_Cohort.start(rows, cache, self._model.device))

    def _advance(self, cohort: _Cohort) -> None:
        positions = (cohort.mask.cumsum(-1) - 1).clamp_min(0)[:, -cohort.input_ids.shape[1] :]
        output = self._model(
            input_ids=cohort.input_ids,
            attention_mask=cohort.mask,
            position_ids=positions,
            past_key_values=cohort.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_NV = output.logits[:, -1].float()
        check_sampled(logits_NV.sum(1).tolist(), self._version)
        for row, logits_V in zip(cohort.rows, logits_NV, strict=True):
            row.sample(logits_V)
        cohort.input_ids = torch.tensor([[row.token_ids[-1]] for row in cohort.rows], device=self._model.device)
        cohort.mask = torch.cat([cohort.mask, cohort.mask.new_ones(len(cohort.rows), 1)], dim=1)

    def _complete(self, row: _Row, finish_reason: str) -> Completion:
        spans = self._spans.finish(row.request.request_id, self._version, len(row.token_ids))
        return Completion(
            request_id=row.request.request_id,
            token_ids=tuple(row.token_ids),
            logprobs=tuple(row.logprobs),
            text=row.stops.cut(str(self._tokenizer.decode(row.token_ids, skip_special_tokens=True))),
            finish_reason=finish_reason,
            version_spans=tuple(VersionSpan(*span) for span in spans),
        )


@dataclass
class _Row:
    request: Request
    stops: StopStrings
    token_ids: list[int]
    logprobs: list[float]
    generator: torch.Generator

    @classmethod
    def start(cls, request: Request, stops: StopStrings, device: torch.device) -> _Row:
        generator = torch.Generator(device)
        if request.sampling.seed is not None:
            generator.manual_seed(request.sampling.seed)
        else:
            generator.seed()
        return cls(request, stops, [], [], generator)

    def sample(self, logits_V: torch.Tensor) -> None:
        temperature = self.request.sampling.temperature
        if temperature == 0:
            logprobs_V = logits_V.log_softmax(-1)
            token = int(logprobs_V.argmax())
        else:
            (logits_V,) = truncate_in_place(logits_V[None], self.request.sampling.truncation, temperature=temperature)
            logprobs_V = (logits_V / temperature).log_softmax(-1)
            token = int(torch.multinomial(logprobs_V.exp(), 1, generator=self.generator))
        self.token_ids.append(token)
        self.logprobs.append(float(logprobs_V[token]))

    def finish_reason(self, eos: frozenset[int]) -> str | None:
        """Why the row is done; None if it is not."""
        last = self.token_ids[-1]
        if last in eos or last in self.stops.token_ids or self.stops.ends(self.token_ids):
            return "stop"
        return "length" if len(self.token_ids) >= self.request.sampling.max_tokens else None


@dataclass
class _Cohort:
    rows: list[_Row]
    input_ids: torch.Tensor
    mask: torch.Tensor
    cache: DynamicCache

    @classmethod
    def start(cls, rows: list[_Row], cache: DynamicCache, device: torch.device) -> _Cohort:
        prompts = [row.request.prompt_token_ids for row in rows]
        width = max(map(len, prompts))
        ids = [[0] * (width - len(p)) + list(p) for p in prompts]
        mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
        return cls(rows, torch.tensor(ids, device=device), torch.tensor(mask, device=device), cache)

    def keep(self, index: list[int]) -> None:
        """Drop all rows but those at `index`."""
        self.rows = [self.rows[i] for i in index]
        if index:
            select = torch.tensor(index, device=self.mask.device)
            self.mask, self.input_ids = self.mask[select], self.input_ids[select]
            self.cache.batch_select_indices(select)
