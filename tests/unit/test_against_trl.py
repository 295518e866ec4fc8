"""Losses and gradients against TRL's own code, called on the same tensors."""

import importlib
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from learner.algorithms.base import Algorithm, LossInputs, OldLogprobs
from tests.helpers.presets import default_algorithm
from tests.helpers.rewarded import rewarded_batch

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
trl = importlib.import_module("trl")

LENGTHS = torch.tensor([3, 5, 1, 4, 2, 5, 3, 4])
GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS = torch.tensor([1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
MAX_TOKENS = 6
TOKENS = int(LENGTHS.sum())
ROWS = torch.arange(8).repeat_interleave(LENGTHS)
Result = tuple[torch.Tensor, torch.Tensor]  # loss and gradient


class OneProcess:
    """What TRL asks of its accelerator, where there is one process."""

    num_processes = 1
    device = "cpu"

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def numbers(seed: int, spread: float) -> torch.Tensor:
    return spread * torch.randn(TOKENS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


OLD = -2 + numbers(0, 0.5)
BEHAVIOR = OLD + numbers(1, 0.8)
REFERENCE = OLD + numbers(2, 0.3)
POLICY = OLD + numbers(3, 0.4)


def padded(values_A: torch.Tensor) -> torch.Tensor:
    """[A] as TRL has it: [N, longest], zeros behind each completion."""
    rows = torch.nn.utils.rnn.pad_sequence(list(values_A.split(LENGTHS.tolist())), batch_first=True)
    return torch.nn.functional.pad(rows, (0, 5 - rows.shape[1]))


def unpadded(values: torch.Tensor | None) -> torch.Tensor:
    """What `padded` made, as [A] again."""
    assert values is not None
    return torch.cat([row[:n] for row, n in zip(values, LENGTHS, strict=True)])


def learned(algorithm: Algorithm, *, old: torch.Tensor) -> Result:
    """An algorithm on all of it, in one micro-batch."""
    batch = rewarded_batch(REWARDS, GROUPS, LENGTHS)
    prepared = algorithm.prepare(batch, OldLogprobs(old, REFERENCE))
    order = torch.cat([ROWS.eq(row).nonzero()[:, 0] for unit in prepared.pack_units for row in unit])
    policy = POLICY.clone().requires_grad_()
    inputs = LossInputs(
        rows_T=ROWS[order],
        advantages_T=prepared.advantages_A[order],
        weights_T=algorithm.weights(batch, prepared.counted_N)[ROWS[order]].double(),
        behavior_logprobs_T=BEHAVIOR[order],
        policy_logprobs_T=policy[order],
        old_logprobs_T=old[order],
        reference_logprobs_T=REFERENCE[order] if algorithm.reference_in_loss else None,
    )
    loss = algorithm.loss(inputs)
    loss.backward()
    assert policy.grad is not None
    return loss.detach(), policy.grad


def ours(name: str, **changed: Any) -> Result:
    return learned(default_algorithm(name, max_tokens=MAX_TOKENS, **changed), old=OLD)


def stub(policy: torch.Tensor, **attributes: object) -> Any:
    """What TRL's _compute_loss reads of its trainer."""
    defaults = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (policy, torch.zeros_like(policy), None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "accelerator": OneProcess(),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_entropy_bonus_enabled": False,
        "args": SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1),
    }
    return SimpleNamespace(**(defaults | attributes))


TOKENS_OF_TRL = {
    "prompt_ids": torch.zeros(8, 1),
    "prompt_mask": torch.ones(8, 1),
    "completion_ids": torch.zeros(8, 5),
}


def theirs(
    loss_type: str, advantages: torch.Tensor, importance: torch.Tensor | None = None, **attributes: object
) -> Result:
    policy = padded(POLICY).requires_grad_()
    mask = padded(torch.ones(TOKENS, dtype=torch.float64))
    inputs = {
        **TOKENS_OF_TRL,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": padded(OLD),
        "ref_per_token_logps": padded(REFERENCE),
        "num_items_in_batch": mask.sum(),
    }
    if importance is not None:
        inputs["importance_sampling_ratio"] = importance
        attributes["use_vllm"] = True
    loss = trl.GRPOTrainer._compute_loss(stub(policy, loss_type=loss_type, **attributes), None, inputs)
    loss.backward()
    return loss.detach(), unpadded(policy.grad)


def group_advantages(scale: bool = True) -> torch.Tensor:
    rewards = REWARDS.view(2, 4)
    centered = rewards - rewards.mean(1, keepdim=True)
    return (centered / (rewards.std(1, keepdim=True) + 1e-4) if scale else centered).flatten()


def assert_same(result: Result, expected: Result) -> None:
    assert expected[1].abs().max() > 1e-3
    torch.testing.assert_close(result[0], expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(result[1], expected[1], atol=1e-5, rtol=1e-5)


PLAIN = {"importance_sampling_cap": None}


def test_grpo_is_trls():
    assert_same(ours("grpo", **PLAIN), theirs("grpo", group_advantages()))


def test_grpo_with_kl_and_a_two_sided_clip_is_trls():
    result = ours("grpo", kl_coefficient=0.1, dual_clip=1.5, clip_high=0.28, **PLAIN)
    args = SimpleNamespace(use_bias_correction_kl=False, delta=1.5, steps_per_generation=1)
    assert_same(result, theirs("grpo", group_advantages(), beta=0.1, epsilon_high=0.28, args=args))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_importance_weights_are_trls(level: str, mode: str):
    difference = padded(OLD - BEHAVIOR)
    ratio = (difference.sum(1, keepdim=True) if level == "sequence" else difference).exp()
    ratio = ratio.clamp(max=2.0) if mode == "truncate" else ratio.masked_fill(ratio > 2.0, 0.0)
    result = ours("grpo", importance_sampling_cap=2.0, importance_sampling_level=level, importance_sampling_mode=mode)
    assert_same(result, theirs("grpo", group_advantages(), importance=ratio))


def test_dr_grpo_is_trls():
    assert_same(ours("dr_grpo", **PLAIN), theirs("dr_grpo", group_advantages(scale=False)))


def test_dapo_is_trls():
    assert_same(ours("dapo", clip_high=0.28, **PLAIN), theirs("dapo", group_advantages(), epsilon_high=0.28))


def test_gspo_is_trls():
    clip = {"clip_low": 0.05, "clip_high": 0.08}
    expected = theirs(
        "grpo", group_advantages(), importance_sampling_level="sequence", epsilon_low=0.05, epsilon_high=0.08
    )
    assert_same(ours("gspo", **clip, **PLAIN), expected)


def test_cispo_is_trls():
    # TRL's epsilon_high is the cap itself.
    assert_same(
        ours("cispo", clip_low=1.0, clip_high=0.3, **PLAIN), theirs("cispo", group_advantages(), epsilon_high=1.3)
    )


def test_rloo_on_policy_has_trls_gradient():
    """TRL's loss is a clipped ratio, ours REINFORCE: on the policy that was sampled from their gradients agree."""
    policy = padded(POLICY).requires_grad_()
    mask = padded(torch.ones(TOKENS, dtype=torch.float64))
    rewards = REWARDS - 0.05 * torch.zeros(8, dtype=torch.float64).index_add(0, ROWS, POLICY - REFERENCE)
    advantages = (rewards.view(2, 4) - (rewards.view(2, 4).sum(1, keepdim=True) - rewards.view(2, 4)) / 3).flatten()
    old = padded(POLICY).sum(1)
    inputs = {**TOKENS_OF_TRL, "completion_mask": mask, "advantages": advantages, "old_logps": old}
    trl.RLOOTrainer._compute_loss(stub(policy), None, inputs).backward()
    expected = unpadded(policy.grad)

    kl = {"kl_coefficient": 0.05, "kl_estimator": "k1", "kl_placement": "reward"}
    rloo = default_algorithm("rloo", max_tokens=MAX_TOKENS, importance_sampling_cap=None, **kl)
    _, gradient = learned(rloo, old=POLICY)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_online_dpo_is_trls(kind: str):
    from trl.experimental.online_dpo import OnlineDPOTrainer

    # TRL samples two completions of each prompt; of four, ours takes the best and the worst: rows 0 and 1, 6 and 4.
    chosen, rejected = [0, 6], [1, 4]
    policy, reference = padded(POLICY).requires_grad_(), padded(REFERENCE)
    mask = padded(torch.ones(TOKENS, dtype=torch.float64))
    rows = [*chosen, *rejected]
    unset = dict.fromkeys(("missing_eos_penalty", "torch_empty_cache_steps", "optim"))
    model: Any = SimpleNamespace(train=lambda: None)
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(**unset, loss_type=kind, use_vllm=False, n_gpu=1, gradient_accumulation_steps=1),
        _generate=lambda *_: (torch.zeros(2, 1), torch.ones(2, 1), torch.zeros(4, 5, dtype=torch.long), mask[rows]),
        _forward=lambda which, *_: (reference if which == "reference" else policy)[rows],
        _calculate_rewards_from_functions=lambda **_: REWARDS[rows],
        reward_funcs=[None],
        ref_model="reference",
        eos_token_ids=[1],
        is_vision_model=False,
        accelerator=OneProcess(),
        stats=defaultdict(list),
        beta=0.1,
        model=model,
        processing_class=SimpleNamespace(batch_decode=lambda ids, **_: ["x"] * len(ids)),
        state=SimpleNamespace(global_step=1),
    )
    loss = OnlineDPOTrainer.training_step(trainer, model, {"prompt": ["a", "b"]})
    gradient = unpadded(policy.grad)
    assert_same(ours("online_dpo", preference_loss=kind, beta=0.1), (loss, gradient))
