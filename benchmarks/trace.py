"""What the device did during an action, by torch's profiler: the kernels, their kinds, and how busy it was."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import EventList
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import ON_GPU

KINDS = (  # the first whose word is in a kernel's name
    ("norms", ("triton_", "rms_norm", "layernorm", "silu", "act_and_mul", "rotary")),
    ("adapter", ("shrink", "finish", "_lora_", "lora_expand", "fillfunctor<float>")),
    ("nf4", ("nf4", "kdequantize", "kgemm_4bit", "4bit")),
    ("inputs", ("pos_seq_lens", "combine_sampled", "slot_mapping", "block_table", "post_update", "apply_write")),
    ("inputs", ("arange", "staged", "prepare_", "memcpy", "memset")),
    ("sampling", ("gumbel", "topk_log_softmax", "_ranks_kernel", "_temperature", "argmax", "arg_max", "num_sampled")),
    ("sampling", ("logit_bias", "penalt", "bad_words", "min_p", "gather", "logprob", "direct_copy_kernel")),
    ("attention", ("flash", "attn", "attention", "reshape_and_cache", "unified_attention")),
    ("products", ("gemm", "nvjet", "cutlass", "cublas", "splitk", "gemv", "xmma")),
)


@dataclass(frozen=True)
class Kernel:
    """One launch: microseconds from the profiler's start."""

    start: float
    end: float
    name: str

    @property
    def microseconds(self) -> float:
        return self.end - self.start

    @property
    def kind(self) -> str:
        """One of KINDS, or "other"."""
        low = self.name.lower()
        return next((kind for kind, words in KINDS if any(word in low for word in words)), "other")


@dataclass(frozen=True)
class Trace:
    """The `kernels` of an action by their start, its wall-clock `seconds`, and the profiler's averages."""

    seconds: float
    kernels: Sequence[Kernel]
    averages: EventList

    @property
    def busy_seconds(self) -> float:
        """Seconds in which at least one kernel ran."""
        busy, until = 0.0, 0.0
        for kernel in self.kernels:
            busy += max(0.0, kernel.end - max(kernel.start, until))
            until = max(until, kernel.end)
        return busy / 1e6

    @property
    def busy_share(self) -> float:
        return self.busy_seconds / self.seconds

    def table(self, rows: int = 16) -> str:
        """What took longest, as torch prints it."""
        key = "self_cuda_time_total" if ON_GPU else "self_cpu_time_total"
        return self.averages.table(sort_by=key, row_limit=rows, max_name_column_width=70)


def trace(action: Callable[[], object], *, with_host: bool = False) -> Trace:
    """Run `action` under the profiler; `with_host` also records the host's operators, which takes longer.

    Without a GPU the kernels are the host's operators.
    """
    activities = [ProfilerActivity.CUDA] if ON_GPU else []
    activities += [ProfilerActivity.CPU] if with_host or not ON_GPU else []
    with profile(activities=activities) as profiled:
        start = time.perf_counter()
        action()
        if ON_GPU:
            torch.cuda.synchronize()
        took = time.perf_counter() - start
    device = DeviceType.CUDA if ON_GPU else DeviceType.CPU
    events = [event for event in profiled.events() or [] if event.device_type == device]
    kernels = [Kernel(event.time_range.start, event.time_range.end, event.name) for event in events]
    return Trace(took, sorted(kernels, key=lambda kernel: kernel.start), profiled.key_averages())
