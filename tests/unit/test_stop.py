"""Signals: who listens while a run is there, and afterwards."""

import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

import epiphany
from conf.errors import UsageError
from conf.schema import Settings
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


def test_a_run_in_another_thread_is_refused():
    with ThreadPoolExecutor(1) as pool, pytest.raises(UsageError, match="must be called from the main thread"):
        pool.submit(epiphany.train, Settings()).result()


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
