"""The proof of an export: answers that the training engine gave, and what the exported model says of their tokens.

Log-probabilities are compared token by token, in nats. Whoever loads the export is somebody else: plain transformers,
PEFT or llama.cpp. Knows engines by their answers only.
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel

from actors.models.loading import model_class
from epiphany.export.gguf import run
from epiphany.export.merge import ExportError

# What the mean may be at most: what the export's own type costs, and what an engine in 16 bits, or over other weights
# than the exported ones (nf4), differs by anyway. A garbage export is whole nats away.
FORMAT_COSTS = {
    **{"float32": 1e-4, "bfloat16": 0.1, "float16": 0.02},
    **{"f16": 0.02, "bf16": 0.1, "q8_0": 0.1, "q4_k_m": 0.5},
}
ENGINE_COSTS = {"float32": 0.0, "bfloat16": 0.1, "float16": 0.05, "nf4": 0.3}


@dataclass(frozen=True)
class Answer:
    """An answer of the training engine: the tokens of its prompt, its own tokens, and their log-probabilities."""

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Proof:
    """How far the export's log-probabilities of the answers' tokens are from the engine's (mean and largest, nats), how
    often the export's own choice is the same token, over how many tokens of how many answers, and the bound of `mean`.
    """

    loaded_by: str
    mean: float
    largest: float
    same_token: float
    tokens: int
    answers: int
    bound: float

    @property
    def holds(self) -> bool:
        return self.mean <= self.bound

    def line(self) -> str:
        """For the user."""
        return (
            f"loaded by {self.loaded_by}: its log-probabilities of {self.tokens} tokens in {self.answers} answers "
            f"differ from the training engine's by {self.mean:.2g} nats in the mean (allowed: {self.bound:.2g}), "
            f"{self.largest:.2g} at most; {self.same_token:.1%} of its own choices are the same token"
        )


def bound_of(kind: str, *, engine_dtype: str, quantization: str) -> float:
    """The largest mean that an export of this type may have."""
    engine = "nf4" if quantization == "nf4" else engine_dtype
    return FORMAT_COSTS[kind] + ENGINE_COSTS[engine]


def prove_transformers(folder: Path, answers: Sequence[Answer], *, bound: float, adapter: Path | None = None) -> Proof:
    """Load the model in `folder` by transformers, with `adapter` on it by PEFT if there is one, and compare."""
    config = AutoConfig.from_pretrained(folder)
    dtype = torch.float32 if _fits_float32(folder) else "auto"
    model: PreTrainedModel = model_class(config).from_pretrained(folder, config=config, dtype=dtype).eval()
    by = "transformers"
    if adapter is not None:
        model, by = PeftModel.from_pretrained(model, str(adapter)), "PEFT"  # type: ignore[assignment]
    values, same = [], []
    with torch.inference_mode():
        for answer in answers:
            ids = torch.tensor([[*answer.prompt, *answer.tokens]])
            logits_TV = model(input_ids=ids).logits[0, len(answer.prompt) - 1 : -1].float()
            tokens = ids[0, len(answer.prompt) :, None]
            values.append((logits_TV.gather(1, tokens)[:, 0] - logits_TV.logsumexp(-1)).tolist())
            same.append((logits_TV.argmax(-1) == tokens[:, 0]).tolist())
    return _compared(by, answers, values, same, bound)


def check_llama_cpp() -> None:
    """Raises ExportError if nothing here can load a GGUF file."""
    if importlib.util.find_spec("xllamacpp") is None:
        raise ExportError("task=export: a GGUF file is proved by llama.cpp; pip install 'epiphany-rl[gguf]'")


def prove_llama_cpp(file: Path, answers: Sequence[Answer], *, bound: float, threads: int) -> Proof:
    """Load the GGUF file by llama.cpp and compare. A token that is not among the most probable ones counts as the last
    of these. Raises ExportError with what llama.cpp says if it cannot load the file.
    """
    # -P: without it, our gguf.py would come before the package gguf.
    command = [sys.executable, "-P", str(Path(__file__).with_name("llama_cpp.py")), str(file), str(threads)]
    asked = json.dumps([[answer.prompt, answer.tokens] for answer in answers])
    said = run(command, f"llama.cpp cannot load {file}", asked=asked)
    values, same = [], []
    for answer, places in zip(answers, json.loads(said), strict=True):
        pairs = [(token, dict(map(tuple, place))) for token, place in zip(answer.tokens, places, strict=True)]
        values.append([place.get(token, min(place.values())) for token, place in pairs])
        same.append([max(place, key=place.__getitem__) == token for token, place in pairs])
    return _compared("llama.cpp", answers, values, same, bound)


def _compared(
    by: str, answers: Sequence[Answer], values: list[list[float]], same: list[list[bool]], bound: float
) -> Proof:
    pairs = zip(answers, values, strict=True)
    distances = [abs(a - b) for answer, of in pairs for a, b in zip(answer.logprobs, of, strict=True)]
    return Proof(
        loaded_by=by,
        mean=statistics.fmean(distances),
        largest=max(distances),
        same_token=statistics.fmean(choice for of in same for choice in of),
        tokens=len(distances),
        answers=len(answers),
        bound=bound,
    )


def _fits_float32(folder: Path) -> bool:
    """Whether the host has memory for the model in float32."""
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return 2.5 * size < psutil.virtual_memory().available
