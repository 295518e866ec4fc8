"""The replay queue and its journal: nothing acknowledged is lost, damage is found, capacity holds."""

from pathlib import Path

import pyarrow as pa
import pytest

from actors.replay.admission import Admission, AdmissionPolicy
from actors.replay.journal import Journal, JournalError
from actors.replay.queue import Replay
from actors.replay.schema import VERSION, VERSION_KEY, RowError, to_batch
from tests.helpers.rollouts import group


def batch(ordinal: int, version: int = 0) -> pa.RecordBatch:
    return to_batch(group(ordinal, [1.0, 0.0], version=version))


def everything(_: object) -> bool:
    return True


def recovered(folder: Path, capacity: int = 10) -> Replay:
    replay = Replay(folder, capacity=capacity)
    replay.recover(everything)
    return replay


def test_gives_groups_as_one_table_and_keeps_them_until_they_are_trained(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    assert replay.put([batch(3), batch(1)]) == [3, 1]
    assert replay.put([batch(2)]) == [2]
    table = replay.batch([1, 2], version=0, max_staleness=0)
    assert table.column("ordinal").to_pylist() == [1, 1, 2, 2]
    assert replay.held() == [1, 2, 3]  # until the step is done
    replay.drop([1, 2])
    assert replay.held() == [3]


def test_refuses_a_second_group_of_an_ordinal(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    replay.put([batch(1)])
    assert replay.put([batch(1), batch(2)]) == [2]
    assert (len(replay), replay.refused) == (2, 1)


def test_is_bounded(tmp_path: Path):
    replay = Replay(tmp_path, capacity=2)
    with pytest.raises(OverflowError, match="0 of 2 groups; 3 more"):
        replay.put([batch(i) for i in range(3)])
    assert len(replay) == 0


def test_never_gives_rows_that_are_too_old(tmp_path: Path):
    replay = Replay(tmp_path, capacity=2)
    replay.put([batch(0, version=3)])
    with pytest.raises(RuntimeError, match="version 3 would train version 5"):
        replay.batch([0], version=5, max_staleness=1)


def test_a_batch_with_one_bad_row_leaves_nothing_behind(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    bad = to_batch(group(1, [1.0, 0.0], logprobs=[[-1.0], [-1.0, float("nan")]]))
    with pytest.raises(RowError, match="ordinal 1, sample 1: behavior_logprobs are not finite"):
        replay.put([batch(0), bad])
    assert len(recovered(tmp_path)) == 0


def test_survives_death_after_every_acknowledged_write(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    for ordinal in range(3):
        replay.put([batch(ordinal)])
    again = recovered(tmp_path)  # no close before: as after a kill
    assert again.held() == [0, 1, 2]
    assert again.batch([0], version=0, max_staleness=0).num_rows == 2


def test_a_tail_torn_at_any_byte_is_cut_and_counted(tmp_path: Path):
    replay = Replay(tmp_path / "whole", capacity=10)
    replay.put([batch(0)])
    (file,) = (tmp_path / "whole").iterdir()
    first = file.stat().st_size
    replay.put([batch(1)])
    data = file.read_bytes()
    for cut in [*range(first, first + 40), len(data) - 1]:
        folder = tmp_path / f"cut-{cut}"
        folder.mkdir()
        (folder / file.name).write_bytes(data[:cut])
        torn = recovered(folder)
        assert torn.held() == [0]
        assert torn.torn_bytes() == cut - first


def test_damage_inside_is_an_error_that_names_the_place(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    replay.put([batch(0)])
    (file,) = tmp_path.iterdir()
    first = file.stat().st_size
    replay.put([batch(1)])
    data = bytearray(file.read_bytes())
    data[first // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(JournalError, match="damaged at byte 0"):
        recovered(tmp_path)


def test_a_torn_file_that_is_not_the_last_is_damage(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10, segment_bytes=1)  # a segment for each put
    replay.put([batch(0)])
    replay.put([batch(1)])
    first = sorted(tmp_path.iterdir())[0]
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(JournalError, match=first.name):
        recovered(tmp_path)


def test_release_deletes_what_is_trained_and_keeps_the_rest(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10, segment_bytes=1)
    for ordinal in range(3):
        replay.put([batch(ordinal)])
    replay.release(lambda ordinal: ordinal < 2)
    assert recovered(tmp_path).held() == [2]


def test_recovery_keeps_what_it_is_asked_to_keep(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10)
    replay.put([batch(0), batch(1)])
    again = Replay(tmp_path, capacity=10)
    again.recover(lambda b: b.column("ordinal")[0].as_py() == 1)
    assert again.held() == [1]
    assert recovered(tmp_path).held() == [1]  # the other is gone from the journal, too


def test_admits_a_group_once_and_only_with_a_quorum(tmp_path: Path):
    replay = Replay(tmp_path, capacity=10, policy=AdmissionPolicy(min_scored_fraction=0.5, max_zero_variance=0))
    assert replay.admit(group(0, [1.0, 0.0, None, None])) == Admission(0, True, 4, 2)
    assert replay.admit(group(0, [1.0, 0.0, None, None])) == Admission(
        0, True, 4, 2
    )  # the answer was lost, not the group
    assert replay.admit(group(1, [1.0, None, None, None])) == Admission(1, False, 4, 3)
    assert replay.admit(group(2, [1.0, None])) == Admission(2, False, 2, 1)  # one has no advantage
    assert replay.held() == [0] and recovered(tmp_path).held() == [0]


def test_recovers_no_more_than_it_may_hold(tmp_path: Path):
    Replay(tmp_path, capacity=8).put([batch(i) for i in (5, 1, 3, 2)])
    replay = recovered(tmp_path, capacity=2)
    assert replay.held() == [1, 2]
    assert recovered(tmp_path).held() == [1, 2]  # the others are gone from the journal


def test_keeps_what_it_is_told_and_drops_the_rest_from_the_journal(tmp_path: Path):
    replay = Replay(tmp_path, capacity=8)
    replay.put([batch(i) for i in range(4)])
    replay.keep([0, 2])
    assert replay.held() == [0, 2] and recovered(tmp_path).held() == [0, 2]


@pytest.mark.parametrize(
    ("rewards", "zero_variance"), [([0.1 + 0.2, 0.3], True), ([0.3, 0.3001], False), ([0.0, 0.0], True)]
)
def test_rewards_that_differ_in_rounding_alone_carry_no_signal(
    tmp_path: Path, rewards: list[float], zero_variance: bool
):
    replay = Replay(tmp_path, capacity=8, policy=AdmissionPolicy(min_scored_fraction=0.5, max_zero_variance=1))
    assert replay.admit(group(0, rewards)).zero_variance == zero_variance


def test_a_step_refuses_so_many_groups_without_variance_and_no_more(tmp_path: Path):
    replay = Replay(tmp_path, capacity=8, policy=AdmissionPolicy(min_scored_fraction=0.5, max_zero_variance=2))
    equal, unequal = [1.0, 1.0], [1.0, 0.0]
    admitted = [replay.admit(group(i, rewards)) for i, rewards in enumerate([equal, unequal, equal, equal])]
    assert [admission.accepted for admission in admitted] == [False, True, False, True]
    assert [admission.zero_variance for admission in admitted] == [True, False, True, False]
    replay.drop([1, 3])  # the step is done: the next one may refuse two again
    assert not replay.admit(group(4, equal)).accepted


@pytest.mark.parametrize(
    ("metadata", "version"), [({VERSION_KEY: b"1"}, "1"), ({VERSION_KEY: b"99"}, "99"), (None, "none")]
)
def test_a_journal_of_another_version_is_refused_with_a_sentence(
    tmp_path: Path, metadata: dict[bytes, bytes] | None, version: str
):
    journal = Journal(tmp_path)
    journal.append({0: batch(0).replace_schema_metadata(metadata)})
    journal.close()
    (file,) = tmp_path.iterdir()
    message = rf"{file.name} was written by another version .*schema {version}, this one.s {VERSION}.*run\.name"
    with pytest.raises(JournalError, match=message):
        recovered(tmp_path)
    assert file.exists()  # the rows are for the version that wrote them


def test_a_journal_with_other_columns_is_refused(tmp_path: Path):
    journal = Journal(tmp_path)
    journal.append({0: batch(0).drop_columns(["turns"])})
    journal.close()
    with pytest.raises(JournalError, match="another version"):
        recovered(tmp_path)
