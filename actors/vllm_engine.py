"""vLLM as an Engine, in this process, through its public API.

Keeps at most `max_num_seqs` requests inside vLLM and queues the rest here, so that each starts with the cache salt
of the adapter that is current when it starts: the prefix cache then never serves blocks of another adapter.
What vLLM does not document lives in vllm_internals.py and vllm_mends.py. Knows nothing of training.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from actors.engine import SpanLog, check_sampled
from actors.shared import BaseWeights, SharingImpossible
from actors.types import Adapter, AdapterLayout, Completion, Request, VersionSpan
from actors.vllm_internals import (
    LORA_ID,
    LORA_NAME,
    NO_PATH,
    AdapterSlot,
    Outputs,
    Sampled,
    base_weights,
    check_version,
    driver_worker,
    sampled_counts,
    set_environment,
    slot_rank,
)
from actors.vllm_mends import (
    join_nf4_scales,
    keep_cpu_weights,
    keep_in_16bit,
    keep_weights_awake,
    mend_layers,
    skip_idle_bookkeeping,
)


@dataclass(frozen=True)
class VllmOptions:
    """How to start vLLM; `kv_cache_bytes` is the size of its key-value cache, never a share of the card."""

    model_path: str
    revision: str | None
    dtype: str
    quantization: str
    device: str
    threads: int
    max_model_len: int
    max_num_seqs: int
    kv_cache_bytes: int
    enforce_eager: bool
    per_request_seeds: bool
    seed: int
    trust_remote_code: bool
    max_num_batched_tokens: int | None = None
    kv_cache_dtype: str = "auto"
    # Linear layers that nf4 leaves in 16 bit, and whether base_weights() will be asked for.
    keep_16bit: tuple[str, ...] = ()
    share_weights: bool = False
    # Whether release_cache() will be called.
    release_cache: bool = False
    # Devices that every layer is spread over, in a process each; the sizes above are then those of one.
    tensor_parallel_size: int = 1


class VllmEngine:
    """An Engine over vLLM. Raises EngineUnavailable where vLLM is missing or of an unknown version."""

    def __init__(
        self,
        options: VllmOptions,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layout: AdapterLayout,
        eos_token_ids: Sequence[int],
    ) -> None:
        check_version()
        set_environment(device=options.device, threads=options.threads)
        mend_layers(options.device)
        if options.device == "cpu" and options.share_weights:
            keep_cpu_weights()
        if options.release_cache:
            keep_weights_awake()
        if options.quantization == "nf4":
            keep_in_16bit(options.keep_16bit)
            join_nf4_scales()
        self._tokenizer = tokenizer
        self._eos = list(eos_token_ids)
        self._options = options
        self._share_of_memory = _share_of_memory(options.device)
        self._engine = _start(options, layout)
        skip_idle_bookkeeping(self._engine)
        self._slot = self._open_slot(layout)
        self._outputs = Outputs(self._engine)
        self._version, self._loads = 0, 0
        self._waiting: deque[Request] = deque()
        self._running: set[str] = set()
        self._spans = SpanLog()

    def _open_slot(self, layout: AdapterLayout) -> Any:
        if self._options.tensor_parallel_size > 1:
            from actors.vllm_ranks import SpreadSlot

            return SpreadSlot(self._engine, layout)
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

    def release_cache(self) -> None:
        if self._options.release_cache:
            self._engine.sleep(1)
            # Unmapped, it still counts as taken with torch.
            self._limit_memory(more=self._options.kv_cache_bytes)

    def restore_cache(self) -> None:
        if self._options.release_cache:
            torch.cuda.empty_cache()  # what the learner held and left
            self._limit_memory()
            self._engine.wake_up()

    def _limit_memory(self, more: int = 0) -> None:
        share = self._share_of_memory + more / torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))

    def close(self) -> None:
        self._engine.engine_core.shutdown()

    def step(self) -> list[Completion]:
        while self._waiting and len(self._running) < self._options.max_num_seqs:
            self._start(self._waiting.popleft())
        return [self._complete(sampled) for sampled in self._outputs.step()]

    def _start(self, request: Request) -> None:
        from vllm import SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        sampling = request.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_tokens,
            seed=sampling.seed if self._options.per_request_seeds else None,
            stop_token_ids=self._eos,
            logprobs=0,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt: Any = {"prompt_token_ids": list(request.prompt_token_ids), "cache_salt": f"{self._loads}"}
        self._spans.start(request.request_id)
        self._running.add(request.request_id)
        self._engine.add_request(
            request.request_id, prompt, params, lora_request=LoRARequest(LORA_NAME, LORA_ID, NO_PATH)
        )

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


def _start(options: VllmOptions, layout: AdapterLayout) -> Any:
    from vllm import EngineArgs, LLMEngine

    targets = sorted({entry.module.rsplit(".", 1)[-1] for entry in layout.entries})
    extra: dict[str, Any] = {}
    if options.device == "cpu":
        # A block of 32 tokens lets short prompts share their prefix. Whole prompts only: a seeded request whose
        # prompt is split fails there ("CPU Generator does not use offset", vLLM 0.32).
        extra |= {
            "block_size": 32,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(4096, options.max_model_len),
        }
    elif options.max_num_batched_tokens is not None:
        extra["max_num_batched_tokens"] = options.max_num_batched_tokens
    if options.tensor_parallel_size > 1:
        from actors.vllm_ranks import RANK

        # Not Ray's: vLLM would take that wherever Ray runs, and its workers would be found by nobody here.
        extra |= {
            "tensor_parallel_size": options.tensor_parallel_size,
            "distributed_executor_backend": "mp",
            "worker_cls": RANK,
            "additional_config": {"share_of_memory": _share_of_memory(options.device)},
        }
    if options.quantization == "nf4":
        extra |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return LLMEngine.from_engine_args(
        EngineArgs(
            model=options.model_path,
            revision=options.revision,
            skip_tokenizer_init=True,
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
            enable_sleep_mode=options.release_cache,
            enable_lora=True,
            max_loras=1,
            max_lora_rank=slot_rank(layout.rank),  # type: ignore[arg-type]
            lora_target_modules=targets,
            logprobs_mode="processed_logprobs",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            # Every request carries the adapter, so graphs without it would never be used; nor would those for steps with a
            # prompt in them, which has more tokens than the largest.
            compilation_config={  # type: ignore[arg-type]
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_specialize_lora": False,
                "max_cudagraph_capture_size": options.max_num_seqs,
            },
            **extra,
        )
    )


def _share_of_memory(device: str) -> float:
    """Of its card that torch's allocator may take in this process, and so in each of the engine's."""
    return torch.cuda.get_per_process_memory_fraction() if device == "cuda" else 1.0
