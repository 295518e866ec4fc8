"""The real thing: SmolLM2-135M through vLLM (CPU build), by `python launch.py`, killed and resumed; and its adapter
served by `vllm serve`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.helpers.runs import ROOT, assert_bit_equal, rows, steps_of, wait_for

STEPS = 3


def start(folder: Path) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "launch.py",
        f"run.folder={folder}",
        f"run.steps={STEPS}",
        "run.checkpoint_every=1",
        "run.keep_checkpoints=9",
        "algorithm.prompts_per_step=4",
        "evaluation.max_prompts=2",
        "engine.name=vllm",
        "hardware.threads=1",  # beside another process of tests, see helpers/runs.py
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def finish(folder: Path) -> None:
    process = start(folder)
    peak = 0
    while process.poll() is None:
        try:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            peak = max(peak, sum(p.memory_info().rss for p in family))
        except psutil.NoSuchProcess:
            pass
        try:
            process.wait(0.5)
        except subprocess.TimeoutExpired:
            continue
    assert process.returncode == 0, (folder.parent / f"{folder.name}.log").read_text()[-4000:]
    assert peak < 8 * 2**30


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real") / "whole"
    finish(folder)
    return folder


def test_grpo_runs_through_vllm(whole: Path):
    metrics = rows(whole)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert all(0 <= row["logprob_gap"] <= 1e-3 for row in metrics)
    assert any(row["grad_norm"] > 0 for row in metrics)
    assert json.loads((whole / "settings.json").read_text())["settings"]["engine"]["name"] == "vllm"


@pytest.mark.nightly
def test_killed_in_the_second_step_it_ends_bit_equal(whole: Path, tmp_path: Path):
    folder = tmp_path / "killed"
    process = start(folder)
    wait_for(lambda: steps_of(folder), 240)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(rows(folder)) < STEPS
    finish(folder)
    assert_bit_equal(folder, whole, STEPS)


def test_vllm_serves_the_adapter(whole: Path, smollm2: str, tmp_path: Path):
    """`vllm serve --enable-lora` takes the adapter folder as it is."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    # The server of `vllm serve`; that command itself looks for a package named vllm, which the CPU build is not.
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        smollm2,
        "--port",
        str(port),
        "--host",
        "127.0.0.1",
        "--dtype",
        "float32",
        "--max-model-len",
        "128",
        "--enforce-eager",
        "--enable-lora",
        "--max-lora-rank",
        "16",
        "--lora-modules",
        f"mine={whole / 'adapter'}",
        "--max-num-seqs",
        "2",
    ]
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "2",
    }
    log = tmp_path / "log"
    with log.open("w") as stream:
        server = subprocess.Popen(
            command, env=environment, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, start_new_session=True
        )
    try:
        wait_for(lambda: server.poll() is not None or healthy(port), 240)
        assert server.poll() is None, log.read_text()[-4000:]
        answers = {model: complete(port, model) for model in (smollm2, "mine")}
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert all(answers.values())


def healthy(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except (urllib.error.URLError, OSError):
        return False


def complete(port: int, model: str) -> str:
    body = json.dumps({"model": model, "prompt": "4 + 3 =", "max_tokens": 4, "temperature": 0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]["text"]
