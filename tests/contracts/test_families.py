"""Engine, learner and plain passes of transformers agree for a tiny model of every family, in float32 on the CPU."""

from pathlib import Path

import pytest

from actors.engines.base import EngineUnavailable
from actors.engines.registry import choose_engine
from actors.models.families import FAMILIES
from actors.models.source import ModelSource
from benchmarks.family_models import ANSWER_TOKENS, PARTICULARS, make_family_model
from benchmarks.model_subject import engine_options, make_subject
from benchmarks.models import compare

TOLERANCE = 1e-4


def engines_of(model_type: str) -> list[str]:
    """vLLM where it computes the family on a CPU, and the simple engine."""
    try:
        choice = {"device": "cpu", "quantization": "none", "tensor_parallel_size": 1}
        choose_engine("vllm", family=FAMILIES[model_type], **choice)  # type: ignore[arg-type]
    except EngineUnavailable:
        return ["transformers"]
    return ["vllm", "transformers"]


# Language models of checkpoints with an image encoder, which are also there without it.
TWICE = ("gemma4", "mistral3", "qwen3_5")
PAIRS = [
    pytest.param(model_type, engine, marks=[pytest.mark.nightly] if i or model_type in TWICE else [])
    for model_type in FAMILIES
    for i, engine in enumerate(engines_of(model_type))
]


@pytest.mark.parametrize(("model_type", "engine"), PAIRS)
def test_engine_and_learner_compute_what_transformers_does(model_type: str, engine: str, tmp_path: Path):
    """Prompts that a group shares, answers of three windows, several adapters, a cold and a warm prefix cache."""
    source = ModelSource(str(make_family_model(model_type, tmp_path)), None, "")
    subject = make_subject(source, engine_options(source.path, answer_tokens=ANSWER_TOKENS), engine_name=engine)
    try:
        distances = compare(subject, vocabulary=300, answer_tokens=ANSWER_TOKENS)
    finally:
        subject.engine.close()
    assert subject.weights == "shared"
    assert distances.learner_max < TOLERANCE
    assert 0 < distances.engine_max < TOLERANCE
    assert 0 < distances.gradient < TOLERANCE  # of two computations, not of one with itself


def test_every_family_has_a_tiny_model():
    assert list(PARTICULARS) == list(FAMILIES)
