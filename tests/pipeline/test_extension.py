"""What people add most often takes three files at most: a reward, an algorithm, an engine, a model family, a sink.

Each is added to a copy of the project, in the places that ARCHITECTURE.md names, and one run uses them all.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from tests.helpers.runs import ROOT, overrides, rows

PACKAGES = ("conf", "rewards", "actors", "learner", "epiphany")

# For each addition, what is appended to which file; a file that is not there yet is new.
ADDITIONS = {
    "reward": {
        "rewards/even.py": """
def even_length(sample):
    return float(sample.tokens % 2 == 0)
""",
        "rewards/registry.py": """
from rewards.even import even_length

REGISTRY["even"] = RegisteredReward(even_length)
""",
    },
    "algorithm": {
        "conf/facts.py": 'ALGORITHMS["rloo_token"] = AlgorithmFacts(groupwise=True)\n',
        "conf/algorithm/rloo_token.yaml": "# RLOO in which every token weighs the same.\nname: rloo_token\n",
        "learner/algorithms/table.py": 'RECIPES["rloo_token"] = replace(RECIPES["rloo"], aggregation=token_mean)\n',
    },
    "engine": {
        "conf/facts.py": 'ENGINES.append("echo")\n',
        "actors/engines/echo.py": (ROOT / "tests" / "helpers" / "fakes.py").read_text(),
        "actors/engines/registry.py": """
def _build_echo(options, tokenizer, *, layout, eos_token_ids):
    from actors.engines.echo import EchoEngine

    return EchoEngine(options.max_num_seqs)


ENGINES["echo"] = EngineSpec("echo", lambda: "1", lambda *_: None, _build_echo)
""",
    },
    "model family": {
        "actors/models/families.py": """
FAMILIES["tiny"] = ModelFamily("Tiny", fused_projections={"qk": ("q_proj", "k_proj")})
""",
    },
    "sink": {
        "conf/facts.py": 'SINKS.append("copy")\n',
        "epiphany/report/sinks.py": """
class CopySink(JsonlSink):
    def __init__(self, options):
        super().__init__(options)
        self._file = options.metrics.with_name("copy.jsonl")


SINKS["copy"] = CopySink
""",
    },
}


def build(copy: Path) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", copy)
    for files in ADDITIONS.values():
        assert len(files) <= 3
        for name, text in files.items():
            with (copy / name).open("a") as file:
                file.write(text)


def test_a_run_uses_what_was_added(tiny_model: Path, tmp_path: Path):
    copy, folder = tmp_path / "copy", tmp_path / "run"
    build(copy)
    arguments = overrides(
        tiny_model,
        folder,
        "algorithm=rloo_token",
        "reward.terms=[{fn: even}]",
        "engine.name=echo",
        "run.sinks=[copy]",
        "run.steps=2",
    )
    run = [sys.executable, "launch.py", *arguments]
    done = subprocess.run(
        run, cwd=copy, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "engine echo (version 1)" in done.stdout
    assert (folder / "copy.jsonl").read_text() == (folder / "metrics.jsonl").read_text()
    assert [row["step"] for row in rows(folder)] == [1, 2]
    sampled = pq.read_table(folder / "completions" / "step-000001.parquet").to_pylist()
    assert sampled and all(row["reward"] == (len(row["text"].split()) % 2 == 0) for row in sampled)
    assert json.loads((folder / "settings.json").read_text())["settings"]["algorithm"]["name"] == "rloo_token"
    code = (
        "from transformers import PretrainedConfig; from actors.models.families import family_of; "
        "config = PretrainedConfig(); config.model_type = 'tiny'; print(family_of(config).fused_with('q_proj'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "('q_proj', 'k_proj')"
