"""The run folder: what is where in it, which process uses it, and which run it belongs to.

Knows files; knows no settings by name but the length of a run.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from conf.errors import UsageError, disk_errors


class RunFolderError(UsageError):
    """A folder that is in use, damaged or of another run; says what to do."""


class Layout:
    """Where things are in the run folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.journal = path / "journal"
        self.completions = path / "completions"
        self.adapter = path / "adapter"
        self.warmup = path / "warmup.jsonl"
        self.metrics = path / "metrics.jsonl"
        self.evaluations = path / "evaluations.jsonl"
        self.evaluation_rows = path / "evaluations"
        self.reward_log = path / "rewards.log"
        self.tensorboard = path / "tensorboard"
        self.settings = path / "settings.json"
        self.started = path / "started.json"
        self.page = path / "report.html"
        self.lock = path / "lock"


@dataclass(frozen=True)
class StoredSettings:
    """What settings.json holds of the last start of a run.

    `identity` is what must not change when it is resumed; a key that begins with "the " names what is known by a
    fingerprint only, which is not shown. `files` are fingerprints of the user's files by name.
    """

    identity: Mapping[str, object]
    settings: Mapping[str, object]
    files: Mapping[str, str]


class RunFolder(Layout):
    """Locks `path` for this process until `close` or its end.

    Raises RunFolderError if another process has it, and DiskError if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with disk_errors(path):
            self.completions.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                user = process_of(self.lock)
                raise RunFolderError(
                    f"run.folder={path} is in use by process {user or 'unknown'}; stop it or choose another folder"
                ) from None
            os.ftruncate(self._lock, 0)
            os.write(self._lock, f"{os.getpid()}\n".encode())

    def claim(self, now: StoredSettings, *, resume: str) -> list[str]:
        """Make the folder this run's, or check that it is; returns a line for each other setting or file that changed.

        Raises RunFolderError if the identity differs, if the folder holds a run and `resume` is "never", or if its
        settings.json is damaged.
        """
        changed: list[str] = []
        if self.settings.is_file():
            old = read_settings(self)
            check_identity(self, old.identity, now.identity, resume=resume)
            changed = [
                *_differences(old.settings, now.settings),
                *(f"the file {name}" for name, mark in old.files.items() if now.files.get(name, mark) != mark),
            ]
        scratch = self.settings.with_suffix(".writing")
        with disk_errors(self.path):
            scratch.write_text(json.dumps(asdict(now), indent=2))
            scratch.rename(self.settings)
        return [f"changed since this run was last started: {line}" for line in changed]

    def close(self) -> None:
        os.close(self._lock)


def read_settings(folder: Layout) -> StoredSettings:
    """What the run in `folder` was last started with. Raises RunFolderError if settings.json is damaged."""
    with disk_errors(folder.path):
        text = folder.settings.read_bytes()
    try:
        stored = json.loads(text)
        parts = stored["identity"], stored["settings"], stored.get("files", {})
        if not all(isinstance(part, dict) for part in parts):
            raise TypeError
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(
            f"{folder.settings} is damaged: choose another run.name, or delete {folder.path} if you need nothing of it"
        ) from error
    return StoredSettings(*parts)


def process_of(lock: Path) -> int | None:
    """The process that wrote the lock file; None if there is no file or it holds no process id."""
    with disk_errors(lock.parent):
        text = lock.read_bytes().strip() if lock.is_file() else b""
    return int(text) if text.isdigit() else None


def check_identity(folder: Layout, old: Mapping[str, object], new: Mapping[str, object], *, resume: str) -> None:
    """Raises RunFolderError if a run of identity `new` cannot resume the one of identity `old` in `folder`."""
    if resume == "never":
        raise RunFolderError(
            f"run.folder={folder.path} holds a run already; choose another run.name or run.resume=auto"
        )
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    lines = [
        f"  {key} have changed" if key.startswith("the ") else f"  {key}: {old.get(key)} there, {new.get(key)} now"
        for key in changed
    ]
    if lines:
        raise RunFolderError(
            f"run.folder={folder.path} holds another run; choose another run.name, or undo:\n" + "\n".join(lines)
        )


def _differences(old: object, new: object, key: str = "") -> list[str]:
    """What differs between two trees of settings, as "key: old, now new". The section `run` may change freely."""
    if key in ("run", "task"):
        return []
    if isinstance(old, dict) and isinstance(new, Mapping):
        keys = sorted(old.keys() | new.keys())
        return [line for k in keys for line in _differences(old.get(k), new.get(k), f"{key}.{k}".lstrip("."))]
    return [] if old == json.loads(json.dumps(new)) else [f"{key}: {old}, now {new}"]
