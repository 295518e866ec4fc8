"""A run that several files compare with."""

from pathlib import Path

import pytest

from tests.helpers.runs import launch, overrides


@pytest.fixture(scope="module")
def whole(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 4 steps that nobody interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, launch(overrides(tiny_model, folder))
