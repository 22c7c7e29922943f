"""A process that stands still is ended, says where, and one that works is not."""

import subprocess
import sys
from pathlib import Path

from regraft.watchdog import alive, watched, why_it_hung

STUCK = """
import sys, threading, time
from pathlib import Path
from regraft.watchdog import alive, watched

def deadlock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
with watched(0.5, Path(sys.argv[1])):
    for _ in range(10):
        time.sleep(0.1)
        alive()
    print("worked", flush=True)
    deadlock()
"""


def test_a_process_that_stands_still_is_ended_and_says_where(tmp_path: Path) -> None:
    note = tmp_path / "notes" / "trial.txt"
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(note)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "worked\n", "it was let alone while it worked, for longer than the watch"
    assert done.returncode == 1
    found = why_it_hung(note)
    assert found is not None
    assert found.startswith("no progress for 0.00833333 minutes, last in deadlock (<string>, line ")


def test_nothing_is_left_of_a_watch_over_work_that_ended(tmp_path: Path) -> None:
    note = tmp_path / "trial.txt"
    with watched(60, note):
        alive()
        assert why_it_hung(note) is None, "it runs"
    assert not note.exists()
    assert why_it_hung(note) is None
    alive()  # nobody watches
