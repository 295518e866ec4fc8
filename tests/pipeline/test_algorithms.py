"""Every algorithm through the one loop, and what only some of them do to a run."""

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from learner.algorithms.table import ALGORITHMS
from tests.helpers.runs import ROOT, assert_bit_equal, kill_after, launch, overrides, rows, trained_ordinals

ROUGH = f"reward.terms=[{{fn: '{ROOT}/tests/helpers/letters.py:roughly'}}]"
STEPS = 40


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_runs(tiny_model: Path, tmp_path: Path, name: str):
    folder = tmp_path / "run"
    launch(overrides(tiny_model, folder, f"algorithm={name}", "algorithm.minibatches=2", "run.steps=2"))
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2]
    for row in metrics:
        assert row["grad_norm"] > 0 and row["optimizer_steps"] == 2 and row["clipped_share"] is not None
        assert (row["value_loss"] is not None) == (name == "ppo") and (row["pairs"] is not None) == (
            name == "online_dpo"
        )
        assert (row["reference_kl"] is not None) == (name in ("rloo", "reinforce_pp", "ppo", "online_dpo"))


def test_flat_groups_are_sampled_again_within_bounds(tiny_model: Path, tmp_path: Path):
    more = [ROUGH, "algorithm=dapo", "algorithm.max_resampled=2", "run.steps=8", "learner.learning_rate=1e-9"]
    folder = tmp_path / "run"
    launch(overrides(tiny_model, folder, *more))
    metrics, flat = rows(folder), 0
    for row in metrics:
        table = pq.read_table(folder / "completions" / f"step-{row['step']:06d}.parquet").to_pydict()
        groups = {
            o: {r for p, r in zip(table["ordinal"], table["reward"], strict=True) if p == o} for o in table["ordinal"]
        }
        assert len(groups) == 2
        # A flat group is trained on only when as many as may be were refused.
        if any(len(found) == 1 for found in groups.values()):
            flat += 1
            assert row["resampled"] == 4
    assert sum(row["resampled"] for row in metrics) > 4
    assert metrics[-1]["dropped"] == sum(row["resampled"] for row in metrics)
    ordinals = trained_ordinals(folder, 8)
    assert len(ordinals) == len(set(ordinals)) == 16 and ordinals != list(range(16))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["dapo", "ppo"])
def test_killed_at_random_moments_the_run_ends_bit_equal(tiny_model: Path, tmp_path: Path, name: str):
    """The count of groups that were given up, and what the critic has learned, survive kill -9."""
    reward = ROUGH if name == "dapo" else "algorithm.ppo.critic_warmup_steps=2"
    more = (
        reward,
        f"algorithm={name}",
        "algorithm.minibatches=2",
        f"run.steps={STEPS}",
        "run.checkpoint_every=3",
        "evaluation.samples=0",
    )
    launch(overrides(tiny_model, tmp_path / "whole", *more))
    folder, draw = tmp_path / "killed", random.Random(0)
    arguments = overrides(tiny_model, folder, *more)
    kill_after([draw.uniform(0.5, 3.0) for _ in range(4)], arguments, folder)
    launch(arguments)
    assert_bit_equal(folder, tmp_path / "whole", STEPS)
