"""Which families are trained exactly: `python -m benchmarks.models [family ...] [--path MODEL] [--quantization nf4]`.

For a tiny model of each family (family_models.py), or the model at --path, the engine and the learner are compared with
plain passes of transformers and PEFT, one completion at a time: prompts that a group shares, answers of three windows,
before and after an update, with a cold and a warm prefix cache. In float32 all three must agree; in 16 bits engine and
learner must be no further from float32 than a plain 16-bit pass over the same weights. One JSON line for each.
"""

import argparse
import gc
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import torch

from actors.engines.registry import ENGINES
from actors.models.families import FAMILIES
from actors.models.hub import resolve_model
from actors.models.lora import FlatLora
from actors.models.source import ModelSource
from actors.replay.schema import to_batch
from actors.rollout import RolloutWorker
from actors.types import Adapter, Group, Prompt, Sampling, Score
from benchmarks.common import ON_GPU, report, sample_groups
from benchmarks.family_models import ANSWER_TOKENS, make_family_model
from benchmarks.model_subject import LONGEST_PROMPT, Subject, engine_options, make_subject
from conf.errors import UsageError
from learner.batch import Rollouts
from learner.minibatches import micro_batches

GROUP, PROMPT_TOKENS = 4, (LONGEST_PROMPT, 3)
UPDATES = (0.0, 0.05, 0.1)  # scale of the adapter; 0 is the base model


@dataclass(frozen=True)
class Distances:
    """How far log-probabilities are from a plain pass in float32 over the same weights: the largest distance of any
    token, and the mean.

    `plain_mean` is that of a plain pass in the model's own dtype. `gradient` is the relative distance of the packed
    path's gradient from the plain one's, in the model's dtype.
    """

    engine_max: float
    engine_mean: float
    learner_max: float
    learner_mean: float
    plain_mean: float
    gradient: float
    tokens: int


def compare(subject: Subject, *, vocabulary: int, answer_tokens: int) -> Distances:
    """Sample with several adapters, each twice, and compare."""
    worker = RolloutWorker(subject.engine, seed=1)
    draw = torch.Generator().manual_seed(2)
    layout, device = subject.policy.lora.layout, subject.policy.device
    direction = torch.randn(layout.size, generator=draw).to(device)
    prompts = [
        Prompt(i, "", tuple(torch.randint(2, vocabulary, (count,), generator=draw).tolist()), "", None, "")
        for i, count in enumerate(PROMPT_TOKENS)
    ]
    rows: list[dict[str, torch.Tensor]] = []
    gradient = 0.0
    for version, scale in enumerate(UPDATES):
        adapter = Adapter(version, layout, direction * scale)
        worker.load_adapter(adapter)
        subject.policy.lora.load(adapter)
        for _ in ("cold", "warm"):  # the second time, the prompts are in the prefix cache
            groups = sample_groups(worker, prompts, Sampling(1.0, answer_tokens), GROUP)
            rollouts = rollouts_of(groups)
            row, distance = _compare_once(subject, adapter, rollouts)
            rows.append(row)
            gradient = max(gradient, distance)
    exact, engine, learner, plain = (torch.cat([row[name] for row in rows]) for name in rows[0])
    return Distances(
        engine_max=float((engine - exact).abs().max()),
        engine_mean=float((engine - exact).abs().mean()),
        learner_max=float((learner - exact).abs().max()),
        learner_mean=float((learner - exact).abs().mean()),
        plain_mean=float((plain - exact).abs().mean()),
        gradient=gradient,
        tokens=len(exact),
    )


def rollouts_of(groups: list[Group]) -> Rollouts:
    scored = [replace(group, scores=tuple(Score(float(i)) for i in range(GROUP))) for group in groups]
    return Rollouts.from_table(pa.Table.from_batches([to_batch(group) for group in scored]))


def _compare_once(subject: Subject, adapter: Adapter, rollouts: Rollouts) -> tuple[dict[str, torch.Tensor], float]:
    """Log-probabilities of every sampled token by each way, and the distance of the gradients."""
    policy = subject.policy
    units = [(row,) for row in range(len(rollouts.token_ids))]
    (batch,) = micro_batches(rollouts, units, max_tokens=1 << 30, device=policy.device)
    assert policy.lora.flat.grad is not None
    policy.lora.flat.grad.zero_()
    logprobs_T = policy.logprobs(batch).logprobs_T
    (logprobs_T.square().sum() / len(logprobs_T)).backward()
    packed_gradient = policy.lora.flat.grad.clone()
    plain = subject.plain(policy.dtype, adapter)
    plain_T = _plain_logprobs(plain, rollouts, tokens=len(logprobs_T))
    assert plain.flat.grad is not None
    distance = float((packed_gradient - plain.flat.grad).norm() / plain.flat.grad.norm())
    is_exact = policy.dtype == torch.float32
    exact_T = plain_T if is_exact else _plain_logprobs(subject.plain(torch.float32, adapter), rollouts)
    sampled_T = torch.cat([torch.tensor(row, device=policy.device) for row in rollouts.behavior_logprobs])
    row = {"exact": exact_T, "engine": sampled_T, "learner": logprobs_T, "plain": plain_T}
    return {name: values.detach().float() for name, values in row.items()}, distance


def _plain_logprobs(lora: FlatLora, rollouts: Rollouts, *, tokens: int | None = None) -> torch.Tensor:
    """Of every completion token, by a pass over each whole sequence. With `tokens`, their number, the gradient of the
    mean of squares is left in the adapter; one sequence's logits exist at a time.
    """
    parts = []
    for sequence, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
        ids = torch.tensor(sequence, dtype=torch.long, device=lora.flat.device)
        with torch.set_grad_enabled(tokens is not None):
            logits_TV = lora.model(input_ids=ids[None]).logits[0, start - 1 : -1].float()
            logprobs_T = logits_TV.gather(1, ids[start:, None])[:, 0] - logits_TV.logsumexp(-1)
            if tokens is not None:
                (logprobs_T.square().sum() / tokens).backward()
        parts.append(logprobs_T.detach())
    return torch.cat(parts)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    parser.add_argument("--path")
    parser.add_argument("--engine", choices=["auto", *ENGINES], default="auto")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--compile", action="store_true", help="compile and capture graphs, as a run does on a GPU")
    parser.add_argument("--tokens", type=int, default=ANSWER_TOKENS)
    arguments = parser.parse_args()
    for name in [arguments.path] if arguments.path else arguments.families or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.path:
                source = resolve_model(name, revision=None, package=None, package_path=None)
            else:
                source = ModelSource(str(make_family_model(name, Path(folder))), None, name)
            options = engine_options(
                source.path,
                answer_tokens=arguments.tokens,
                quantization=arguments.quantization,
                enforce_eager=not arguments.compile,
            )
            described = {"model": Path(name).name, "engine": arguments.engine, "quantization": arguments.quantization}
            subject = None
            try:
                subject = make_subject(source, options, engine_name=arguments.engine)
                vocabulary = subject.policy.lora.model.config.get_text_config().vocab_size
                described["engine"] = subject.engine_name
                distances = compare(subject, vocabulary=vocabulary, answer_tokens=arguments.tokens)
            except (UsageError, RuntimeError, ValueError, AttributeError, TypeError) as error:
                report(benchmark="models", **described, error=f"{type(error).__name__}: {error}"[:300])
            else:
                report(benchmark="models", **described, weights=subject.weights, **asdict(distances))
            finally:
                if subject is not None:
                    subject.engine.close()
            del subject
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
