"""task=doctor: what is in the way is said, with what to do."""

from pathlib import Path

import pytest
import torch

from conf.compose import load_settings
from epiphany import commands, doctor, machine
from epiphany.doctor import GOOD, NOTE, PROBLEM, Finding


def findings(*overrides: str) -> dict[str, Finding]:
    return {finding.topic: finding for finding in doctor.examine(load_settings("task=doctor", *overrides))}


def test_the_machine_of_the_tests_is_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor, "_has_driver", torch.cuda.is_available)  # whatever this host has
    of_topic = findings(f"run.folder={tmp_path}/run")
    assert {finding.topic for finding in of_topic.values() if finding.state == PROBLEM} == set()
    assert of_topic["packages"].state == of_topic["vLLM"].state == of_topic["GGUF"].state == GOOD
    assert of_topic["hub"].state == NOTE  # HF_HUB_OFFLINE is set


def test_a_gpu_that_this_torch_cannot_use_is_a_problem(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(doctor, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert findings()["GPU"].text.endswith("make clean, then make")
    assert commands.doctor(load_settings("task=doctor"), lambda *_: None) == 2
    assert "1 of these must be mended" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("capability", "free", "state", "text"),
    [
        ((7, 5), 14.0, NOTE, "it has no bfloat16"),
        ((6, 1), 14.0, PROBLEM, "engine.name=transformers"),
        ((8, 0), 5.0, NOTE, "something else uses it"),
        ((8, 0), 14.5, GOOD, "14.5 of 15.0 GiB are free"),
    ],
)
def test_cards(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], free: float, state: str, text: str):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _index: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _index: capability)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _index: (int(free * 2**30), 15 * 2**30))
    card = findings()["GPU 0"]
    assert (card.state, text in card.text) == (state, True)


def test_the_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{2 * 2**30}\n")
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    of_topic = findings()
    assert of_topic["memory"].state == NOTE and "may use 2 GiB" in of_topic["memory"].text
    assert of_topic["processors"].text.startswith("2" if doctor.os.cpu_count() != 1 else "1")
    (tmp_path / "memory.max").write_text("max\n")
    assert "container" not in findings()["memory"].text


def test_free_memory_is_what_a_container_has_left_and_its_cached_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    whole = machine.free_memory()
    (tmp_path / "memory.max").write_text(f"{800 * 2**20}\n")
    assert machine.free_memory() == 800 * 2**20 < whole
    (tmp_path / "memory.current").write_text(f"{500 * 2**20}\n")
    assert machine.free_memory() == 300 * 2**20
    stat = f"anon 1\ninactive_file {100 * 2**20}\nactive_file {50 * 2**20}\nslab 7\n"
    (tmp_path / "memory.stat").write_text(stat)
    assert machine.free_memory() == 450 * 2**20
    (tmp_path / "memory.current").write_text(f"{2**40}\n")
    assert machine.free_memory() == 0


def test_packages_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "version", lambda name: "0.1" if name == "peft" else "999")
    text = findings()["packages"].text
    assert "peft is 0.1, needed is >=0.17" in text and "transformers is 999" in text and "make again" in text


def test_a_folder_that_cannot_be_written_is_a_problem(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(doctor.os, "access", lambda path, _mode: tmp_path not in [path, *path.parents])
    of_topic = findings(f"run.folder={tmp_path}/run")
    assert of_topic["run folder"].state == PROBLEM and of_topic["hub cache"].state == GOOD
