from pathlib import Path

import pytest

from actors.models import _move


def test_of_two_processes_that_convert_a_model_the_slower_takes_the_others(tmp_path: Path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(name)
        _move(tmp_path / name, tmp_path / "model")
    assert (tmp_path / "model" / "config.json").read_text() == "first"


def test_a_model_whose_place_is_taken_by_something_else_is_an_error(tmp_path: Path):
    for name in ("scratch", "model"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "something").touch()
    with pytest.raises(OSError):
        _move(tmp_path / "scratch", tmp_path / "model")
