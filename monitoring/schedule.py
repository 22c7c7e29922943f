"""Checks at even intervals, in the foreground, until told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


def run_forever(check: Callable[[], None], every_seconds: float, stop: threading.Event) -> None:
    """Run a check now and then every `every_seconds`, until `stop` is set.

    A check that fails is logged with its traceback, and the next one runs as planned. A check that takes
    longer than the interval makes the loop skip the ticks it missed: they are not made up for.

    Args:
        check: What to run.
        every_seconds: From the start of one check to the start of the next.
        stop: Set it to end the loop; a check under way is finished first.
    """
    if every_seconds <= 0:
        raise ValueError(f"every_seconds must be positive, not {every_seconds}")
    tick = time.monotonic()
    while not stop.is_set():
        try:
            check()
        except Exception:
            logger.exception("a monitoring check failed; the next one is in %g s", every_seconds)
        late = time.monotonic() - tick
        missed = int(late // every_seconds)
        if missed:
            logger.warning("a check took %.1f s; %d missed ticks are skipped", late, missed)
        tick += (missed + 1) * every_seconds
        stop.wait(max(0.0, tick - time.monotonic()))
