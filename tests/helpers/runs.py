"""Runs of launch.py for tests: a tiny model, plain data, and what they leave behind."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def overrides(model: Path, folder: Path, *more: str) -> list[str]:
    """A run of the tiny model on 20 sums, with a reward that always gives a signal."""
    data = folder.parent / "sums.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps({"question": f"{i} + 1", "answer": str(i + 1)}) + "\n" for i in range(20)))
    reward = f"reward.terms=[{{fn: '{ROOT}/tests/helpers/letters.py:score'}}]"
    return [
        "experiment=none",
        f"model.path={model}",
        "model.package=null",
        "model.lora.rank=4",
        "engine.name=transformers",
        "data=file",
        f"data.source={data}",
        "data.held_out=4",
        "hardware=cpu",
        "hardware.threads=1",  # beside another process of tests, two threads wait for each other most of the time
        reward,
        "reward.check_reference_answer=false",
        "algorithm.prompts_per_step=2",
        "algorithm.group_size=4",
        "sampling.max_tokens=6",
        "learner.learning_rate=0.01",
        "evaluation.samples=1",
        "run.steps=4",
        "run.checkpoint_every=1",
        "run.keep_checkpoints=100",
        f"run.folder={folder}",
        *more,
    ]


class Launched:
    """launch.py with `arguments`, in a child of a fork server that has imported it already."""

    def __init__(self, arguments: list[str], log: Path, prepare: Callable[[], None] | None = None) -> None:
        self.log = log
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.helpers.preload"])
        self.process = context.Process(target=_main, args=(arguments, log, prepare))
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def kill(self) -> None:
        """kill -9 of the whole process group."""
        if self.process.is_alive():
            os.killpg(self.pid, signal.SIGKILL)
        self.process.join()

    def wait(self, seconds: float = 300.0) -> tuple[int | None, str]:
        """Exit code and output."""
        self.process.join(seconds)
        assert not self.process.is_alive(), self.log.read_text()
        return self.process.exitcode, self.log.read_text()


def _main(arguments: list[str], log: Path, prepare: Callable[[], None] | None) -> None:
    import launch

    os.setsid()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.argv = ["launch.py", *arguments]
    if prepare is not None:
        prepare()
    launch.main()


def launch(arguments: list[str], *, expect: int = 0) -> str:
    """Run to the end and return the output."""
    with tempfile.TemporaryDirectory() as scratch:
        code, output = Launched(arguments, Path(scratch) / "log").wait()
    assert code == expect, output
    return output


# A reward and a recipe that are named as import names modules, in a folder of `launch_beside_shadows`.
OF_MODULES = ("reward.terms=[{fn: 'mine:score'}]", "algorithm.name=recipe:MINE")


def launch_beside_shadows(folder: Path, arguments: list[str]) -> str:
    """Run to the end from `folder`, which holds files and folders of the user's with names of our packages, and those
    that OF_MODULES names. Returns the output.
    """
    for name in ("rewards", "session", "report"):
        (folder / f"{name}.py").write_text(f"raise ImportError('the {name} of the user')\n")
    for name in ("conf", "launch"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise ImportError('the {name} of the user')\n")
    shutil.copy(ROOT / "tests" / "helpers" / "letters.py", folder / "mine.py")
    (folder / "recipe.py").write_text("from learner.algorithms.table import GRPO\n\nMINE = GRPO\n")
    run = [sys.executable, str(ROOT / "launch.py"), *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(run, cwd=folder, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def trained_ordinals(folder: Path, steps: int) -> list[int]:
    """Of every step, the ordinals that it trained."""
    tables = [pq.read_table(folder / "completions" / f"step-{n:06d}.parquet") for n in range(1, steps + 1)]
    return sorted(ordinal for table in tables for ordinal in set(table.column("ordinal").to_pylist()))


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def lock_of(folder: Path) -> int | None:
    """The process that holds, or held, a run folder."""
    file = folder / "lock"
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text else None


def rows(folder: Path, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def steps_of(folder: Path) -> int:
    """Steps that the run in this folder has recorded."""
    return len(rows(folder)) if (folder / "metrics.jsonl").is_file() else 0


def kill_after(seconds: Sequence[float], arguments: list[str], folder: Path) -> list[int]:
    """Start the run again and again, and kill -9 it so many seconds after it has `folder`; the steps recorded by each
    kill. A run that has been done meanwhile takes no folder, and ends by itself.
    """
    done = []
    for wait in seconds:
        running = Launched(arguments, folder.parent / "log")
        wait_for(lambda running=running: lock_of(folder) == running.pid or not running.process.is_alive())
        running.process.join(wait)
        running.kill()
        done.append(steps_of(folder))
    return done


def final(folder: Path, step: int) -> tuple[dict, dict, dict]:
    """Adapter and optimizer tensors and the state of a checkpoint."""
    checkpoint = folder / "checkpoints" / f"step-{step:08d}"
    state = json.loads((checkpoint / "state.json").read_text())
    return load_file(checkpoint / "adapter_model.safetensors"), load_file(checkpoint / "optimizer.safetensors"), state


def assert_bit_equal(one: Path, other: Path, steps: int) -> None:
    """Adapter, optimizer, ledger, and every row of every step are the same.

    torch's own random state may differ: a batch that came from the journal was not sampled, and vLLM draws from that
    state even where each request has a seed. Nothing that is trained depends on it.
    """
    import torch

    a, b = final(one, steps), final(other, steps)
    for tensors, others in ((a[0], b[0]), (a[1], b[1])):
        assert tensors.keys() == others.keys()
        differing = {name for name, tensor in tensors.items() if not torch.equal(tensor, others[name])}
        assert differing <= {"random_cpu"}
    assert a[2]["ledger"] == b[2]["ledger"]
    for step in range(1, steps + 1):
        tables = [pq.read_table(folder / "completions" / f"step-{step:06d}.parquet") for folder in (one, other)]
        assert tables[0].equals(tables[1]), step
