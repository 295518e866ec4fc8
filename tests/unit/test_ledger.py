"""The ledger: no ordinal twice, none skipped."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ledger import Ledger


def test_hands_out_in_order_and_moves_the_frontier():
    ledger = Ledger()
    assert ledger.next(3, version=0) == [0, 1, 2]
    ledger.finish([1])
    assert ledger.low_watermark == 0
    ledger.finish([0], dropped=True)
    assert (ledger.low_watermark, ledger.dropped) == (2, 1)
    assert ledger.next(2, version=1) == [3, 4]
    assert ledger.oldest_version(besides=[2]) == 1
    assert ledger.oldest_version(besides=[]) == 0


def test_finishing_twice_is_an_error():
    ledger = Ledger()
    ledger.next(1, version=0)
    ledger.finish([0])
    with pytest.raises(ValueError, match="ordinal 0"):
        ledger.finish([0])


@given(st.data())
def test_every_ordinal_is_trained_exactly_once_whatever_the_order_and_the_resumes(data: st.DataObject):
    ledger, trained = Ledger(), []
    for _ in range(12):
        ledger.next(data.draw(st.integers(0, 4)), version=0)
        in_flight = sorted(ledger.in_flight)
        done = data.draw(st.lists(st.sampled_from(in_flight), unique=True)) if in_flight else []
        ledger.finish(done)
        trained += done
        if data.draw(st.booleans()):
            ledger = Ledger.restore(ledger.state())
    assert len(trained) == len(set(trained))
    assert all(ordinal in trained for ordinal in range(ledger.low_watermark))
    again = ledger.next(1, version=0)[0]
    assert again not in trained
