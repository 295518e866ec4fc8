"""Runs on several sources, on prompts of a measured difficulty, and with solved prompts seen again rarely."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.helpers.runs import Launched, assert_bit_equal, kill_after, launch, overrides, rows, steps_of, wait_for

LETTERS = f"{Path(__file__).parents[1]}/helpers/letters.py:score"


def write_rows(file: Path, count: int, question: str) -> Path:
    file.write_text(
        "".join(json.dumps({"question": question.format(i), "answer": str(i)}) + "\n" for i in range(count))
    )
    return file


def mixed(model: Path, folder: Path, *more: str) -> list[str]:
    """Two sources, of which the second is easy: every answer gets the full score."""
    one = write_rows(folder.parent / "sums.jsonl", 20, "{} + 0")
    two = write_rows(folder.parent / "easy.jsonl", 8, "say {}")
    sources = f"data.sources=[{{source: {one}, weight: 3}}, {{source: {two}, name: words}}]"
    terms = (
        f"reward.terms=[{{fn: '{LETTERS}', sources: [sums], max_score: 1}}, "
        "{fn: length, sources: [words], options: {target: 100, maximum: 200}}]"
    )
    return overrides(model, folder, "data.source=''", sources, terms, "algorithm.prompts_per_step=4", *more)


def test_sources_are_trained_and_measured_apart(tiny_model: Path, tmp_path: Path):
    folder = tmp_path / "run"
    output = launch(mixed(tiny_model, folder))
    assert "16 prompts to train on, 4 held out" in output and "4 prompts to train on, 4 held out" in output
    for row in rows(folder):
        by_source = row["by_source"]
        assert {name: of["completions"] for name, of in by_source.items()} == {"sums": 12, "words": 4}
        assert by_source["words"]["reward_terms"] == {"length": 1.0} and by_source["words"]["zero_variance_share"] == 1
        assert list(by_source["sums"]["reward_terms"]) == ["score"]
        assert row["reward"] == pytest.approx((3 * by_source["sums"]["reward"] + by_source["words"]["reward"]) / 4)
    last = json.loads((folder / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["by_source"]["words"]["greedy"]["reward"] == 1.0 and last["greedy"]["prompts"] == 8
    assert "; sums: mean reward" in output and "; words: mean reward 1.000" in output


def test_solved_prompts_come_again_rarely_and_a_killed_run_ends_bit_equal(tiny_model: Path, tmp_path: Path):
    steps = 60
    more = (
        f"run.steps={steps}",
        "run.checkpoint_every=4",
        "run.keep_checkpoints=2",
        "data.revisit_solved=0",
        "evaluation.samples=0",
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    launch(mixed(tiny_model, whole, *more))
    kill_after([0.5, 1.0, 0.7, 1.4], mixed(tiny_model, killed, *more), killed)
    # Ctrl-C saves between two checkpoints, which must not change what the next epochs know.
    done = steps_of(killed)
    running = Launched(mixed(tiny_model, killed, *more), tmp_path / "log")
    wait_for(lambda: steps_of(killed) > done + 5 or not running.process.is_alive())
    os.kill(running.pid, signal.SIGINT)
    assert running.wait()[0] == 130
    launch(mixed(tiny_model, killed, *more))
    assert_bit_equal(killed, whole, steps)
    state = json.loads((whole / "checkpoints" / f"step-{steps:08}" / "state.json").read_text())["prompts"]
    assert state["words"]["solved"] == [0, 1, 2, 3]
    assert any(left_out for _, _, left_out in state["words"]["epochs"]) is False  # all are solved: all come again
    assert state["sums"]["epochs"][0] == [0, 0, []]


def measured(model: Path, folder: Path, *more: str) -> list[str]:
    return overrides(
        model,
        folder,
        "task=difficulty",
        f"reward.terms=[{{fn: '{LETTERS}', max_score: 1}}]",
        "difficulty.samples=3",
        *more,
    )


def test_the_difficulty_of_each_row_is_written_beside_the_data(tiny_model: Path, tmp_path: Path):
    output = launch(measured(tiny_model, tmp_path / "run"))
    file = tmp_path / "sums.difficulty.jsonl"
    measured_rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["question"] for row in measured_rows] == [f"{i} + 1" for i in range(20)]
    assert all(row["pass_rate"] in (0, 1 / 3, 2 / 3, 1) for row in measured_rows)
    assert f"written to {file}" in output and not (tmp_path / "run").exists()
    assert not list(tmp_path.glob("*.partial"))
    assert [row["mean_reward"] for row in measured_rows] != [measured_rows[0]["mean_reward"]] * 20


def test_a_measurement_goes_on_where_it_was_stopped(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = launch(measured(tiny_model, tmp_path / "whole", f"difficulty.output={tmp_path}/whole.jsonl"))
    assert "20 prompts" in whole
    output = tmp_path / "stopped.jsonl"
    arguments = measured(tiny_model, tmp_path / "run", f"difficulty.output={output}")
    running = Launched(arguments, tmp_path / "log", prepare=_one_prompt_at_a_time)

    def kept() -> list[str]:
        return [line for file in tmp_path.glob("stopped.*.partial") for line in file.read_text().splitlines()]

    wait_for(lambda: len(kept()) > 3)
    os.kill(running.pid, signal.SIGINT)
    code, _ = running.wait()
    assert code == 130 and not output.exists()
    known = len(kept()) - 1
    assert f"20 prompts of sums, {known} of them measured already" in launch(arguments)
    assert output.read_text() == (tmp_path / "whole.jsonl").read_text()


def _one_prompt_at_a_time() -> None:
    from epiphany import sampling_workers

    sampling_workers.COMPLETIONS = 1


def test_a_run_trains_on_what_is_neither_too_easy_nor_too_hard(tiny_model: Path, tmp_path: Path):
    file = tmp_path / "rated.jsonl"
    rated = [{"question": f"{i} + 0", "answer": "1", "pass_rate": i / 20} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rated))
    folder = tmp_path / "run"
    output = launch(overrides(tiny_model, folder, f"data.source={file}", "data.difficulty=[0.2, 0.7]"))
    assert "prompts whose pass rate is not between 0.2 and 0.7" in output and steps_of(folder) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["data.sources=[{source: a.jsonl}]"], "data.sources stands in place of data.source="),
        (["data.source=''", "data.sources=[{source: a/x.jsonl}, {source: b/x.jsonl}]"], "2 sources are named 'x'"),
        (["data.source=''", "data.sources=[{src: a.jsonl}]"], "data.sources: a source has no src; did you mean"),
        (["data.source=''"], "data.source: name a file"),
        (["data.difficulty=[0.9, 0.1]"], "give the lowest and the highest pass rate"),
        (["data.difficulty=[0.1, 0.9]"], "has no pass_rate; task=difficulty writes"),
        (["task=difficulty", "difficulty.output=sums.csv"], "difficulty.output=sums.csv: name another .jsonl file"),
        (["data.revisit_solved=0.5"], "the largest reward is not known of sums"),
        (["reward.terms=[{fn: exact, sources: [other]}]"], "exact names the source 'other'; there are sums"),
    ],
)
def test_sources_that_cannot_work_are_refused(tiny_model: Path, tmp_path: Path, more: list[str], message: str):
    assert message in launch(overrides(tiny_model, tmp_path / "run", *more), expect=2)
