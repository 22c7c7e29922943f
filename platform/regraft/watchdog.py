"""Ends a process whose work stands still: a deadlock, a collective that a peer never joins, a dead disk.

Whatever advances the work calls `alive`. When nobody did for long enough, Python's `faulthandler` writes down
where every thread stands and ends the process: its own thread needs no interpreter lock, so that a hang in
native code is ended too. What is watched is the process, so there is one watch at a time.
"""

from __future__ import annotations

import faulthandler
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

#: Winding up anew costs a thread: not more often than so many seconds.
_LEAST_BETWEEN = 1.0
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')


class _Watch:
    """The watch over this process, wound up by the thread that does the work."""

    def __init__(self, seconds: float, out: TextIO) -> None:
        self._seconds, self._out = seconds, out
        self._thread = threading.get_ident()
        self._between = min(_LEAST_BETWEEN, seconds / 10)
        self._wound = 0.0
        self.wind()

    def wind(self) -> None:
        """Begin to count anew, if the calling thread is the one that works."""
        now = time.monotonic()
        if threading.get_ident() == self._thread and now - self._wound >= self._between:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._out)
            self._wound = now


#: The watch that is on, if one is.
_on: list[_Watch] = []


def alive() -> None:
    """Say that the work goes on; cheap, and nothing where nobody watches."""
    for watch in _on:
        watch.wind()


@contextmanager
def watched(seconds: float, note: Path | None = None) -> Iterator[None]:
    """End this process, with status 1, if `alive` is not called for so long while this is open.

    Args:
        seconds: How long.
        note: Where to write the stacks; standard error if not given. It is gone when this closes.
    """
    if note is None:
        out = sys.__stderr__
        assert out is not None
    else:
        note.parent.mkdir(parents=True, exist_ok=True)
        out = note.open("w", encoding="utf-8")
        out.write(f"watched for {seconds:g} s, thread {threading.get_ident():#x}\n")
        out.flush()
    _on.append(_Watch(seconds, out))
    try:
        yield
    finally:
        _on.clear()
        faulthandler.cancel_dump_traceback_later()
        if note is not None:
            out.close()
            with suppress(FileNotFoundError):  # another process may have begun the same work
                note.unlink()


def why_it_hung(note: Path) -> str | None:
    """What a note says of the process that left it, for people; None if it did not hang.

    Of the stack of the working thread, the innermost line of the project itself is named.
    """
    try:
        head, *lines = note.read_text(encoding="utf-8", errors="replace").splitlines()
    except (OSError, ValueError):
        return None
    if not any(line.startswith("Timeout") for line in lines):
        return None
    _, seconds, thread = re.split(r"watched for | s, thread ", head)
    stack: list[re.Match[str]] = []
    inside = False
    for line in lines:
        if "Thread 0x" in line:
            inside = int(line.split()[1 if line.startswith("Thread") else 2], 16) == int(thread, 16)
        elif inside and (found := _FRAME.search(line)):
            stack.append(found)
    own = next((f for f in stack if "/regraft/" in f["file"]), stack[0] if stack else None)
    where = f", last in {own['name']} ({Path(own['file']).name}, line {own['line']})" if own else ""
    return f"no progress for {float(seconds) / 60:g} minutes{where}"
