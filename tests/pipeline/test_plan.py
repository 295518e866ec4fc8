"""`task=plan`: what would run, and what is refused, without starting or writing anything."""

from pathlib import Path

import pytest
import torch

from tests.helpers.runs import launch, overrides


def test_a_plan_says_what_would_run_and_writes_nothing(tiny_model: Path, tmp_path: Path):
    output = launch(overrides(tiny_model, tmp_path / "run", "task=plan"))
    assert "engine transformers" in output and "16 prompts to train on, 4 held out" in output
    assert "4 steps of grpo, each 2 prompts x 4 completions of up to 6 tokens" in output
    assert "trains a LoRA adapter of rank 4 on" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="plans for its own card")
def test_a_plan_for_a_card_that_this_machine_has_not(tiny_model: Path, tmp_path: Path):
    arguments = [one for one in overrides(tiny_model, tmp_path / "run", "task=plan") if one != "hardware=cpu"]
    output = launch([*arguments, "hardware=8gb"])
    assert "this machine has no GPU; on a card with a limit of 7.4 GiB:\nmemory plan: " in output
    assert "answers of up to 512 tokens fit, all that the model has positions for" in output


def test_a_plan_for_ray_is_one_for_each_kind_of_worker(tiny_model: Path, tmp_path: Path):
    workers = ("runtime=ray", "runtime.rollout_workers=3", "runtime.learner_data_parallel_size=2")
    output = launch(overrides(tiny_model, tmp_path / "run", "task=plan", *workers))
    assert "3 rollout workers, each on a machine like this one:\nengine transformers" in output
    assert "2 learners, each on a machine like this one:\ncpu in float32" in output


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["reward.terms=[{fn: 'no.py:score'}]"], "does not import"),
        (["data.source=no.csv"], "no file no.csv"),
        (["run.sinks=[trackio]"], "needs the package trackio"),
        (["model.path=/no/such/folder"], "no folder /no/such/folder"),
        (["sampling.max_tokens=600"], "data.max_prompt_tokens + sampling.max_tokens = 1112: "),
    ],
)
def test_a_plan_refuses_what_the_run_would_refuse(tiny_model: Path, tmp_path: Path, more: list[str], message: str):
    output = launch(overrides(tiny_model, tmp_path / "run", "task=plan", *more), expect=2)
    assert message in output and "Traceback" not in output
