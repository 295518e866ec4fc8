"""A decoding step without the host, and the host without the device: what benchmarks.decode measures beside steps.

Reads vLLM's captured graphs, which its public API does not show (vLLM 0.25).
"""

import cProfile
import json
import pstats
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Protocol, cast

import torch

from actors.engines.vllm.internals import driver_worker
from benchmarks.decode_engines import EDGE, DecodeBench
from benchmarks.trace import Trace, trace


class _Graph(Protocol):
    def replay(self) -> None: ...


class _GraphKey(Protocol):
    num_tokens: int
    num_active_loras: int


class _GraphManager(Protocol):
    graphs: MutableMapping[_GraphKey, _Graph]


class _Runner(Protocol):
    """vLLM's model runner as far as it is used here."""

    cudagraph_manager: _GraphManager
    sample: Callable[..., object]


class _NoGraph:
    def replay(self) -> None: ...


def device_times(bench: DecodeBench, count: int, tokens: int) -> dict[str, object]:
    """Milliseconds of a step's captured forward pass and of its sampling, replayed without the host; and of steps whose
    forward pass is left out, which take as long as the host needs."""
    runner = cast(_Runner, driver_worker(bench.vllm).model_runner)
    graphs, arguments = runner.cudagraph_manager.graphs, _sample_arguments(bench, runner, count, tokens)
    key = min(
        (key for key in graphs if key.num_tokens >= count and (bench.name == "bare" or key.num_active_loras)),
        key=lambda key: (key.num_tokens, key.num_active_loras),
    )
    forward = graphs[key]
    times: dict[str, object] = {
        "graph_tokens": key.num_tokens,
        "forward_ms": _replay_ms(forward.replay),
        "forward_launch_ms": _launch_ms(forward.replay),
    }
    with torch.inference_mode():
        runner.sample(*arguments)
        sampling = torch.cuda.CUDAGraph()
        with torch.cuda.graph(sampling):
            output = runner.sample(*arguments)  # must live as long as the graph
    times["sample_ms"] = _replay_ms(sampling.replay)
    times["both_ms"] = _replay_ms(lambda: (forward.replay(), sampling.replay()))
    del output
    torch.cuda.synchronize()
    bench.finish()
    graphs[key] = _NoGraph()
    times["without_forward"] = bench.runs(count, tokens)
    graphs[key] = forward
    return times


def _sample_arguments(bench: DecodeBench, runner: _Runner, count: int, tokens: int) -> tuple[object, ...]:
    """Decode half of `tokens` tokens; the arguments of the last call of vLLM's sampler."""
    sample, calls = runner.sample, []

    def recorded(*arguments: object) -> object:
        calls[:] = [arguments]
        return sample(*arguments)

    runner.sample = recorded
    bench.submit(count, tokens)
    for _ in range(tokens // 2):
        bench.engine.step()
    torch.cuda.synchronize()
    del runner.sample
    return calls[0]


def _replay_ms(action: Callable[[], object], repeats: int = 60) -> float:
    """Milliseconds of one of many in a row, on the device."""
    for _ in range(5):
        action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        action()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / repeats


def _launch_ms(action: Callable[[], object]) -> float:
    """Milliseconds until the host may go on."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return 1e3 * statistics.median(times)


def profile_host(bench: DecodeBench, count: int, tokens: int, file: Path) -> None:
    """Write the host's functions of the decoding steps into `file`."""
    steps, profiled = tokens - 2 * EDGE, cProfile.Profile()
    bench.submit(count, tokens)
    for _ in range(EDGE):
        bench.engine.step()
    start = time.perf_counter()
    profiled.enable()
    for _ in range(steps):
        bench.engine.step()
    profiled.disable()
    took = time.perf_counter() - start
    bench.finish()
    with file.open("w") as stream:
        milliseconds = 1e3 * took / steps
        print(f"{bench.name}, {count} sequences, {steps} steps, {milliseconds:.3f} ms under cProfile", file=stream)
        for key, rows in (("tottime", 45), ("cumulative", 70)):
            pstats.Stats(profiled, stream=stream).sort_stats(key).print_stats(rows)


def kernel_times(bench: DecodeBench, count: int, folder: Path, steps: int = 24) -> dict[str, object]:
    """What the device does in `steps` decoding steps; writes all kernels into files in `folder`."""

    def decode() -> None:
        for _ in range(steps):
            bench.engine.step()

    bench.submit(count, 2 * EDGE + steps)
    for _ in range(EDGE):
        bench.engine.step()
    traced = trace(decode)
    bench.finish()
    kinds: dict[str, float] = defaultdict(float)
    for kernel in traced.kernels:
        kinds[kernel.kind] += kernel.microseconds / 1e3 / steps
    _write_kernels(traced, folder, f"{bench.name}-{count}", steps=steps)
    return {
        "steps": steps,
        "step_ms_profiled": 1e3 * traced.seconds / steps,
        "busy_ms": 1e3 * traced.busy_seconds / steps,
        "busy_share": traced.busy_share,
        "launches": len(traced.kernels) / steps,
        "kinds_ms": {kind: round(ms, 4) for kind, ms in sorted(kinds.items(), key=lambda item: -item[1])},
    }


def _write_kernels(traced: Trace, folder: Path, name: str, *, steps: int) -> None:
    """kernels-<name>.txt sums up each kernel; spans-<name>.json lists every launch."""
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kernel in traced.kernels:
        by_name[kernel.name, kernel.kind].append(kernel.microseconds)
    lines = [f"{name}, {steps} steps: ms a step, launches a step, mean us, kind, kernel"]
    for (kernel_name, kind), times in sorted(by_name.items(), key=lambda item: -sum(item[1])):
        a_step, launches, mean = sum(times) / 1e3 / steps, len(times) / steps, statistics.mean(times)
        lines.append(f"{a_step:8.4f} {launches:7.1f} {mean:8.2f}  {kind:10} {kernel_name[:150]}")
    (folder / f"kernels-{name}.txt").write_text("\n".join(lines) + "\n")
    spans = [(kernel.start, kernel.microseconds, kernel.name) for kernel in traced.kernels]
    (folder / f"spans-{name}.json").write_text(json.dumps(spans))
