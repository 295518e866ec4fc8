"""The notebook in examples/ runs from its first cell to its last, with a tiny model in place of a real one."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests.helpers.runs import ROOT, overrides

NOTEBOOK = ROOT / "examples" / "first_run.ipynb"
SHELL = re.compile(r"^(\s*)([!%])(.*)$", re.MULTILINE)


def as_python(cell: dict) -> str:
    """A cell's source, its lines for the shell as calls of `shell`, as a notebook runs them."""
    return SHELL.sub(lambda line: f"{line[1]}shell({line[2]!r}, f'''{line[3]}''')", "".join(cell["source"]))


def test_the_notebook_runs(tiny_model: Path, tmp_path: Path, monkeypatch, capsys):
    small = overrides(tiny_model, tmp_path / "run", "run.name=first", "run.steps=1", "evaluation.max_prompts=2")
    small = [one for one in small if not one.startswith("run.folder=")]
    monkeypatch.chdir(tmp_path)
    # The notebook works in the checkout; its run belongs to the test.
    for name in ("launch.py", "tests", "conf", "epiphany", "actors", "learner", "rewards"):
        (tmp_path / name).symlink_to(ROOT / name)

    def shell(kind: str, command: str) -> None:
        assert kind == "!" and "git" not in command  # nothing is installed in a checkout
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        print(done.stdout)

    names: dict[str, object] = {"shell": shell}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        exec(compile(as_python(cell), "cell", "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names["settings"] = [f"'{one}'" for one in small]
    output = capsys.readouterr().out
    assert "nothing is in the way" in output and "step 1 {'greedy': None" in output
    assert (tmp_path / "runs" / "first" / "report.html").is_file()


def test_no_output_is_stored_in_it():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
