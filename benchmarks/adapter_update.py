"""An adapter update in one process, beside the same adapter reloaded from disk.

python -m benchmarks.adapter_update [override ...] prints one JSON line: milliseconds of each (medians) and their ratio.
"""

import sys
import tempfile
from pathlib import Path

from actors.vllm_internals import driver_worker
from benchmarks.common import build_workers, report, settings_from
from benchmarks.floor import seconds
from learner.checkpoint import save_adapter


def main() -> None:
    settings = settings_from("experiment=quickstart", *sys.argv[1:])
    workers = build_workers(settings)
    engine, learner = workers.engine, workers.learner
    adapter = learner.adapter()
    engine.load_adapter(adapter)
    # An idle device's clock needs many to rise.
    in_memory = 1e3 * seconds(lambda: engine.load_adapter(adapter), warm=0, repeats=500)

    from vllm.lora.request import LoRARequest

    manager = driver_worker(engine._engine).model_runner.lora_manager
    with tempfile.TemporaryDirectory() as folder:

        def reload() -> None:
            save_adapter(Path(folder), adapter, base_model=workers.blueprint.source.path)
            manager.add_adapter(LoRARequest("reloaded", 2, folder, load_inplace=True))

        from_disk = 1e3 * seconds(reload, warm=0, repeats=20)
    report(
        benchmark="adapter_update", model=settings.model.path, parameters=learner.policy.lora.layout.size,
        in_memory_ms=in_memory, from_disk_ms=from_disk, ratio=from_disk / in_memory,
    )  # fmt: skip


if __name__ == "__main__":
    main()
