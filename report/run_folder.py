"""The run folder: who holds it, which run it belongs to, and what lies where in it."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from conf.errors import UsageError


class RunFolderError(UsageError):
    """A folder that is in use or holds another run; the message says whose and what to do."""


class Layout:
    """What lies where in the run folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal"
        self.completions = path / "completions"
        self.adapter = path / "adapter"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.tensorboard = path / "tensorboard"
        self.settings = path / "settings.json"
        self.lock = path / "lock"


class RunFolder(Layout):
    """Holds `path` for this process until `close` (or its death). Raises RunFolderError if another process does."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.completions.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunFolderError(f"run.folder={path} cannot be made: {error.strerror}") from error
        self._lock = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = self.lock.read_text().strip() or "unknown"
            os.close(self._lock)
            raise RunFolderError(
                f"run.folder={path} is in use by process {pid}; stop it or choose another folder"
            ) from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def claim(self, identity: dict[str, Any], settings: dict[str, Any], *, resume: str) -> list[str]:
        """Make the folder this run's, or check that it is. `identity` is what must not change between sessions; of other settings
        that have changed there is a line each.

        Raises RunFolderError with the differences listed, or if the folder holds a run and `resume` is "never".
        """
        changed: list[str] = []
        if self.settings.is_file():
            stored = json.loads(self.settings.read_text())
            held = stored["identity"]
            changed = [f"changed since this run began: {line}" for line in _differences(stored["settings"], settings)]
            if resume == "never":
                raise RunFolderError(
                    f"run.folder={self.path} holds a run already; choose another run.name or run.resume=auto"
                )
            keys = sorted(held.keys() | identity.keys())
            lines = [
                f"  {k}: {held.get(k)} there, {identity.get(k)} now" for k in keys if held.get(k) != identity.get(k)
            ]
            if lines:
                raise RunFolderError(
                    f"run.folder={self.path} holds another run; choose another run.name, or undo:\n" + "\n".join(lines)
                )
        scratch = self.settings.with_suffix(".writing")
        scratch.write_text(json.dumps({"identity": identity, "settings": settings}, indent=2))
        scratch.rename(self.settings)
        return changed

    def close(self) -> None:
        os.close(self._lock)


def _differences(old: Any, new: Any, key: str = "") -> list[str]:
    """What differs between two trees of settings, as "key: old, now new". Where a run lies and how long it is may change freely."""
    if key in ("run", "task"):
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == json.loads(json.dumps(new)) else [f"{key}: {old}, now {new}"]
