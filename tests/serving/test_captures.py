from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from regraft.data import spool
from regraft.data.capture_shipping import ship
from regraft.data.captures import CaptureStore, sampled
from regraft.data.redaction import Redactor
from regraft.errors import DataError
from regraft.records import CapturedExchange, Message

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def exchange(
    number: int, *, at: datetime = NOW, version: int = 1, model: str = "support"
) -> CapturedExchange:
    return CapturedExchange(
        id=f"e-{number}",
        created=at.isoformat(timespec="microseconds"),
        model=model,
        model_version=version,
        messages=(Message(role="user", content=f"question {number} → ä"),),
        output="line\nbreak",
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
        latency_ms=1.5,
    )


WRITER = """
import sys
from pathlib import Path
from regraft.data.captures import CaptureStore
from regraft.records import CapturedExchange, Message
store, number = CaptureStore(Path(sys.argv[1])), 0
while True:
    store.append(CapturedExchange(
        id=f"{sys.argv[2]}-{number}", created="2026-03-04T12:00:00.000000+00:00",
        model="support", model_version=1, messages=(Message(role="user", content="x" * 5000),),
        output="y", finish_reason="stop", prompt_tokens=1, completion_tokens=1, latency_ms=1.0))
    print(number, flush=True)
    number += 1
"""


def test_every_acknowledged_record_survives_kill_9(tmp_path: Path) -> None:
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in ("a", "b")]
    for writer in writers:
        assert writer.stdout is not None
        while int(writer.stdout.readline()) < 200:
            pass
    acknowledged = {}
    for name, writer in zip("ab", writers, strict=True):
        writer.send_signal(signal.SIGKILL)
        assert writer.stdout is not None
        # What is in the pipe was acknowledged before the kill; a number cut short was not read.
        rest = writer.stdout.read()
        whole = rest[: rest.rfind("\n") + 1].split()
        acknowledged[name] = max([200, *map(int, whole)])
        writer.wait()
    found = {e.id for e in CaptureStore(tmp_path).read()}
    for name, last in acknowledged.items():
        assert {f"{name}-{n}" for n in range(last + 1)} <= found
    # Files of one writer are several where it wrote more than a file takes while the other came up.
    assert {int(f.name.split("-")[3]) for f in tmp_path.iterdir()} == {w.pid for w in writers}


def test_reads_by_time_model_and_version_each_id_once(tmp_path: Path) -> None:
    first, second = CaptureStore(tmp_path), CaptureStore(tmp_path)
    first.append(exchange(3, at=NOW + timedelta(hours=2), version=2))
    first.append(exchange(1))
    second.append(exchange(1))
    second.append(exchange(2, at=NOW + timedelta(hours=1), model="other"))
    store = CaptureStore(tmp_path)
    assert [e.id for e in store.read()] == ["e-1", "e-2", "e-3"]
    assert [e.id for e in store.read(start=NOW + timedelta(hours=1), end=NOW + timedelta(hours=2))] == ["e-2"]
    assert [e.id for e in store.read(start=datetime(2026, 3, 4, 14))] == ["e-3"]  # no zone: UTC
    assert [e.id for e in store.read(model="support", version=1)] == ["e-1"]
    assert sorted(e.id for e in store.stream()) == ["e-1", "e-2", "e-3"]
    assert [e.id for e in store.stream(start=NOW + timedelta(hours=1), end=NOW + timedelta(hours=2))] == [
        "e-2"
    ]
    assert [when for when, _ in store.times(every=timedelta(hours=2), most=1)] == [
        NOW,
        NOW + timedelta(hours=2),
    ]
    table = store.table(version=2)
    assert table["id"].tolist() == ["e-3"]
    assert table["prompt_text"].tolist() == ["question 3 → ä"]
    assert table["created"].iloc[0].to_pydatetime() == NOW + timedelta(hours=2)
    assert CaptureStore(tmp_path / "none").read() == []
    assert list(CaptureStore(tmp_path / "none").stream()) == []
    assert list(CaptureStore(tmp_path / "none").table().columns)[-1] == "prompt_text"


def test_only_the_last_line_may_be_torn(tmp_path: Path) -> None:
    store = CaptureStore(tmp_path)
    store.append(exchange(1))
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(good + good[:50])
    assert [e.id for e in store.read()] == ["e-1"]
    file.write_bytes(good + good[:50] + b"\n" + good)
    with pytest.raises(DataError, match=rf"{file.name}:2: not a captured exchange"):
        store.read()


