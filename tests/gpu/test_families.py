"""Every family on a GPU, in bf16 and nf4: engine and learner are as close to float32 as a plain 16-bit pass is."""

import gc
from pathlib import Path

import pytest
import torch

from actors.models.families import FAMILIES
from actors.models.source import ModelSource
from benchmarks.family_models import ANSWER_TOKENS, make_family_model
from benchmarks.model_subject import engine_options, make_subject
from benchmarks.models import compare
from tests.helpers.gpu import NEEDS_GPU

pytestmark = [*NEEDS_GPU, pytest.mark.nightly]
PAIRS = [
    (model_type, quantization)
    for model_type, family in FAMILIES.items()
    for quantization in ("none", "nf4")
    if not (family.has_experts and quantization == "nf4")  # refused
]


@pytest.mark.parametrize(("model_type", "quantization"), PAIRS)
def test_engine_and_learner_are_no_further_from_float32_than_plain_bf16(
    model_type: str, quantization: str, tmp_path: Path
):
    source = ModelSource(str(make_family_model(model_type, tmp_path)), None, "")
    options = engine_options(source.path, answer_tokens=ANSWER_TOKENS, quantization=quantization)
    subject = make_subject(source, options, engine_name="auto")
    try:
        distances = compare(subject, vocabulary=300, answer_tokens=ANSWER_TOKENS)
    finally:
        subject.engine.close()
    del subject
    gc.collect()
    torch.cuda.empty_cache()
    assert distances.engine_mean < 1.25 * distances.plain_mean
    assert distances.learner_mean < 1.25 * distances.plain_mean
