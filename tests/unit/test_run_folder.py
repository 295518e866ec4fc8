"""The run folder: whose it is, damaged files in it, and a disk that refuses."""

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from conf.errors import DiskError, UsageError, disk_errors
from epiphany.report.run_folder import RunFolder, RunFolderError, StoredSettings
from epiphany.report.status import show_status
from tests.helpers.step_numbers import WORKERS

Values = dict[str, Any]
IDENTITY = {"algorithm.group_size": 4, "the training prompts": "0123abcd", "the base model's weights": "beef"}


def claim(path: Path, identity: Values, settings: Values, *, files: Values | None = None, resume="auto") -> list[str]:
    folder = RunFolder(path)
    try:
        return folder.claim(StoredSettings(identity, settings, files or {}), resume=resume)
    finally:
        folder.close()


def test_another_run_is_refused_with_values_and_without_hashes(tmp_path: Path):
    claim(tmp_path, IDENTITY, {"a": 1})
    changed = {"algorithm.group_size": 6, "the training prompts": "4567cdef", "the base model's weights": "cafe"}
    with pytest.raises(RunFolderError) as refused:
        claim(tmp_path, changed, {"a": 1})
    assert str(refused.value).splitlines()[1:] == [
        "  algorithm.group_size: 4 there, 6 now",
        "  the base model's weights have changed",
        "  the training prompts have changed",
    ]
    assert claim(tmp_path, IDENTITY, {"a": 2, "run": {"steps": 9}}) == [
        "changed since this run was last started: a: 1, now 2"
    ]
    with pytest.raises(RunFolderError, match="holds a run already"):
        claim(tmp_path, IDENTITY, {"a": 2}, resume="never")


def test_a_file_of_the_users_that_changed_is_named(tmp_path: Path):
    claim(tmp_path, {}, {}, files={"my.py": "1", "gone.py": "2"})
    assert claim(tmp_path, {}, {}, files={"my.py": "3"}) == ["changed since this run was last started: the file my.py"]
    assert claim(tmp_path, {}, {}, files={"my.py": "3"}) == []


@pytest.mark.parametrize("garbage", [b"{", b"[]", b'{"identity": 1, "settings": 2}', b"\xff\xfe", b""])
def test_damaged_settings_are_a_sentence(tmp_path: Path, garbage: bytes):
    (tmp_path / "settings.json").write_bytes(garbage)
    with pytest.raises(RunFolderError, match=r"settings.json is damaged: choose another run.name"):
        claim(tmp_path, IDENTITY, {})
    with pytest.raises(RunFolderError, match=r"settings.json is damaged"):
        show_status(Console(), tmp_path)


def status_of(folder: Path) -> str:
    out = io.StringIO()
    show_status(Console(file=out, width=200), folder)
    return out.getvalue()


@pytest.mark.parametrize("lock", [b"", b"none of yours", b"\xff\xfe"])
def test_a_damaged_lock_is_no_obstacle(tmp_path: Path, lock: bytes):
    claim(tmp_path, {}, {"run": {"steps": 3}})
    (tmp_path / "lock").write_bytes(lock)
    assert "step 0 of 3, not running" in status_of(tmp_path)
    first = RunFolder(tmp_path)
    (tmp_path / "lock").write_bytes(lock)
    with pytest.raises(RunFolderError, match="is in use by process unknown"):
        RunFolder(tmp_path)
    first.close()


def test_a_disk_that_refuses_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match=r"file/run cannot be written or read \(Not a directory\): make space or"):
        RunFolder(tmp_path / "file" / "run")
    with pytest.raises(DiskError, match="No space left on device"), disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_the_status_of_a_run_folder(tmp_path: Path):
    row = {"step": 1, "reward": 0.5, "seconds": 1.0, "workers": WORKERS}
    folder = RunFolder(tmp_path / "run")
    folder.claim(StoredSettings({}, {"run": {"steps": 7}}, {}), resume="auto")
    assert f"step 0 of 7, running as process {os.getpid()}; checkpoint none" in status_of(folder.path)
    folder.metrics.write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 2}) + "\n")
    text = status_of(folder.path)
    assert "step 2 of 7" in text and "the last step ended" in text and "reward 0.500" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["rollout-0", "100", "3", "1", "0"],
        ["reward-0", "-", "1", "-", "2"],
    ]
    folder.metrics.write_text('{"step": 2}\n')
    assert "reward -" in status_of(folder.path)
    folder.close()
    with pytest.raises(UsageError, match="holds no run"):
        show_status(Console(), tmp_path)
