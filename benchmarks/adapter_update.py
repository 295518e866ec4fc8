"""An adapter update in one process, beside the same adapter reloaded from disk.

python -m benchmarks.adapter_update [override ...] prints one JSON line: milliseconds of each (medians) and their ratio.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from actors.build import build_engine, build_machine, build_model_source
from actors.vllm_internals import driver_worker
from benchmarks.common import report, settings_from
from learner.build import build_learner
from learner.checkpoint import save_adapter

REPEATS = 20


def milliseconds(action: Any) -> float:
    """Median of REPEATS runs, the device's work included."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    settings = settings_from("experiment=quickstart", *sys.argv[1:])
    machine = build_machine(settings)
    source, tokenizer = build_model_source(settings)
    learner = build_learner(settings, machine, source)
    engine: Any = build_engine(settings, machine, "vllm", source, tokenizer, learner.policy.lora.layout)
    adapter = learner.adapter()
    engine.load_adapter(adapter)
    in_memory = milliseconds(lambda: engine.load_adapter(adapter))

    from vllm.lora.request import LoRARequest

    manager = driver_worker(engine._engine).model_runner.lora_manager
    with tempfile.TemporaryDirectory() as folder:

        def reload() -> None:
            save_adapter(Path(folder), adapter, base_model=source.path)
            manager.add_adapter(LoRARequest("reloaded", 2, folder, load_inplace=True))

        from_disk = milliseconds(reload)
    report(
        benchmark="adapter_update", model=settings.model.path, parameters=learner.policy.lora.layout.size,
        in_memory_ms=in_memory, from_disk_ms=from_disk, ratio=from_disk / in_memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
