"""Policies, learners and a table of rollouts on the tiny model."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import torch

from actors.models.layer_loading import load_by_layer
from actors.models.loading import load_base_model
from actors.models.lora import FlatLora, LoraArguments
from actors.models.source import ModelSource
from actors.models.weight_sharing import build_meta_model
from learner.algorithms.base import Algorithm
from learner.batch import Rollouts
from learner.learner import Learner
from learner.model.attention import NAME
from learner.model.critic import Critic
from learner.model.policy import Policy
from learner.optimizer import Optimizer, Schedule
from learner.parallel.sharding import Shard, ShardedBase, ShardedLayer
from tests.helpers.rollouts import group, table, turns_of

LORA: LoraArguments = {
    "rank": 4,
    "alpha": 8.0,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


def make_policy(
    folder: Path,
    *,
    temperature: float = 1.0,
    checkpointing: bool = False,
    quantization: str = "none",
    dtype: str = "float32",
    tile_tokens: int | None = None,
    adapter_slots: Sequence[torch.Tensor] | None = None,
    targets: Sequence[str] | None = None,
) -> Policy:
    """A policy on the model in `folder` whose adapter, on `targets` or all linear layers, is random."""
    source = ModelSource(str(folder), None, "test")
    model = load_base_model(
        source, dtype=dtype, device="cpu", quantization=quantization, trust_remote_code=False, attention=NAME
    )
    policy = Policy(
        model,
        lora=lora_on(targets),
        seed=0,
        temperature=temperature,
        logit_chunk_tokens=5,
        gradient_checkpointing=checkpointing,
        tile_tokens=tile_tokens,
        adapter_slots=adapter_slots,
    )
    randomize(policy.lora)
    return policy


def lora_on(targets: Sequence[str] | None) -> LoraArguments:
    return LORA if targets is None else {**LORA, "target_modules": list(targets)}


def make_sharded_policy(
    folder: Path, shard: Shard, *, quantization: str = "none", targets: Sequence[str] | None = None
) -> tuple[Policy, ShardedBase]:
    """The policy of `make_policy`, of whose base this rank keeps a part."""
    source, layers = ModelSource(str(folder), None, "test"), list[ShardedLayer]()
    meta = build_meta_model(source, dtype="float32", trust_remote_code=False, attention=NAME)
    model = load_by_layer(
        meta,
        source,
        device="cpu",
        quantization=quantization,
        kept=frozenset(),
        trust_remote_code=False,
        after_layer=lambda layer: layers.append(ShardedLayer(layer, shard)),
    )
    lora = lora_on(targets)
    policy = Policy(model, lora=lora, seed=0, temperature=1.0, logit_chunk_tokens=5, gradient_checkpointing=True)
    randomize(policy.lora)
    return policy, ShardedBase(layers, shard)


def randomize(lora: FlatLora) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        lora.flat.add_(0.05 * torch.randn(lora.flat.shape, generator=generator))


def gradient_of(lora: FlatLora) -> torch.Tensor:
    """The flat gradient, as it is now."""
    assert lora.flat.grad is not None
    return lora.flat.grad


def plain_logprobs(
    folder: Path, policy: Policy, rollouts: Rollouts, *, temperature: float = 1.0
) -> tuple[FlatLora, list[torch.Tensor], list[torch.Tensor]]:
    """What a forward pass of each whole sequence gives, by transformers alone, with the policy's adapter.

    The adapter that gets the gradients; and of each trajectory the log-probability and the entropy of every token
    behind the prompt.
    """
    source = ModelSource(str(folder), None, "test")
    plain = load_base_model(source, dtype="float32", device="cpu", quantization="none", trust_remote_code=False)
    lora = FlatLora(plain, **LORA, seed=0)
    lora.load(policy.lora.export(0))
    logprobs, entropies = [], []
    for tokens, start in zip(rollouts.token_ids, rollouts.prompt_lengths, strict=True):
        token_ids = torch.tensor(tokens, dtype=torch.long)
        logits = lora.model(input_ids=token_ids[None]).logits[0] / temperature
        logprobs_TV = logits.log_softmax(-1)[start - 1 : -1]
        logprobs.append(logprobs_TV[range(len(tokens) - start), token_ids[start:]])
        entropies.append(-(logprobs_TV.exp() * logprobs_TV).sum(-1))
    return lora, logprobs, entropies


def make_learner(
    policy: Policy,
    algorithm: Algorithm,
    *,
    learning_rate: float = 1e-3,
    micro_batch_tokens: int = 8192,
    kind: str = "adamw",
    max_grad_norm: float = 1.0,
    weight_decay: float = 0.0,
    schedule: Schedule | None = None,
    sharded: ShardedBase | None = None,
) -> Learner:
    """A learner with the defaults of conf/schema.py, but for a learning rate that shows in one step."""
    optimizer = Optimizer(
        policy.lora.flat,
        kind=kind,
        learning_rate=learning_rate,
        betas=(0.9, 0.999),
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        schedule=schedule or Schedule("constant", warmup_steps=0, min_lr_ratio=0.0, steps=10),
    )
    critic = None
    if algorithm.has_critic:
        ppo = algorithm.settings.ppo
        critic = Critic(
            policy.hidden_size,
            learning_rate=ppo.value_learning_rate,
            value_clip=ppo.value_clip,
            device=policy.device,
        )
    return Learner(
        policy,
        algorithm,
        optimizer=optimizer,
        micro_batch_tokens=micro_batch_tokens,
        critic=critic,
        sharded=sharded,
    )


def a_table() -> pa.Table:
    """Two groups of four trajectories, of unlike lengths."""
    draw = torch.Generator().manual_seed(2)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 250, (count,), generator=draw).tolist()

    groups = []
    for ordinal, (prompt, sizes) in enumerate([(9, [1, 4, 7, 2]), (3, [5, 5, 1, 6])]):
        completions = [tokens(count) for count in sizes]
        groups.append(group(ordinal, [1.0, 0.0, 0.5, 0.25], prompt=tokens(prompt), completions=completions))
    return table(groups)


def a_table_of_turns() -> pa.Table:
    """Two groups of trajectories of several turns among others of one: sampled and given tokens, in many orders."""
    draw = torch.Generator().manual_seed(3)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 250, (count,), generator=draw).tolist()

    first = [turns_of(3, 2, 4), turns_of(5), turns_of(2, 3, starts_sampled=False), turns_of(1, 1, 1, 3)]
    second = [turns_of(1), turns_of(2, 1, 1, 2, 3), turns_of(1, 4, 2, 1, starts_sampled=False), turns_of(1, 2)]
    groups = []
    for ordinal, (prompt, turns) in enumerate([(6, first), (3, second)]):
        completions = [tokens(sum(turn.length for turn in of_one)) for of_one in turns]
        rewards = [1.0, 0.0, 0.5, 0.25]
        groups.append(group(ordinal, rewards, prompt=tokens(prompt), completions=completions, turns=turns))
    return table(groups)
