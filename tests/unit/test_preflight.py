"""What is checked before torch is imported: reference answers, and that each mistake is told without it."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from actors.data.readers import DataError
from conf.compose import load_settings
from conf.schema import Settings
from epiphany.reward_check import CHECKED_ANSWERS, check_reward
from epiphany.rows import read_rows
from tests.helpers.runs import ROOT


def settings_of(folder: Path, answers: Sequence[str], *more: str) -> Settings:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"question": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return load_settings("data=file", f"data.source={file}", "data.held_out=1", "reward=numeric", *more)


def lines_of(settings: Settings) -> list[str]:
    lines: list[str] = []
    check_reward(settings, read_rows(settings), lines.append)
    return lines


def test_good_reference_answers_are_one_line(tmp_path: Path):
    assert lines_of(settings_of(tmp_path, ["1"])) == ["reward: the reference answer '1' scores 1 of 1"]
    assert lines_of(settings_of(tmp_path, ["1", "2"])) == ["reward: 2 reference answers, such as '1', score 1 of 1"]


def test_a_bad_row_behind_the_first_is_named_with_its_line(tmp_path: Path):
    with pytest.raises(DataError) as refused:
        lines_of(settings_of(tmp_path, ["1", "seven", "3"]))
    own_error, line, advice = str(refused.value).splitlines()
    assert own_error == "no term applies" and "'seven' is no number: choose reward=exact" in advice
    place = f"{tmp_path}/rows.jsonl:2"
    assert (
        line == f"1 of 3 reference answers do not get the full score, for example in {place}: 'seven' cannot be scored"
    )


def test_a_few_bad_rows_are_said_and_many_are_refused(tmp_path: Path):
    answers = ["1"] * (3 * CHECKED_ANSWERS)
    answers[3] = answers[6] = "no number"  # of every third one, which are scored
    lines = lines_of(settings_of(tmp_path, answers))
    assert lines[0] == f"reward: {CHECKED_ANSWERS} reference answers, such as '1', score 1 of 1"
    assert lines[1].startswith(f"2 of {CHECKED_ANSWERS} reference answers do not get the full score, for example in ")
    answers[: len(answers) // 5] = ["no number"] * (len(answers) // 5)
    with pytest.raises(DataError, match=f"13 of {CHECKED_ANSWERS} reference answers"):
        lines_of(settings_of(tmp_path, answers))
    lines = lines_of(settings_of(tmp_path, answers, "reward.check_reference_answer=false"))
    assert lines[1].startswith(f"13 of {CHECKED_ANSWERS} reference answers")


def test_held_out_rows_of_their_own_are_checked_too(tmp_path: Path):
    test = tmp_path / "test.jsonl"
    test.write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(DataError, match=r"1 of 1 reference answers .*test\.jsonl:1"):
        lines_of(settings_of(tmp_path, ["1", "2"], f"data.held_out_source={test}"))


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own, from `folder`."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


EARLY = """
import sys, epiphany
from conf.errors import UsageError
for arguments in {arguments!r}:
    try:
        epiphany.train(epiphany.load_settings(*arguments))
    except UsageError as error:
        print(repr(str(error)))
    else:
        print("no error")
print("torch" in sys.modules, "transformers" in sys.modules)
"""


def test_mistakes_are_told_before_torch_is_imported(tmp_path: Path):
    good = tmp_path / "good.jsonl"
    good.write_text('{"question": "a", "answer": "1"}\n' * 3)
    (tmp_path / "latin.csv").write_bytes("question,answer\nÄ,1\n".encode("latin-1"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "broken.py").write_text("def score(sample):\n    return 1 +\n")
    (tmp_path / "file").write_text("")
    run = ["data=file", "run.folder=run", "data.source=good.jsonl", "reward=exact"]
    cases = [
        (["data=file", "run.folder=run"], "data.source: name a file"),
        (["data.source=no.csv"], "no file no.csv"),
        (["data.source=latin.csv"], "is not UTF-8 but probably LATIN1"),
        (["data.source=cut.parquet"], "not a complete Parquet file"),
        (["data.answer_column=label"], "there is no such column, there are question, answer"),
        (["run.sinks=[trackio]"], "needs the package trackio"),
        (["run.folder=file/run"], "cannot be written or read"),
        (["reward.terms=[{fn: 'broken.py:score'}]"], "does not import: broken.py:2: SyntaxError"),
        (["reward=numeric", "data.answer_column=question"], "is no number"),
    ]
    arguments = [[*run, *more] if more[0] != "data=file" else more for more, _ in cases]
    done = run_python(EARLY.format(arguments=arguments), tmp_path)
    assert done.returncode == 0, done.stderr
    *errors, loaded = [line for line in done.stdout.splitlines() if not line.startswith("checking")]
    for error, (_, message) in zip(errors, cases, strict=True):
        assert message in error
    assert loaded == "False False"


def test_progress_bars_of_libraries_are_off():
    code = "from epiphany.quiet import quiet_libraries as quiet; quiet(); import tqdm; list(tqdm.tqdm(range(3)))"
    done = run_python(code, ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_of_the_users_that_hides_a_package_is_named(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("")
    done = run_python("import epiphany", tmp_path)
    assert f"ImportError: {tmp_path}/rewards.py hides rewards, which is Epiphany's; rename it" in done.stderr
