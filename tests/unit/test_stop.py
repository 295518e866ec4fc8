"""Signals: who listens while a run is there, and afterwards."""

import signal

import pytest

from epiphany.stop import Interrupted, Stop


def test_signals_are_the_runs_only_while_it_runs():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = Stop()
    try:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
        assert stop and stop.exit_code == 143
    finally:
        stop.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_armed_stop_asks_and_does_not_raise(capsys: pytest.CaptureFixture[str]):
    stop = Stop()
    try:
        stop.arm()
        assert not stop and stop.exit_code == 0
        signal.raise_signal(signal.SIGINT)
        assert stop and stop.exit_code == 130
    finally:
        stop.close()
    assert "SIGINT: saving" in capsys.readouterr().err
