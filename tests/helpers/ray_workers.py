"""Workers for tests of the pipeline over Ray: real ones over a fake engine, which write down their process ids."""

import os
import time
from pathlib import Path

from actors.replay.admission import Admission
from actors.replay.queue import Replay
from actors.reward import RewardWorker
from actors.rollout import RolloutWorker, RunProgress
from actors.types import Adapter, Completion, Group
from conf.schema import TermSettings
from tests.helpers.fakes import EchoEngine

LETTERS, SLOW = (
    [TermSettings(f"{Path(__file__).parent}/{name}")] for name in ("letters.py:score", "letters.py:slowly")
)


class SlowEcho(EchoEngine):
    """A step takes 50 ms; where `hangs` exists, the next one takes forever and the file goes."""

    def __init__(self, hangs: Path) -> None:
        super().__init__(max_num_seqs=16)
        self._hangs = hangs

    def step(self) -> list[Completion]:
        time.sleep(0.05)
        if self._hangs.exists():
            self._hangs.unlink()
            time.sleep(1e6)
        return super().step()


class Rollout(RolloutWorker):
    """Notes every adapter that it gets."""

    folder: Path

    def load_adapter(self, adapter: Adapter) -> int:
        version = super().load_adapter(adapter)
        with (self.folder / f"{self._name}.adapters").open("a") as stream:
            stream.write(f"{version}\n")
        return version

    def run_engine(self, seconds: float = 0.25, groups: int = 1) -> RunProgress:
        if (self.folder / "broken").exists():
            (self.folder / "broken").unlink()
            raise OSError("the engine's inner process is gone")
        return super().run_engine(seconds, groups)


def rollout(folder: Path, name: str) -> RolloutWorker:
    tell(folder, name)
    worker = Rollout(SlowEcho(folder / "hang"), seed=0, name=name)
    worker.folder = folder
    return worker


def reward(folder: Path, name: str) -> RewardWorker:
    tell(folder, name)
    return RewardWorker(LETTERS, deadline_seconds=5.0, memory_gib=1.0, max_tokens=6)


def slow_reward(folder: Path, name: str) -> RewardWorker:
    tell(folder, name)
    return RewardWorker(SLOW, deadline_seconds=0.5, memory_gib=1.0, max_tokens=6)


class MortalReplay(Replay):
    """Dies before or after a write if a file says so."""

    folder: Path

    def admit(self, group: Group) -> Admission:
        self._die("before")
        admission = super().admit(group)
        self._die("after")
        return admission

    def _die(self, when: str) -> None:
        if (self.folder / f"die-{when}").exists():
            (self.folder / f"die-{when}").unlink()
            os._exit(9)


def replay(folder: Path, name: str) -> Replay:
    tell(folder, name)
    mortal = MortalReplay(folder / "journal", capacity=1000)
    mortal.folder = folder
    mortal.recover(lambda _: True)
    return mortal


def tell(folder: Path, name: str) -> None:
    scratch = folder / f".{name}"
    scratch.write_text(f"{os.getpid()}")
    scratch.rename(folder / f"{name}.pid")


def pids(folder: Path, kind: str) -> dict[str, int]:
    """Of every worker of a kind that there has been, by name."""
    return {file.stem: int(file.read_text()) for file in folder.glob(f"{kind}-*.pid")}
