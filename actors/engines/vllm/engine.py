"""vLLM as an Engine, in this process, through its public API.

Keeps at most `max_num_seqs` requests inside vLLM and queues the rest here, so that each starts with the cache salt of
the adapter that is current at its start: the prefix cache then never serves blocks of another adapter. What vLLM does
not document is in internals.py, patches.py and lora_patches.py. Knows nothing of training.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Protocol

import torch

from actors.engines.base import EngineOptions, SpanLog, check_sampled
from actors.engines.vllm.environment import check_version, set_environment
from actors.engines.vllm.internals import (
    LORA_ID,
    LORA_NAME,
    NO_PATH,
    AdapterSlot,
    Outputs,
    Sampled,
    base_weights,
    driver_worker,
    sampled_counts,
    slot_rank,
)
from actors.engines.vllm.lora_patches import patch_nf4_loader, patch_nf4_skipped_modules
from actors.engines.vllm.patches import patch_allocate_slots, patch_cpu_repacking, patch_process, patch_sleep_mode
from actors.models.families import family_of
from actors.models.loading import load_config
from actors.models.lora import lora_arguments_of
from actors.models.source import ModelSource
from actors.models.weight_sharing import BaseWeights, SharingImpossible
from actors.types import Adapter, AdapterLayout, Completion, Request, VersionSpan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm import LLMEngine


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
        _patch_before_start(options)
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._options = options
        self._memory_fraction = _memory_fraction(options.device)
        self._engine = _start_vllm(options, layout)
        patch_allocate_slots(self._engine)
        self._slot = self._open_slot(layout)
        self._outputs = Outputs(self._engine)
        self._version, self._loads = 0, 0
        self._waiting: deque[Request] = deque()
        self._running: set[str] = set()
        self._spans = SpanLog()

    def _open_slot(self, layout: AdapterLayout) -> _Slot:
        if self._options.tensor_parallel_size > 1:
            from actors.engines.vllm.tensor_parallel import ShardedAdapterSlot

            return ShardedAdapterSlot(self._engine, layout)
        return AdapterSlot(driver_worker(self._engine), layout)

    @property
    def unfinished(self) -> int:
        return len(self._waiting) + len(self._running)

    def submit(self, requests: Sequence[Request]) -> None:
        self._waiting.extend(requests)

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
        return [self._complete(sampled) for sampled in self._outputs.step()]

    def _start(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            **({} if sampling.temperature == 0 else asdict(sampling.truncation)),
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if self._options.per_request_seeds else None,
            stop_token_ids=self._eos,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(request.prompt_token_ids), cache_salt=f"{self._loads}")
        self._spans.start(request.request_id)
        self._running.add(request.request_id)
        lora = LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        self._engine.add_request(request.request_id, prompt, params, lora_request=lora)

    def _complete(self, sampled: Sampled) -> Completion:
        spans = self._spans.finish(sampled.request_id, self._version, len(sampled.token_ids))
        self._running.discard(sampled.request_id)
        check_sampled(sampled.logprobs, self._version)
        return Completion(
            request_id=sampled.request_id,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            text=str(self._tokenizer.decode(list(sampled.token_ids), skip_special_tokens=True)),
            finish_reason=sampled.finish_reason,
            version_spans=tuple(VersionSpan(*span) for span in spans),
        )


def _patch_before_start(options: EngineOptions) -> None:
    patch_process(options.device)
    if options.device == "cpu" and options.share_weights:
        patch_cpu_repacking()
    if options.sleep_mode:
        patch_sleep_mode()
    if options.quantization == "nf4":
        source = ModelSource(options.model_path, options.revision, options.model_path)
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        patch_nf4_skipped_modules(options.keep_16bit, family=family_of(config))
        patch_nf4_loader()


def _start_vllm(options: EngineOptions, layout: AdapterLayout) -> LLMEngine:
    from vllm import EngineArgs, LLMEngine

    return LLMEngine.from_engine_args(
        EngineArgs(
            model=options.model_path,
            revision=options.revision,
            skip_tokenizer_init=True,
            language_model_only=True,
            dtype=options.dtype,  # type: ignore[arg-type]
            trust_remote_code=options.trust_remote_code,
            seed=options.seed,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            kv_cache_dtype=options.kv_cache_dtype,  # type: ignore[arg-type]
            gpu_memory_utilization=0.05,  # only a start-up check once the cache is given in bytes
            enforce_eager=options.enforce_eager,
            enable_prefix_caching=True,
            # The next step is scheduled while this one computes. An adapter is copied in on the stream that steps are
            # launched on, so it waits for those under way; their tokens count as sampled by the old version.
            async_scheduling=options.device != "cpu",
            # Sleeping unmaps the cache's pages and keeps its addresses, so that CUDA graphs stay valid.
            enable_sleep_mode=options.sleep_mode,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=slot_rank(layout.rank),  # type: ignore[arg-type]
            lora_target_modules=list(lora_arguments_of(layout)["target_modules"]),
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # Every request carries the adapter, so graphs without it would never be used; nor would graphs of steps
            # with a prompt in them, which have more tokens than the largest.
            compilation_config={  # type: ignore[arg-type]
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_specialize_lora": False,
                "max_cudagraph_capture_size": options.max_num_seqs,
            },
            **device_arguments(options),  # type: ignore[arg-type]
        )
    )


def device_arguments(options: EngineOptions) -> dict[str, object]:
    """Arguments that depend on the device, the number of devices and the quantization."""
    arguments: dict[str, object] = {"max_num_batched_tokens": options.max_num_batched_tokens}
    if options.device == "cpu":
        # A block of 32 tokens lets short prompts share their prefix. Whole prompts only: a seeded request whose prompt
        # is split fails there ("CPU Generator does not use offset", vLLM 0.32).
        arguments |= {
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(options.max_num_batched_tokens, options.max_model_len),
        }
    if options.tensor_parallel_size > 1:
        from actors.engines.vllm.tensor_parallel import WORKER_CLASS

        arguments |= {
            "tensor_parallel_size": options.tensor_parallel_size,
            # vLLM would choose Ray wherever it runs, and its workers would not be in this process's group.
            "distributed_executor_backend": "mp",
            "worker_cls": WORKER_CLASS,
            "additional_config": {"memory_fraction": _memory_fraction(options.device)},
        }
    if options.quantization == "nf4":
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return arguments


def _memory_fraction(device: str) -> float:
    """The fraction of its GPU that torch's allocator may take in this process, and so in each of the engine's."""
    return torch.cuda.get_per_process_memory_fraction() if device == "cuda" else 1.0
