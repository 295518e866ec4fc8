"""Whole runs of launch.py on a tiny model: what they leave, and what bad input gets."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.runs import (
    OF_MODULES,
    launch,
    launch_beside_shadows,
    overrides,
    rows,
    trained_ordinals,
)


def gaps(completions: pa.Table) -> list[float]:
    """Between the learner's and the engine's log-probability, of each token that was trained; there must be one."""
    rows_of_both = zip(
        *(completions.column(f"{name}_logprobs").to_pylist() for name in ("policy", "behavior")), strict=True
    )
    of_rows = [abs(ours - its) for both in rows_of_both for ours, its in zip(*both, strict=True) if ours is not None]
    assert of_rows
    return of_rows


def test_a_run_leaves_metrics_completions_checkpoints_and_the_adapter(whole: tuple[Path, str]):
    folder, output = whole
    metrics = rows(folder)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert all(row["logprob_gap"] < 1e-3 and row["staleness_max"] == 0 and row["grad_norm"] > 0 for row in metrics)
    assert [row["step"] for row in rows(folder, "evaluations")] == [0, 4]
    trained = [pq.read_table(folder / "completions" / f"step-{n:06d}.parquet") for n in range(1, 5)]
    assert [sorted(set(t.column("ordinal").to_pylist())) for t in trained] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert all(t.num_rows == 8 for t in trained)
    assert max(gap for t in trained for gap in gaps(t)) < 1e-3
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "checkpoints" / "latest").read_text() == "step-00000004"
    assert json.loads((folder / "adapter" / "adapter_config.json").read_text())["r"] == 4
    assert "the first prompt, as the model sees it:\n<s>user: " in output
    assert "held-out prompts" in output and "step 4/4" in output


def test_the_reward_rises(whole: tuple[Path, str], tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    launch(overrides(tiny_model, folder, "run.steps=80", "run.checkpoint_every=80", "learner.learning_rate=0.02"))
    metrics = rows(folder)
    first, last = (sum(r["reward"] for r in part) / 5 for part in (metrics[:5], metrics[-5:]))
    assert last > first + 0.1


def test_a_run_that_diverges_ends_with_a_sentence(tiny_model: Path, tmp_path: Path):
    output = launch(overrides(tiny_model, tmp_path / "run", "learner.learning_rate=1e30"), expect=2)
    assert "the run has diverged" in output and "learner.learning_rate" in output and "Traceback" not in output


def test_a_folder_with_the_users_own_rewards_and_conf_works(tiny_model: Path, tmp_path: Path):
    """Names that users give their files: none of them comes before ours. Over Ray: test_ray_runs.py."""
    output = launch_beside_shadows(tmp_path, overrides(tiny_model, tmp_path / "run", *OF_MODULES, "run.steps=1"))
    assert "saved" in output


def test_staleness_is_bounded_and_no_ordinal_is_lost_or_doubled(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    launch(overrides(tiny_model, folder, "runtime.max_staleness=1", "run.steps=8", "engine.max_num_seqs=6"))
    metrics = rows(folder)
    assert max(row["staleness_max"] for row in metrics) == 1
    assert trained_ordinals(folder, 8) == list(range(16))


def test_a_hostile_reward_costs_samples_and_not_the_run(tiny_model: Path, tmp_path: Path):
    reward = tmp_path / "sometimes.py"
    reward.write_text(
        "import os\nimport time\n\n\ndef score(sample):\n"
        "    kind = sum(map(ord, sample.completion)) % 5\n"
        "    if kind == 0:\n        os._exit(9)\n"
        "    if kind == 1:\n        raise ValueError('no')\n"
        "    return len(sample.completion) / 10\n"
    )
    folder = tmp_path / "run"
    launch(
        overrides(
            tiny_model,
            folder,
            f"reward.terms=[{{fn: '{reward}:score'}}]",
            "reward.min_scored_fraction=0.25",
            "run.steps=3",
        )
    )
    assert sum(row["unscorable"] for row in rows(folder)) > 0
    table = pq.read_table(folder / "completions" / "step-000001.parquet")
    assert any(error for error in table.column("error").to_pylist()) or rows(folder)[-1]["dropped"] > 0


def test_a_reward_that_scores_nothing_stops_the_run_with_the_reason(tiny_model: Path, tmp_path: Path):
    reward = tmp_path / "broken.py"
    reward.write_text("def score(sample):\n    raise ValueError('my own mistake')\n")
    output = launch(overrides(tiny_model, tmp_path / "run", f"reward.terms=[{{fn: '{reward}:score'}}]"), expect=2)
    assert "could not be scored" in output and "my own mistake" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["run.stepz=3"], "there is no setting run.stepz; did you mean run.steps?"),
        (["group_size=3"], "there is no setting group_size; did you mean algorithm.group_size?"),
        (["algorithm.group_size=1"], "algorithm.group_size=1: must be at least 2"),
        (["reward.terms=[{fn: nosuch.module:f}]"], "does not import"),
        (["data.max_prompt_tokens=3"], "all 20 prompts are over data.max_prompt_tokens=3"),
        (["data.prompt_column=ask"], "there is no such column, there are question, answer"),
        (["model.path=/no/such/folder"], "no folder /no/such/folder"),
        (["model.lora.target_modules=[nosuch]"], "['nosuch'] match no module"),
        (
            [
                "reward.terms=[{fn: numeric}, {fn: exact}]",
                "reward.check_reference_answer=true",
                "data.answer_column=question",
            ],
            "do not get the full score, for example in ",
        ),
        (
            ["reward.terms=[{fn: numeric}]", "reward.check_reference_answer=true", "data.answer_column=question"],
            "is no number: choose reward=exact for words",
        ),
        (["sampling.max_tokens=600"], "data.max_prompt_tokens + sampling.max_tokens = 1112: "),
        (["engine.name=vllm", "model.quantization=nf4"], "vLLM holds no nf4 weights on a CPU"),
    ],
)
def test_bad_input_says_what_to_change(tiny_model: Path, tmp_path: Path, more: list[str], message: str):
    output = launch(overrides(tiny_model, tmp_path / "run", *more), expect=2)
    assert message in output
    assert "Traceback" not in output


def test_help_lists_groups_and_examples():
    output = launch(["--help"])
    assert (
        "algorithm: cispo, dapo, dr_grpo, grpo, gspo, online_dpo, ppo, reinforce_pp, rloo" in output
        and output.count("python launch.py") >= 8
    )


def test_a_sweep_gives_each_job_a_folder_of_its_own_values(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"

    def sweep(rates: str) -> dict[float, float]:
        launch(["-m", *overrides(tiny_model, folder, "run.steps=1"), f"learner.learning_rate={rates}"])
        metrics = [rows(job) for job in folder.iterdir()]
        return {job[0]["learning_rate"]: job[0]["seconds"] for job in metrics}

    first = sweep("0.01")
    # One value more, in front of the other: that is not run again, and nobody takes another's folder.
    second = sweep("0.005,0.01")
    assert sorted(first) == [0.01] and sorted(second) == [0.005, 0.01]
    assert all(second[rate] == seconds for rate, seconds in first.items())
