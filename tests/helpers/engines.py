"""Options that engines are built from in tests; `dataclasses.replace` changes what a test needs different."""

from dataclasses import replace

from actors.engines.base import EngineOptions

CPU_OPTIONS = EngineOptions(
    model_path="",
    revision=None,
    trust_remote_code=False,
    dtype="float32",
    quantization="none",
    device="cpu",
    threads=1,
    max_model_len=64,
    max_num_seqs=2,
    max_num_batched_tokens=4096,
    kv_cache_bytes=1 << 20,
    enforce_eager=True,
    per_request_seeds=True,
    seed=0,
)
GPU_OPTIONS = replace(
    CPU_OPTIONS,
    dtype="bfloat16",
    device="cuda",
    threads=8,
    max_model_len=512,
    max_num_seqs=64,
    max_num_batched_tokens=2048,
    kv_cache_bytes=1 << 30,
    enforce_eager=False,
    per_request_seeds=False,
)
