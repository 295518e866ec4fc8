"""A disk that fills up while a run writes: a sentence, and what was written before stays."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from actors.replay.queue import Replay
from actors.replay.schema import to_batch
from actors.types import Adapter
from conf.errors import DiskError
from learner import checkpoint
from tests.helpers.learners import make_policy
from tests.helpers.rollouts import group


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Within, no file grows over `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size", [1000, 100_000])  # too little for the adapter, and for the moments
def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tiny_model: Path, tmp_path: Path, size: int):
    layout = make_policy(tiny_model).lora.layout

    def save(version: int) -> None:
        adapter = Adapter(version, layout, torch.zeros(layout.size))
        tensors = {"moments": torch.zeros(50_000)}
        checkpoint.save(tmp_path, adapter=adapter, tensors=tensors, state={}, base_model="tiny", keep=1)

    save(1)
    with disk_of(size), pytest.raises(DiskError, match=r"cannot be written or read \(File too large\): make space"):
        save(2)
    found = checkpoint.find(tmp_path, "auto")
    assert found is not None and found.state["version"] == 1
    assert not list(tmp_path.glob(".writing-*"))


def test_a_group_that_does_not_fit_is_not_held_and_the_journal_stays_readable(tmp_path: Path):
    replay = Replay(tmp_path, capacity=8)
    replay.put([to_batch(group(0, [0.0, 1.0]))])
    (segment,) = tmp_path.glob("*.journal")
    with disk_of(segment.stat().st_size + 100), pytest.raises(DiskError, match=r"File too large"):
        replay.put([to_batch(group(1, [0.0, 1.0]))])
    assert replay.held() == [0]
    replay.put([to_batch(group(2, [0.0, 1.0]))])  # there is space again
    replay.close()
    recovered = Replay(tmp_path, capacity=8)
    recovered.recover(lambda _: True)
    assert recovered.held() == [0, 2] and recovered.torn_bytes() == 0
