"""The laws of the house that no linter knows."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("conf", "rewards", "actors", "learner", "epiphany")
SOURCES = [ROOT / "launch.py", *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize(
    "module",
    [
        "actors.types",
        "actors.engines.base",
        "conf.schema",
        "epiphany",
        "epiphany.report.table",
        "launch",
        "rewards.registry",
    ],
)
def test_light_modules_stay_light(module: str):
    heavy = ("torch", "vllm", "ray", "transformers")
    code = f"import {module}, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def importers(pattern: str) -> set[str]:
    return {str(f.relative_to(ROOT)) for f in SOURCES if re.search(pattern, f.read_text(), re.MULTILINE)}


def test_every_module_has_its_layer():
    """import-linter passes over a module that no contract names."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    named = [name for contract in contracts for layer in contract.get("layers", ()) for name in layer.split(" | ")]
    inner = ("actors", "learner", "epiphany")
    files = [file.relative_to(ROOT) for file in SOURCES if file.parts[len(ROOT.parts)] in inner]
    modules = [".".join(file.with_suffix("").parts) for file in files if file.name != "__init__.py"]
    layers = [name for name in named if "." in name]
    assert [module for module in modules if not any(f"{module}.".startswith(f"{name}.") for name in layers)] == []


def test_vllm_and_ray_stay_in_their_rooms():
    assert all(file.startswith("actors/engines/vllm/") for file in importers(r"^\s*(import|from) vllm\b"))
    assert importers(r"^\s*(import|from) ray\b") == {"actors/runtime/ray.py", "actors/runtime/ray_cluster.py"}


def test_only_the_python_api_imports_the_entry_point():
    assert importers(r"^\s*(import|from) launch\b") == {"epiphany/__init__.py"}


def test_package_files_hold_a_docstring_and_nothing_else():
    files = [file for file in SOURCES if file.name == "__init__.py" and file.parent != ROOT / "epiphany"]
    for file in files:
        text = file.read_text().strip()
        assert text.startswith('"""') and text.endswith('"""') and text.count('"""') == 2, file


def test_no_pickle_is_loaded():
    assert importers(r"\bpickle\.load|torch\.load\(|import pickle") == set()


def test_files_stay_readable():
    long = {str(f.relative_to(ROOT)): n for f in SOURCES if (n := len(f.read_text().splitlines())) > 250}
    assert long == {}


def test_the_formatter_has_no_exceptions():
    files = [*SOURCES, *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/*.py")]
    switch = "fmt: " + "skip|fmt: " + "off"
    assert [str(file.relative_to(ROOT)) for file in files if re.search(switch, file.read_text())] == []


def test_any_is_rare():
    """Under 5 in 1,000 lines."""
    texts = [file.read_text() for file in SOURCES]
    count = sum(len(re.findall(r"\bAny\b", text)) for text in texts)
    lines = sum(len(text.splitlines()) for text in texts)
    assert count < 5 * lines / 1000, f"{count} in {lines} lines"


def test_the_life_of_a_rollout_crosses_files_that_exist():
    """ARCHITECTURE.md lists them."""
    listed = re.search(r"```life-of-a-rollout\n(.*?)```", (ROOT / "ARCHITECTURE.md").read_text(), re.DOTALL)
    assert listed is not None
    files = listed[1].split()
    assert 8 <= len(files) == len(set(files)) <= 15
    assert [file for file in files if not (ROOT / file).is_file()] == []


def test_the_names_that_settings_accept_are_those_that_exist():
    """conf knows names only: it imports nothing of what is behind them."""
    from actors.engines.registry import ENGINES
    from conf import facts
    from epiphany.report import sinks
    from learner.algorithms import table

    assert list(ENGINES) == facts.ENGINES
    assert list(sinks.SINKS) == [*sinks.ALWAYS, *facts.SINKS]
    assert set(facts.ALGORITHMS) == set(table.ALGORITHMS)
