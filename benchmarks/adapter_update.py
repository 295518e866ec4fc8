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

from actors.vllm_internals import driver_worker
from benchmarks.common import build_workers, report, settings_from
from learner.checkpoint import save_adapter


def milliseconds(action: Any, repeats: int) -> float:
    """Median of `repeats` runs, the device's work included; an idle device's clock needs many to rise."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> None:
    settings = settings_from("experiment=quickstart", *sys.argv[1:])
    workers = build_workers(settings)
    engine, learner = workers.engine, workers.learner
    adapter = learner.adapter()
    engine.load_adapter(adapter)
    in_memory = milliseconds(lambda: engine.load_adapter(adapter), 500)

    from vllm.lora.request import LoRARequest

    manager = driver_worker(engine._engine).model_runner.lora_manager
    with tempfile.TemporaryDirectory() as folder:

        def reload() -> None:
            save_adapter(Path(folder), adapter, base_model=workers.blueprint.source.path)
            manager.add_adapter(LoRARequest("reloaded", 2, folder, load_inplace=True))

        from_disk = milliseconds(reload, 20)
    report(
        benchmark="adapter_update", model=settings.model.path, parameters=learner.policy.lora.layout.size,
        in_memory_ms=in_memory, from_disk_ms=from_disk, ratio=from_disk / in_memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
