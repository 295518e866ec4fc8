"""Start vLLM with our arguments. Knows its public arguments; patches.py and lora_patches.py change its code."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from actors.engines.base import EngineOptions
from actors.engines.vllm.adapter_slot import slot_rank
from actors.engines.vllm.lora_patches import patch_nf4_loader, patch_nf4_skipped_modules
from actors.engines.vllm.patches import EMBEDDING_ON_HOST, patch_cpu_repacking, patch_process, patch_sleep_mode
from actors.models.families import family_of
from actors.models.loading import load_config
from actors.models.lora import lora_arguments_of
from actors.models.source import ModelSource
from actors.types import AdapterLayout

if TYPE_CHECKING:
    from vllm import LLMEngine


def patch_before_start(options: EngineOptions) -> None:
    patch_process(options.device)
    if options.device == "cpu" and options.share_weights:
        patch_cpu_repacking()
    if options.sleep_mode:
        patch_sleep_mode()
    if options.quantization == "nf4":
        source = ModelSource(options.model_path, options.revision, options.model_path)
        config = load_config(source, trust_remote_code=options.trust_remote_code)
        patch_nf4_skipped_modules(options.keep_16bit, family=family_of(config))
        patch_nf4_loader(quantized_scales=options.quantized_scales)


def start_vllm(options: EngineOptions, layout: AdapterLayout) -> LLMEngine:
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
    ours: dict[str, object] = {EMBEDDING_ON_HOST: options.embedding_on_host}
    arguments: dict[str, object] = {"max_num_batched_tokens": options.max_num_batched_tokens, "additional_config": ours}
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
            "additional_config": {**ours, "memory_fraction": memory_fraction(options.device)},
        }
    if options.quantization == "nf4":
        arguments |= {"quantization": "bitsandbytes", "load_format": "bitsandbytes"}
    return arguments


def memory_fraction(device: str) -> float:
    """The fraction of its GPU that torch's allocator may take in this process, and so in each of the engine's."""
    return torch.cuda.get_per_process_memory_fraction() if device == "cuda" else 1.0
