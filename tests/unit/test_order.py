"""The order of training prompts: shares of sources, epochs, solved rows, and what a checkpoint restores."""

from collections import Counter

import pytest

from actors.data.order import Epochs, Mixture


def test_one_source_gets_every_ordinal():
    assert [Mixture([2.0]).at(ordinal) for ordinal in (0, 3, 1)] == [(0, 0), (0, 3), (0, 1)]


def test_shares_follow_the_weights_at_any_time():
    mixture = Mixture([3, 1, 1])
    places = [mixture.at(ordinal) for ordinal in range(100)]
    for count in range(1, 101):
        counts = Counter(source for source, _ in places[:count])
        assert all(abs(counts[i] - count * share) <= 1 for i, share in enumerate((0.6, 0.2, 0.2)))
    for source in range(3):
        positions = [position for s, position in places if s == source]
        assert positions == list(range(len(positions)))
    assert [Mixture([3, 1, 1]).at(ordinal) for ordinal in range(100)] == places


def epochs_of(size: int = 10, *, revisit_solved: float = 0.0) -> Epochs:
    return Epochs(size, seed=1, revisit_solved=revisit_solved)


def test_what_was_solved_when_a_step_ended_is_left_out_of_the_next_epochs():
    epochs = epochs_of()
    first = [epochs.at(position) for position in range(10)]
    assert sorted(first) == list(range(10))
    for row in (2, 5, 7):
        epochs.record(row, solved=True)
    epochs.end_step()
    epochs.record(8, solved=True)  # in the next step: not known yet
    epochs.record(7, solved=False)
    second = [epochs.at(10 + position) for position in range(7)]
    assert sorted(second) == [0, 1, 3, 4, 6, 8, 9]
    epochs.end_step()
    third = [epochs.at(17 + position) for position in range(7)]
    assert sorted(third) == [0, 1, 3, 4, 6, 7, 9]
    assert [epochs.at(position) for position in range(10)] == first


def test_solved_rows_come_back_at_times():
    epochs = epochs_of(100, revisit_solved=0.25)
    for row in range(100):
        epochs.record(row, solved=row < 80)
    epochs.end_step()
    epochs.at(100)
    state = epochs.checkpoint()["epochs"]
    left_out = state[1][2]
    assert 40 < len(left_out) < 75 and max(left_out) < 80


def test_if_all_are_solved_all_are_seen_again():
    epochs = epochs_of(4)
    for row in range(4):
        epochs.record(row, solved=True)
    epochs.end_step()
    assert sorted(epochs.at(position) for position in range(4, 8)) == [0, 1, 2, 3]


@pytest.mark.parametrize("at", [3, 11, 25])
def test_a_resumed_order_goes_on_exactly(at: int):
    """Whatever was recorded after the checkpoint is recorded again."""

    def run(epochs: Epochs, start: int, checkpoints: dict[int, object]) -> list[int]:
        rows = []
        for position in range(start, 60):
            if position % 5 == 0:
                epochs.end_step()
            checkpoints[position] = epochs.checkpoint()  # at any time: it changes nothing
            row = epochs.at(position)
            epochs.record(row, solved=(row + position) % 3 == 0)
            rows.append(row)
        return rows

    checkpoints: dict[int, object] = {}
    whole = run(epochs_of(revisit_solved=0.5), 0, checkpoints)
    assert len(set(Counter(whole).values())) > 1  # solved ones were seen less often
    resumed = epochs_of(revisit_solved=0.5)
    resumed.restore(checkpoints[at])  # type: ignore[arg-type]
    assert run(resumed, at, {}) == whole[at:]


def test_an_order_that_depends_on_the_seed_alone_stores_nothing():
    epochs = epochs_of(revisit_solved=1.0)
    epochs.record(1, solved=True)
    assert epochs.checkpoint() == {}
    assert sorted(epochs.at(position) for position in range(10, 20)) == list(range(10))
