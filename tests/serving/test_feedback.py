from __future__ import annotations

import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from regraft.data.feedback import FeedbackStore
from regraft.errors import DataError
from regraft.records import Feedback

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def judged(answer: str, minute: int, **said: object) -> Feedback:
    created = (NOW + timedelta(minutes=minute)).isoformat(timespec="microseconds")
    return Feedback.model_validate(
        {"id": f"feedback-{minute}", "created": created, "answer_id": answer, **said}
    )


def test_the_latest_judgement_counts_and_keeps_what_it_leaves_open(tmp_path: Path) -> None:
    one, two = FeedbackStore(tmp_path), FeedbackStore(tmp_path)
    one.append(judged("a", 4, correction="No."))
    two.append(judged("a", 1, score=1.0, comment="good", key="k1"))
    two.append(judged("b", 3, score=-1.0))
    two.append(judged("a", 2, score=0.0))
    read = one.read()
    assert [f.answer_id for f in read] == ["a", "b"]
    assert (read[0].id, read[0].score, read[0].correction) == ("feedback-4", 0.0, "No.")
    assert (read[0].comment, read[0].key, read[1].score) == ("good", "k1", -1.0)
    early = one.read(end=NOW + timedelta(minutes=4))
    assert [(f.answer_id, f.correction) for f in early] == [("b", None), ("a", None)]
    assert [f.answer_id for f in one.read(start=NOW + timedelta(minutes=4))] == ["a"]


def test_a_torn_last_line_is_passed_over_and_a_broken_one_is_named(tmp_path: Path) -> None:
    store = FeedbackStore(tmp_path)
    store.append(judged("a", 1, score=1.0))
    store.close()
    (file,) = tmp_path.glob("*.jsonl")
    assert file.stat().st_mode & 0o077 == 0
    whole = file.read_bytes()
    file.write_bytes(whole + whole[:20])
    assert len(store.read()) == 1
    file.write_bytes(whole.replace(b'"score":1.0', b'"score":2.0') + whole)
    with pytest.raises(DataError, match=f"{file.name}:1: .*score"):
        store.read()


WRITER = """
import sys
from pathlib import Path
from regraft.data.feedback import FeedbackStore
from regraft.records import Feedback
store, number = FeedbackStore(Path(sys.argv[1])), 0
while True:
    store.append(Feedback(id=f"f-{number}", created="2026-03-04T12:00:00+00:00", answer_id=f"a-{number}",
                          correction="x" * 5000))
    print(number, flush=True)
    number += 1
"""


def test_acknowledged_feedback_survives_kill_9(tmp_path: Path) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert writer.stdout is not None
    while int(writer.stdout.readline()) < 100:
        pass
    os.kill(writer.pid, signal.SIGKILL)
    last = [int(n) for n in writer.communicate()[0].split("\n")[:-1]][-1:] or [100]
    kept = {f.answer_id for f in FeedbackStore(tmp_path).read()}
    assert {f"a-{n}" for n in range(last[0] + 1)} <= kept
