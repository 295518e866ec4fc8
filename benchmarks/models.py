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
from bitsandbytes.functional import dequantize_4bit
from transformers import PreTrainedModel

from actors.engines.base import Engine, EngineOptions
from actors.engines.registry import ENGINES
from actors.models.families import FAMILIES, family_of
from actors.models.hub import resolve_model
from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, LoraArguments, adapter_layout, lora_arguments_of
from actors.models.source import ModelSource
from actors.models.tokenizer import load_tokenizer
from actors.models.weight_sharing import (
    BaseWeights,
    Nf4Weight,
    SharesWeights,
    SharingImpossible,
    build_meta_model,
    named_base_weights,
    share_weights,
)
from actors.replay.schema import to_batch
from actors.rollout import RolloutWorker
from actors.types import Adapter, Group, Prompt, Sampling, Score, Truncation
from benchmarks.common import ON_GPU, report, sample_groups
from benchmarks.family_models import WINDOW, make_family_model
from conf.errors import UsageError
from learner.batch import Rollouts
from learner.minibatches import micro_batches
from learner.model.attention import NAME
from learner.model.logprobs import EVERY_TOKEN
from learner.model.policy import Policy
from learner.model.supported import check_attention, check_head

GROUP, PROMPT_TOKENS = 4, (70, 3)  # one prompt fills blocks of the prefix cache, one does not
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


@dataclass(frozen=True)
class Subject:
    """What is compared: an engine, a policy, and the model that plain passes are made of. `weights` says whether engine
    and policy share one copy, or why not."""

    source: ModelSource
    engine: Engine
    policy: Policy
    lora: LoraArguments
    weights: str

    def plain(self, dtype: torch.dtype, adapter: Adapter) -> FlatLora:
        """transformers' and PEFT's own model over the policy's weights, in `dtype`."""
        name = str(dtype).removeprefix("torch.")
        meta_model = build_meta_model(self.source, dtype=name, trust_remote_code=False)
        weights = named_base_weights(self.policy.lora.model)
        if dtype == torch.float32:
            weights: BaseWeights = {name: _unpacked(weight).float() for name, weight in weights.items()}
        lora = FlatLora(share_weights(meta_model, weights, device=str(self.policy.device)), **self.lora, seed=0)
        lora.load(adapter)
        return lora


def _unpacked(weight: torch.Tensor | Nf4Weight) -> torch.Tensor:
    return dequantize_4bit(weight.packed, weight.state) if isinstance(weight, Nf4Weight) else weight


def make_subject(
    source: ModelSource, options: EngineOptions, *, engine_name: str, truncation: Truncation = EVERY_TOKEN
) -> Subject:
    """Build an engine as `options` say and a policy, over one copy of the weights if that is possible."""
    meta_model = build_meta_model(source, dtype=options.dtype, trust_remote_code=False, attention=NAME)
    check_attention(meta_model, longest=options.max_model_len)
    check_head(meta_model)
    lora: LoraArguments = {"rank": 8, "alpha": 16.0, "target_modules": family_of(meta_model.config).targets}
    layout = adapter_layout(meta_model, **lora)
    tokenizer = load_tokenizer(source, chat_template=None, trust_remote_code=False)
    # Without an end of sequence every answer has its full length.
    engine = ENGINES[engine_name].build(options, tokenizer, layout=layout, eos_token_ids=())
    model, origin = _learner_model(source, options, engine, meta_model)
    policy = Policy(
        model,
        lora=lora_arguments_of(layout),
        seed=0,
        temperature=1.0,
        truncation=truncation,
        logit_chunk_tokens=64,
        gradient_checkpointing=False,
    )
    return Subject(source, engine, policy, lora, origin)


def _learner_model(
    source: ModelSource, options: EngineOptions, engine: Engine, meta_model: PreTrainedModel
) -> tuple[PreTrainedModel, str]:
    try:
        # The simple engine's own forward pass cannot share a model with the learner's adapter.
        if not isinstance(engine, SharesWeights) or not options.share_weights:
            raise SharingImpossible("not asked for")
        weights: BaseWeights = engine.base_weights()
        return share_weights(meta_model, weights, device=options.device), "shared"
    except SharingImpossible as reason:
        model = load_base_model(
            source,
            dtype=options.dtype,
            device=options.device,
            quantization=options.quantization,
            trust_remote_code=False,
            attention=NAME,
        )
        return model, str(reason)


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
    plain_T = _plain_logprobs(plain, rollouts)
    (plain_T.square().sum() / len(plain_T)).backward()
    assert plain.flat.grad is not None
    distance = float((packed_gradient - plain.flat.grad).norm() / plain.flat.grad.norm())
    with torch.no_grad():
        is_exact = policy.dtype == torch.float32
        exact_T = plain_T if is_exact else _plain_logprobs(subject.plain(torch.float32, adapter), rollouts)
    sampled_T = torch.cat([torch.tensor(row, device=policy.device) for row in rollouts.behavior_logprobs])
    row = {"exact": exact_T, "engine": sampled_T, "learner": logprobs_T, "plain": plain_T}
    return {name: values.detach().float() for name, values in row.items()}, distance


def _plain_logprobs(lora: FlatLora, rollouts: Rollouts) -> torch.Tensor:
    parts = []
    for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
        ids = torch.tensor(tokens, dtype=torch.long, device=lora.flat.device)
        logprobs_TV = lora.model(input_ids=ids[None]).logits[0].float().log_softmax(-1)[start - 1 : -1]
        parts.append(logprobs_TV.gather(1, ids[start:, None])[:, 0])
    return torch.cat(parts)


def engine_options(
    path: str, *, answer_tokens: int, quantization: str = "none", enforce_eager: bool = True
) -> EngineOptions:
    """Options of an engine for this comparison on this machine."""
    return EngineOptions(
        model_path=path,
        revision=None,
        trust_remote_code=False,
        dtype="bfloat16" if ON_GPU else "float32",
        quantization=quantization,
        device="cuda" if ON_GPU else "cpu",
        threads=torch.get_num_threads(),
        max_model_len=answer_tokens + 2 * max(PROMPT_TOKENS),
        max_num_seqs=8,
        max_num_batched_tokens=4096,
        kv_cache_bytes=(1 << 30) if ON_GPU else (128 << 20),
        enforce_eager=enforce_eager,
        per_request_seeds=True,
        seed=0,
        share_weights=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", choices=[[], *FAMILIES], default=[])
    parser.add_argument("--path")
    parser.add_argument("--engine", choices=list(ENGINES), default="vllm")
    parser.add_argument("--quantization", choices=["none", "nf4"], default="none")
    parser.add_argument("--compile", action="store_true", help="compile and capture graphs, as a run does on a GPU")
    parser.add_argument("--tokens", type=int, default=3 * WINDOW + 6)
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
            try:
                subject = make_subject(source, options, engine_name=arguments.engine)
                vocabulary = subject.policy.lora.model.config.get_text_config().vocab_size
                distances = compare(subject, vocabulary=vocabulary, answer_tokens=arguments.tokens)
            except (UsageError, RuntimeError, ValueError, AttributeError, TypeError) as error:
                report(benchmark="models", **described, error=f"{type(error).__name__}: {error}"[:300])
                continue
            report(benchmark="models", **described, weights=subject.weights, **asdict(distances))
            subject.engine.close()
            del subject
            gc.collect()
            if ON_GPU:
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
