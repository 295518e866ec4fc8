"""vLLM as an Engine, in this process, through its public API.

Keeps at most `max_num_seqs` requests inside vLLM and queues the rest here, so that each starts with the cache salt of
the adapter that is current at its start: the prefix cache then never serves blocks of another adapter. What vLLM does
not document is in internals.py, patches.py and lora_patches.py. Knows nothing of training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch

from actors.engines.base import EngineOptions, SpanLog, check_sampled
from actors.engines.stop_strings import StopStrings
from actors.engines.vllm.adapter_slot import LORA_ID, LORA_NAME, NO_PATH, AdapterSlot
from actors.engines.vllm.environment import check_version, set_environment
from actors.engines.vllm.internals import (
    Outputs,
    Sampled,
    base_weights,
    driver_worker,
    sampled_counts,
)
from actors.engines.vllm.patches import patch_allocate_slots, patch_preemption
from actors.engines.vllm.start import memory_fraction, patch_before_start, start_vllm
from actors.models.weight_sharing import BaseWeights, SharingImpossible
from actors.types import Adapter, AdapterLayout, Completion, Request, VersionSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Slot(Protocol):
    def write(self, adapter: Adapter) -> None: ...


class VllmEngine:
    """An Engine over vLLM. Raises EngineUnavailable where vLLM is missing or of an unknown version."""

    def __init__(
        self,
        options: EngineOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: AdapterLayout,
        eos_token_ids: Sequence[int],
    ) -> None:
        check_version()
        set_environment(device=options.device, threads=options.threads)
        patch_before_start(options)
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._options = options
        self._memory_fraction = memory_fraction(options.device)
        self._engine = start_vllm(options, layout)
        patch_allocate_slots(self._engine)
        self._preempted = patch_preemption(self._engine)
        self._slot = self._open_slot(layout)
        self._outputs = Outputs(self._engine)
        self._version, self._loads = 0, 0
        self._waiting: deque[Request] = deque()
        self._running: dict[str, StopStrings] = {}
        self._stops = cache(lambda texts: StopStrings(texts, tokenizer))
        self._spans = SpanLog()

    def _open_slot(self, layout: AdapterLayout) -> _Slot:
        if self._options.tensor_parallel_size > 1:
            from actors.engines.vllm.tensor_parallel import ShardedAdapterSlot

            return ShardedAdapterSlot(self._engine, layout)
        return AdapterSlot(driver_worker(self._engine), layout)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def preemptions(self) -> int:
        return self._preempted.count

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

    def partial(self) -> Mapping[str, Sequence[int]]:
        return self._outputs.partial()

    def load_adapter(self, adapter: Adapter) -> None:
        self._slot.write(adapter)
        if self._running:
            self._spans.close(self._version, sampled_counts(self._engine))
        self._version = adapter.version
        self._loads += 1

    def base_weights(self) -> BaseWeights:
        if self._options.tensor_parallel_size > 1:
            raise SharingImpossible("each of the engine's devices has a part of them")
        return base_weights(self._engine)

    def adapter_slots(self) -> list[torch.Tensor]:
        if not isinstance(self._slot, AdapterSlot):
            raise SharingImpossible("each of the engine's devices has a part of the adapter")
        return self._slot.whole_matrices()

    def sleep(self) -> None:
        if self._options.sleep_mode:
            self._engine.sleep(1)
            # torch still counts the unmapped cache as allocated.
            self._limit_memory(beyond=self._options.kv_cache_bytes)

    def wake(self) -> None:
        if self._options.sleep_mode:
            torch.cuda.empty_cache()  # blocks that the learner has freed
            self._limit_memory()
            self._engine.wake_up()

    def _limit_memory(self, beyond: int = 0) -> None:
        fraction = self._memory_fraction + beyond / torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, fraction))

    def close(self) -> None:
        self._engine.engine_core.shutdown()
        # vLLM 0.25 leaves the process group that it made, of which NCCL complains at the end of the process.
        if self._options.tensor_parallel_size == 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    def step(self) -> list[Completion]:
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            self._start(self._waiting.popleft())
        return [self._complete(sampled) for sampled in self._outputs.step(self._running)]

    def _start(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        sampling, stops = request.sampling, self._stops(request.sampling.stop)
        params = SamplingParams(
            temperature=sampling.temperature,
            **({} if sampling.temperature == 0 else asdict(sampling.truncation)),
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if self._options.per_request_seeds else None,
            stop_token_ids=[*self._eos, *stops.token_ids],
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids), cache_salt=f"{self._loads}")
        self._spans.start(request.request_id)
        self._running[request.request_id] = stops
        lora = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        self._engine.add_request(request.request_id, prompt, params, lora_request=lora)

    def _complete(self, sampled: Sampled) -> Completion:
        spans = self._spans.finish(sampled.request_id, self._version, len(sampled.token_ids))
        stops = self._running.pop(sampled.request_id)
        check_sampled(sampled.logprobs, self._version)
        return Completion(
            request_id=sampled.request_id,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            text=stops.cut(str(self._tokenizer.decode(list(sampled.token_ids), skip_special_tokens=True))),
            finish_reason=sampled.finish_reason,
            version_spans=tuple(VersionSpan(*span) for span in spans),
        )
