from __future__ import annotations

import logging
import threading
import time

import pytest

from monitoring.schedule import run_forever


def test_a_failing_check_does_not_end_the_loop(caplog):
    stop, calls = threading.Event(), []

    def check() -> None:
        calls.append(1)
        if len(calls) == 3:
            stop.set()
        raise RuntimeError("the store is away")

    with caplog.at_level(logging.ERROR):
        run_forever(check, 0.01, stop)
    assert len(calls) == 3
    assert "the store is away" in caplog.text
    assert "Traceback" in caplog.text


def test_missed_ticks_are_not_piled_up():
    stop, starts = threading.Event(), []

    def check() -> None:
        starts.append(time.monotonic())
        if len(starts) == 1:
            time.sleep(0.5)
        if len(starts) == 3:
            stop.set()

    run_forever(check, 0.2, stop)
    assert starts[1] - starts[0] == pytest.approx(0.6, abs=0.15)
    assert starts[2] - starts[1] > 0.1, "a long check is followed by ordinary intervals"


def test_stop_ends_the_wait_at_once():
    stop = threading.Event()
    loop = threading.Thread(target=run_forever, args=(lambda: None, 3600, stop))
    loop.start()
    stop.set()
    loop.join(timeout=5)
    assert not loop.is_alive()


def test_an_interval_must_be_positive():
    with pytest.raises(ValueError, match="positive"):
        run_forever(lambda: None, 0, threading.Event())
