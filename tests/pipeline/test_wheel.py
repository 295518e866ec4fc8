"""The wheel holds what a user needs, and its console script runs from any folder."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.helpers.runs import ROOT


def test_the_wheel_runs_from_any_folder(tmp_path: Path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    expected = {str(f.relative_to(ROOT)) for f in (ROOT / "conf").rglob("*.yaml")}
    expected |= {
        str(f.relative_to(ROOT))
        for p in ("conf", "rewards", "actors", "learner", "epiphany")
        for f in [*(ROOT / p).rglob("*.py"), ROOT / p / "py.typed"]
    }
    assert expected | {"launch.py", "epiphany/trainer.py"} <= names
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    # What the console script of the wheel does, with the wheel's files in front of everything else.
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import launch; print(launch.__file__); launch.main()"
    command = [sys.executable, "-c", code, str(tmp_path / "site"), "--cfg", "job", "run.steps=7"]
    output = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
    assert output.startswith(str(tmp_path / "site"))
    assert "steps: 7" in output and "path: HuggingFaceTB/SmolLM2-135M-Instruct" in output


def test_the_console_script_is_installed():
    script = Path(sys.executable).with_name("epiphany")
    output = subprocess.run([script, "--cfg", "job"], check=True, capture_output=True, text=True, cwd="/").stdout
    assert "prompts_per_step: 8" in output
