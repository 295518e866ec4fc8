"""An adapter update in one process, beside the same adapter reloaded from disk.

`python -m benchmarks.adapter_update [override ...]` prints one JSON line: milliseconds of each (medians) and their
ratio. Needs vLLM.
"""

import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, cast

from actors.engines.vllm.internals import driver_worker
from actors.models.peft_folder import write_peft_folder
from benchmarks.common import build_workers, report, seconds
from conf.compose import load_settings

if TYPE_CHECKING:
    from vllm.lora.worker_manager import WorkerLoRAManager

    from actors.engines.vllm.engine import VllmEngine


def main() -> None:
    settings = load_settings("experiment=quickstart", "engine.name=vllm", *sys.argv[1:])
    workers = build_workers(settings)
    engine, learner = cast("VllmEngine", workers.engine), workers.learner
    adapter = learner.adapter()
    # An idle device's clock needs many to rise.
    in_memory = 1e3 * seconds(lambda: engine.load_adapter(adapter), warm=0, repeats=500)

    from vllm.lora.request import LoRARequest

    manager = cast("WorkerLoRAManager", driver_worker(engine._engine).model_runner.lora_manager)
    with tempfile.TemporaryDirectory() as folder:

        def reload() -> None:
            write_peft_folder(Path(folder), adapter, base_model=workers.plan.source.path)
            manager.add_adapter(LoRARequest("reloaded", 2, folder, load_inplace=True))

        from_disk = 1e3 * seconds(reload, warm=0, repeats=20)
    report(
        benchmark="adapter_update",
        model=settings.model.path,
        parameters=adapter.layout.size,
        in_memory_ms=in_memory,
        from_disk_ms=from_disk,
        ratio=from_disk / in_memory,
    )


if __name__ == "__main__":
    main()
