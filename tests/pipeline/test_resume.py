"""Runs of launch.py that are stopped, killed or changed, and how they go on."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from actors.replay.queue import Replay
from tests.helpers.runs import (
    Launched,
    assert_bit_equal,
    kill_after,
    launch,
    lock_of,
    overrides,
    rows,
    steps_of,
    trained_ordinals,
    wait_for,
)
from tests.helpers.tiny import make_tiny_model

STEPS = 4  # of the run `whole`


def test_a_finished_run_is_shown_and_not_loaded_again(whole: tuple[Path, str], tiny_model: Path):
    folder, _ = whole
    before = (folder / "metrics.jsonl").read_text()
    output = launch(overrides(tiny_model, folder))
    assert "nothing is left to do" in output and "held-out prompts" in output and "base weights" not in output
    assert (folder / "metrics.jsonl").read_text() == before


def test_ctrl_c_saves_and_the_run_goes_on_bit_equal(whole: tuple[Path, str], tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    arguments = overrides(tiny_model, folder, "run.checkpoint_every=100")
    running = Launched(arguments, tmp_path / "log")
    wait_for(lambda: steps_of(folder))
    os.kill(running.pid, signal.SIGINT)
    code, output = running.wait()
    assert code == 130, output
    saved = (folder / "checkpoints" / "latest").read_text()
    assert f"saved {folder}/checkpoints/{saved}" in output
    launch(overrides(tiny_model, folder))
    assert_bit_equal(folder, whole[0], STEPS)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_that_is_interrupted_lets_its_job_save(tiny_model: Path, tmp_path: Path, signal_number: signal.Signals):
    folder = tmp_path / "run"
    arguments = overrides(tiny_model, folder, "run.steps=100000", "run.checkpoint_every=100000")
    running = Launched(["-m", *arguments, "learner.learning_rate=0.001,0.002"], tmp_path / "log")
    wait_for(lambda: any(steps_of(job) for job in folder.iterdir()) if folder.exists() else False)
    # The terminal sends Ctrl-C to the whole group; a scheduler's SIGTERM goes to the process that it started.
    (os.killpg if signal_number == signal.SIGINT else os.kill)(running.pid, signal_number)
    code, output = running.wait(60)
    assert code == 128 + signal_number and "Traceback" not in output, output
    assert [(job / "checkpoints" / "latest").is_file() for job in folder.iterdir()] == [True]


@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.nightly)])
def test_killed_at_random_moments_the_run_ends_bit_equal(tiny_model: Path, tmp_path: Path, kills: int):
    """kill -9 of the whole process group, again and again; then adapter, optimizer, data order and journal are
    whole.
    """
    steps = 60 * kills
    more = (f"run.steps={steps}", "run.checkpoint_every=10", "run.keep_checkpoints=2", "evaluation.samples=0")
    launch(overrides(tiny_model, tmp_path / "whole", *more))
    folder = tmp_path / "killed"
    arguments = overrides(tiny_model, folder, *more)
    draw = random.Random(0)
    # The moments are spread over start-up, rollout, learning, and journal and checkpoint writes.
    done = kill_after([draw.uniform(0.0, 3.0) for _ in range(kills)], arguments, folder)
    assert len(set(done)) > kills // 5, done  # the kills met a run that made progress
    launch(arguments)
    assert_bit_equal(folder, tmp_path / "whole", steps)
    assert [row["step"] for row in rows(folder)] == list(range(1, steps + 1))
    journal = Replay(folder / "journal", capacity=100)
    journal.recover(lambda _: True)
    assert journal.torn_bytes() == 0


def test_a_preempted_evaluation_stops_within_seconds(tiny_model: Path, tmp_path: Path):
    """Machines that are taken away give 30 seconds; this evaluation would take 40."""
    slow = tmp_path / "slow.py"
    slow.write_text("import time\n\n\ndef score(sample):\n    time.sleep(2.5)\n    return 1.0\n")
    folder = tmp_path / "run"
    arguments = overrides(tiny_model, folder, f"reward.terms=[{{fn: '{slow}:score'}}]", "evaluation.samples=3")
    running = Launched(arguments, tmp_path / "log")
    wait_for(lambda: "base weights" in running.log.read_text() if running.log.exists() else False)
    asked = time.monotonic()
    os.kill(running.pid, signal.SIGTERM)
    code, output = running.wait(15)
    assert code == 143 and time.monotonic() - asked < 15, output
    assert rows(folder, "evaluations") == [] if (folder / "evaluations.jsonl").exists() else True


def test_what_changes_training_is_refused_or_said_when_a_run_goes_on(
    whole: tuple[Path, str], tiny_model: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    data = f"data.source={whole[0].parent / 'sums.jsonl'}"
    for setting, message in (
        ("sampling.temperature=0.7", "sampling.temperature: 1.0 there, 0.7 now"),
        ("reward.terms=[{fn: numeric}]", "reward.terms: "),
        ("model.dtype=bfloat16", "model.dtype: auto there, bfloat16 now"),
    ):
        output = launch(overrides(tiny_model, folder, data, setting), expect=2)
        assert "holds another run" in output and message in output and "Traceback" not in output
    output = launch(overrides(tiny_model, folder, data, "learner.optimizer=adamw8bit"), expect=2)
    assert "moments are those of adamw: set learner.optimizer=adamw" in output and "Traceback" not in output
    output = launch(overrides(tiny_model, folder, data, "learner.learning_rate=0.005", "run.steps=5"))
    assert "changed since this run was last started: learner.learning_rate: 0.01, now 0.005" in output


def test_a_reward_file_that_changed_is_said_when_a_run_goes_on(tiny_model: Path, tmp_path: Path):
    reward, folder = tmp_path / "reward.py", tmp_path / "run"
    reward.write_text("def score(sample):\n    return float(len(sample.completion))\n")
    own = f"reward.terms=[{{fn: '{reward}:score'}}]"
    assert "changed since" not in launch(overrides(tiny_model, folder, own, "run.steps=1"))
    reward.write_text("def score(sample):\n    return float(len(set(sample.completion)))\n")
    output = launch(overrides(tiny_model, folder, own, "run.steps=2"))
    assert f"changed since this run was last started: the file {reward}" in output


def test_other_weights_behind_the_same_path_are_refused(tmp_path: Path):
    model, folder = make_tiny_model(tmp_path / "model"), tmp_path / "run"
    launch(overrides(model, folder, "run.steps=1", "evaluation.samples=0"))
    make_tiny_model(model, seed=1)
    output = launch(overrides(model, folder, "run.steps=2", "evaluation.samples=0"), expect=2)
    assert "the base model's weights have changed" in output


def test_a_run_goes_on_with_fewer_prompts_than_its_journal_holds(tiny_model: Path, tmp_path: Path):
    folder, more = tmp_path / "run", ("run.checkpoint_every=100", "run.steps=100", "evaluation.samples=0")
    running = Launched(overrides(tiny_model, folder, *more, "algorithm.prompts_per_step=8"), tmp_path / "log")
    wait_for(lambda: steps_of(folder))
    running.kill()
    output = launch(overrides(tiny_model, folder, "algorithm.prompts_per_step=1", "run.steps=10", *more[:1]))
    assert "1 scored groups recovered from the journal" in output
    assert trained_ordinals(folder, 10) == list(range(10))


def test_a_folder_in_use_or_of_another_run_is_refused(whole: tuple[Path, str], tiny_model: Path, tmp_path: Path):
    folder, _ = whole
    output = launch(overrides(tiny_model, folder, "algorithm.group_size=6", "model.lora.rank=8"), expect=2)
    assert "algorithm.group_size: 4 there, 6 now" in output and "model.lora.rank: 4 there, 8 now" in output
    assert "holds a run already" in launch(overrides(tiny_model, folder, "run.resume=never"), expect=2)
    busy = tmp_path / "busy"
    running = Launched(overrides(tiny_model, busy, "run.steps=10000"), tmp_path / "log")
    wait_for(lambda: lock_of(busy) == running.pid)
    assert f"in use by process {running.pid}" in launch(overrides(tiny_model, busy), expect=2)
    running.kill()


def test_damaged_checkpoints_are_skipped(whole: tuple[Path, str], tiny_model: Path, tmp_path: Path):

    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    weights = folder / "checkpoints" / "step-00000004" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (folder / "checkpoints" / "step-00000003" / "state.json").write_text("{")
    output = launch(overrides(tiny_model, folder, f"data.source={whole[0].parent / 'sums.jsonl'}"))
    assert "adapter_model.safetensors does not match its checksum" in output
    assert "resuming from" in output and "step-00000002" in output
    assert_bit_equal(folder, whole[0], STEPS)
