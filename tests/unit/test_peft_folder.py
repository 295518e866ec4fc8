"""Adapters in folders: read as they were written, and refused if they compute what no engine here does."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.models.adapter import WEIGHTS, AdapterError
from actors.models.peft_folder import CONFIG, read_peft_folder, write_peft_folder
from actors.types import Adapter, AdapterEntry, AdapterLayout

A = AdapterEntry("model.layers.0.q_proj", "A", (2, 3), 0)
B = AdapterEntry("model.layers.0.q_proj", "B", (4, 2), 6)
LAYOUT = AdapterLayout(2, 8.0, (A, B))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_peft_folder(tmp_path, Adapter(3, LAYOUT, torch.arange(14.0)), base_model="base")
    return tmp_path


def change(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **values}))


def test_what_is_read_is_what_was_written(folder: Path):
    stored = read_peft_folder(folder)
    assert stored.lora == {"rank": 2, "alpha": 8.0, "target_modules": ["q_proj"]} and stored.base_model == "base"
    assert torch.equal(stored.load(LAYOUT).flat, torch.arange(14.0))


def test_rslora_is_a_larger_alpha(folder: Path):
    change(folder, use_rslora=True, r=4)
    assert read_peft_folder(folder).alpha == 8.0 * 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias=all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"peft_type": "VERA"}, "peft_type is VERA"),
    ],
)
def test_what_no_engine_computes_is_refused(folder: Path, values: dict[str, Any], message: str):
    change(folder, **values)
    with pytest.raises(AdapterError, match=message):
        read_peft_folder(folder)


def test_an_adapter_of_another_model_is_refused(folder: Path):
    other = AdapterLayout(2, 8.0, (A, AdapterEntry(B.module, "B", (5, 2), 6)))
    with pytest.raises(AdapterError, match="made for another model"):
        read_peft_folder(folder).load(other)


def test_damaged_and_missing_files_are_named(folder: Path):
    (folder / WEIGHTS).write_bytes(b"\x00" * 20)
    with pytest.raises(AdapterError, match="damaged"):
        read_peft_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(AdapterError, match=f"no {CONFIG} with {WEIGHTS}"):
        read_peft_folder(folder)