def test_a_short_write_is_an_error_and_the_next_record_goes_to_another_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CaptureStore(tmp_path)
    store.append(exchange(1))
    whole = os.write
    monkeypatch.setattr(os, "write", lambda file, data: whole(file, data[:20]))
    with pytest.raises(OSError, match="20 of"):
        store.append(exchange(2))
    monkeypatch.undo()
    store.append(exchange(3))
    assert [e.id for e in store.read()] == ["e-1", "e-3"]


def test_a_forked_child_writes_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CaptureStore(tmp_path)
    store.append(exchange(1))
    monkeypatch.setattr(os, "getpid", lambda: 999_999)
    store.append(exchange(2))
    assert len(list(tmp_path.iterdir())) == 2


def test_nothing_acknowledged_is_lost_at_random_moments_of_death_and_when_shipped(tmp_path: Path) -> None:
    program = WRITER.replace(
        "CaptureStore(Path(sys.argv[1]))", "CaptureStore(Path(sys.argv[1]), max_bytes=400_000)"
    )
    draw, acknowledged = random.Random(), set()
    archive = str(tmp_path / "archive")
    store = CaptureStore(tmp_path / "spool", archive=archive)
    for life in ("a", "b", "c"):
        command = [sys.executable, "-c", program, str(tmp_path / "spool"), life]
        writer = subprocess.Popen(command, stdout=subprocess.PIPE, pipesize=4096)  # it waits for its reader
        assert writer.stdout is not None
        output = b""
        for _ in range(draw.randint(1, 200)):
            output += writer.stdout.readline()
        ship(store, archive)  # what is finished, beside the writer
        writer.send_signal(signal.SIGKILL)
        output += writer.stdout.read()
        writer.wait()
        acknowledged |= {f"{life}-{int(n)}" for n in output[: output.rfind(b"\n") + 1].split()}
        assert acknowledged <= {e.id for e in store.read()}
    ship(store, archive)
    assert acknowledged <= {e.id for e in store.read()}
    assert list((tmp_path / "spool").glob("*.jsonl")) == []


def test_a_file_ends_with_its_size_and_with_its_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(exchange(1).model_dump_json().encode()) + 1
    store = CaptureStore(tmp_path, max_bytes=2 * size)
    for number in range(1, 6):
        store.append(exchange(number))
    assert sorted(f.stat().st_size for f in tmp_path.iterdir()) == [size, 2 * size, 2 * size]
    tiny = CaptureStore(tmp_path / "tiny", max_bytes=1)
    tiny.append(exchange(1))
    tiny.append(exchange(2))
    assert len(list((tmp_path / "tiny").iterdir())) == 2, "one that is larger has a file of its own"

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime.now(UTC) + timedelta(days=1)

    store = CaptureStore(tmp_path / "days")
    store.append(exchange(1))
    monkeypatch.setattr(spool, "datetime", Tomorrow)
    store.append(exchange(2))
    store.append(exchange(3))
    names = sorted(f.name[:10] for f in (tmp_path / "days").iterdir())
    assert len(names) == 2
    assert names[0] < names[1]


def test_sessions_are_kept_whole_or_not_at_all(tmp_path: Path) -> None:
    store = CaptureStore(tmp_path, rate=0.3)
    kept: dict[str, set[bool]] = {}
    for number in range(600):
        session = f"s-{number % 200}"
        written = store.append(exchange(number).model_copy(update={"session": session}))
        kept.setdefault(session, set()).add(written)
    assert all(len(answers) == 1 for answers in kept.values())
    assert sum(True in answers for answers in kept.values()) == pytest.approx(60, abs=30)
    assert len(store.read()) == 3 * sum(True in answers for answers in kept.values())
    assert sum(sampled(f"id-{n}", 0.3) for n in range(5000)) == pytest.approx(1500, abs=150)
    assert all(sampled(f"id-{n}", 0.6) for n in range(500) if sampled(f"id-{n}", 0.3))
    assert not CaptureStore(tmp_path / "none", rate=0).append(exchange(1))
    assert not (tmp_path / "none").exists()


def test_personal_data_never_reaches_the_disk(tmp_path: Path) -> None:
    store = CaptureStore(tmp_path, redactor=Redactor())
    store.append(
        exchange(1).model_copy(update={"output": "Write to jo@example.org", "session": "jo@example.org"})
    )
    (file,) = tmp_path.iterdir()
    assert b"example.org" not in file.read_bytes()
    assert store.read()[0].output == "Write to <EMAIL>"
