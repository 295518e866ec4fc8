"""A decoding step, taken apart: `python -m benchmarks.decode [--engines ours] [--sizes 8 64] [override ...]`.

Compares the engines of benchmarks/decode_engines.py on the same random weights, prompts and lengths, each in a process
of its own. JSON lines for each engine and number of sequences:

decode          milliseconds of a step in which all sequences decode (the median of a run's steps; the middle one of
                three runs)
decode-w        the rollout of work W: 64 sequences of 512 tokens
decode-device   the step's captured forward pass and its sampling, replayed without the host; and steps whose forward
                pass is left out, which take as long as the host needs (GPU only)
decode-busy     steps while other processes keep cores busy (`--busy 0 8`: so many)
decode-kernels  what the device did in some steps (`--profile FOLDER`, which also gets the host's functions and all
                kernels)
"""

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.common import ON_GPU, report, seconds
from benchmarks.decode_device import device_times, kernel_times, profile_host
from benchmarks.decode_engines import ENGINES, DecodeBench, StockVllm
from benchmarks.floor import matrix_rate, memory_rate
from benchmarks.shapes import SHAPES, random_model

BUSY_SIZES, W_SEQUENCES = (8, 64), 64
NICE = 19  # the lowest priority


@contextlib.contextmanager
def busy_processes(count: int, *, nice: int) -> Iterator[None]:
    """So many processes that keep a core busy each."""
    code = f"import os\nos.nice({nice})\nwhile True: pass"
    started = [subprocess.Popen([sys.executable, "-S", "-c", code]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


class Measurements:
    """What is measured of one engine, as the arguments ask."""

    def __init__(self, bench: DecodeBench, arguments: argparse.Namespace) -> None:
        self._bench = bench
        self._arguments = arguments
        self._tokens: int = arguments.tokens

    def all(self) -> None:
        sizes = self._arguments.sizes
        for count in sizes:
            self._bench.run(count, min(self._tokens, 48))  # warms up
        for count in sizes:
            self.steps(count)
        if W_SEQUENCES in sizes and self._arguments.long:
            runs = self._bench.runs(W_SEQUENCES, self._arguments.long)
            self._report("decode-w", W_SEQUENCES, tokens=self._arguments.long, **runs)
        for count in set(sizes).intersection(BUSY_SIZES if self._arguments.busy else ()):
            self.busy(count)
        if self._arguments.profile:
            self._arguments.profile.mkdir(parents=True, exist_ok=True)
            for count in sizes:
                self.kernels(count)
        for count in sizes if ON_GPU else ():
            self.device(count)

    def steps(self, count: int) -> None:
        self._report("decode", count, tokens=self._tokens, **self._bench.runs(count, self._tokens))
        engine = self._bench.engine
        if isinstance(engine, StockVllm):
            engine.with_logprobs = False
            runs = self._bench.runs(count, self._tokens)
            engine.with_logprobs = True
            self._report("decode", count, tokens=self._tokens, logprobs=False, **runs)

    def busy(self, count: int) -> None:
        numbers = self._arguments.busy
        for processes, nice in [*((number, 0) for number in numbers), (max(numbers), NICE)]:
            with busy_processes(processes, nice=nice):
                runs = self._bench.runs(count, self._tokens)
            self._report("decode-busy", count, busy_processes=processes, nice=nice, **runs)

    def device(self, count: int) -> None:
        weights, adapter = self._bench.weight_bytes(), self._bench.adapter_bytes
        times = device_times(self._bench, count, self._tokens)
        self._report("decode-device", count, weight_gb=weights / 1e9, adapter_gb=adapter / 1e9, **times)

    def kernels(self, count: int) -> None:
        folder = self._arguments.profile
        profile_host(self._bench, count, self._tokens, folder / f"host-{self._bench.name}-{count}.txt")
        self._report("decode-kernels", count, **kernel_times(self._bench, count, folder))

    def _report(self, benchmark: str, count: int, **result: object) -> None:
        engine = {"engine": self._bench.name, "shape": self._arguments.shape, "nf4": self._arguments.nf4}
        report(benchmark=benchmark, **engine, sequences=count, **result)


def measure(name: str, arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Start one engine in this process and measure it."""
    began = time.perf_counter()
    model = random_model(arguments.shape, nf4=arguments.nf4)
    with tempfile.TemporaryDirectory() as folder:
        bench = DecodeBench(name, model, Path(folder), sequences=max(arguments.sizes), overrides=overrides)
    gc.freeze()
    report(benchmark="decode-start", engine=name, seconds=time.perf_counter() - began)
    Measurements(bench, arguments).all()


def report_machine() -> None:
    """What the card and the host can do."""
    small = torch.zeros(2**20, device="cuda")
    report(
        benchmark="decode-machine",
        cores=os.cpu_count(),
        memory_tb_per_second=memory_rate() / 1e12,
        matrix_tflop_per_second=matrix_rate(torch.bfloat16) / 1e12,
        launch_and_wait_us=1e6 * seconds(lambda: small.add_(1), repeats=200),
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 64, 256, 512])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=512)
    parser.add_argument("--busy", type=int, nargs="+", default=[])
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--shape", default="qwen2.5-1.5b", choices=list(SHAPES))
    parser.add_argument("--nf4", action="store_true")
    parser.add_argument("--measure", choices=ENGINES, help="used by itself: measure this engine in this process")
    arguments, overrides = parser.parse_known_args()
    if arguments.measure:
        measure(arguments.measure, arguments, overrides)
        return
    for engine in arguments.engines:
        command = [sys.executable, "-m", "benchmarks.decode", *sys.argv[1:], "--measure", engine]
        # Code that vLLM compiles for one of them must not be used by another.
        cache = {"VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / f"epiphany-decode-{engine}")}
        done = subprocess.run(command, check=False, env=os.environ | cache)
        if done.returncode:
            print(json.dumps({"benchmark": "decode", "engine": engine, "failed": done.returncode}), flush=True)
    if ON_GPU:
        report_machine()


if __name__ == "__main__":
    main()
