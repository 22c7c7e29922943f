"""Calls to MLflow that nobody waits for: made in order by a thread, and again while the server is away."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from regraft.errors import ServiceError
from regraft.watchdog import alive

T = TypeVar("T")
_log = logging.getLogger(__name__)
#: How long a server may be away before a call is given up, in seconds.
PATIENCE = 1800.0
_PAUSE = 2.0
#: A thread without work ends after so many seconds.
_IDLE = 30.0


class InOrder:
    """A queue of calls and the thread that makes them, one after another.

    A call that fails because the server cannot be reached is tried again until it has been away for
    `patience` seconds; then it, and any other error, is kept and raised by `wait`. Calls must be safe to make
    twice.

    Args:
        patience: Seconds.
        pause: Seconds between tries.
    """

    def __init__(self, patience: float = PATIENCE, pause: float = _PAUSE) -> None:
        self._patience, self._pause = patience, pause
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue()
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def put(self, call: Callable[[], object]) -> None:
        """Have a call made after those before it; returns at once."""
        with self._lock:
            self._calls.put(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
                self._thread.start()

    def check(self) -> None:
        """Raise what the first call that failed raised, if one did; waits for none."""
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Until all calls are made.

        Raises:
            ServiceError: If the server was away for too long.
            Exception: What the first call that failed otherwise raised.
        """
        with self._calls.all_tasks_done:
            while self._calls.unfinished_tasks:
                self._calls.all_tasks_done.wait(1.0)
                alive()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            try:
                call = self._calls.get(timeout=_IDLE)
            except queue.Empty:
                with self._lock:
                    if self._calls.empty():  # a trial that was stopped asks for no more
                        self._thread = None
                        return
                continue
            try:
                patiently(call, self._patience, self._pause)
            except Exception as error:
                self._error = self._error or error
                _log.error("a call to MLflow was given up: %s", error)
            finally:
                self._calls.task_done()


def patiently(call: Callable[[], T], patience: float = PATIENCE, pause: float = _PAUSE) -> T:
    """Make a call, and again while the server cannot be reached.

    Raises:
        ServiceError: If it was away for `patience` seconds, or refused the call.
    """
    began, told = time.monotonic(), False
    while True:
        try:
            return call()
        except ServiceError as error:
            if not error.away or time.monotonic() - began > patience:
                raise
            if not told:
                _log.warning("MLflow is away; trying again for %.0f minutes: %s", patience / 60, error)
                told = True
            alive()  # waiting is no hanging
            time.sleep(pause)
