from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest

from regraft.config import Experiment
from regraft.data import capture_archive, capture_files
from regraft.data.capture_archive import Archive
from regraft.data.capture_shipping import Shipper, prune, ship
from regraft.data.captures import CaptureStore
from regraft.errors import ConfigError, DataError, ServiceError
from regraft.records import CapturedExchange, Message
from regraft.serve_sections import CaptureSection

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)


def exchange(
    number: int, *, at: datetime = NOW, version: int = 1, model: str = "support"
) -> CapturedExchange:
    return CapturedExchange(
        id=f"e-{number}",
        created=at.isoformat(timespec="microseconds"),
        model=model,
        model_version=version,
        messages=(
            Message(role="system", content="Help."),
            Message(role="user", content=f"question {number} → ä"),
            Message(role="assistant", content="Which?"),
        ),
        output="line\nbreak",
        finish_reason="stop",
        prompt_tokens=3,
        completion_tokens=2,
        latency_ms=1.5,
        first_token_ms=0.5 if number % 2 else None,
        session=f"s-{number % 3}",
        parameters={"temperature": 0.5, "stop": ["\n"]},
    )


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "archive") if request.param == "local" else f"memory://{tmp_path.name}"


def filled(folder: Path, count: int, archive: str | None = None) -> CaptureStore:
    store = CaptureStore(folder, archive=archive)
    for number in range(count):
        store.append(exchange(number, at=NOW + timedelta(minutes=number), version=1 + number % 2))
    store.close()
    return store


def test_spool_and_archive_read_as_one(tmp_path: Path, url: str) -> None:
    store = filled(tmp_path / "spool", 20, url)
    before, table = store.read(), store.table()
    done = ship(store, url)
    assert (done.files, done.exchanges, done.torn, done.live) == (1, 20, 0, 0)
    assert list((tmp_path / "spool").iterdir()) == []
    assert store.read() == before
    assert store.table().equals(table)
    store.append(exchange(20, at=NOW - timedelta(hours=1)))
    assert [e.id for e in store.read()] == ["e-20", *(e.id for e in before)]
    assert store.table()["id"].tolist() == [e.id for e in store.read()]
    assert store.table()["prompt_text"].tolist() == [e.prompt_text for e in store.read()]
    for wanted in (
        {"start": NOW + timedelta(minutes=3), "end": NOW + timedelta(minutes=6)},
        {"version": 2},
        {"model": "other"},
    ):
        expected = [e.id for e in store.read(**wanted)]  # type: ignore[arg-type]
        assert store.table(**wanted, columns=["id"])["id"].tolist() == expected  # type: ignore[arg-type]
    assert [e.id for e in store.read(start=NOW + timedelta(minutes=3), end=NOW + timedelta(minutes=6))] == [
        "e-3",
        "e-4",
        "e-5",
    ]
    assert [e.model_version for e in store.read(version=2)] == [2] * 10
    assert list(store.table(columns=["output", "prompt_text"]).columns) == ["output", "prompt_text"]
    tomorrow = datetime.now(UTC) + timedelta(days=1)
    assert store.read(start=tomorrow) == []
    assert Archive(url).files(tomorrow.date()) == {}, "not even opened"
    store.append(exchange(3))
    assert [e.id for e in store.read()].count("e-3") == 1
    assert store.table()["id"].tolist().count("e-3") == 1


def test_a_stream_gives_what_is_read_each_id_once(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture_archive, "_BATCH", 3)
    monkeypatch.setattr(capture_archive, "_GROUP", 2)
    store = filled(tmp_path / "spool", 20, url)
    ship(store, url)
    for number in (5, 20, 21, 21):  # one of them shipped, one written twice
        store.append(exchange(number, at=NOW + timedelta(minutes=number)))
    for wanted in (
        {},
        {"start": NOW + timedelta(minutes=3), "end": NOW + timedelta(minutes=21)},
        {"version": 2},
        {"model": "other"},
        {"start": datetime.now(UTC) + timedelta(days=1)},
    ):
        found = sorted(store.stream(**wanted), key=lambda e: (e.created, e.id))  # type: ignore[arg-type]
        assert found == store.read(**wanted)  # type: ignore[arg-type]


def test_what_is_shipped_once_the_spool_was_read_is_given_and_counted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = str(tmp_path / "archive")
    store = CaptureStore(tmp_path / "spool", archive=archive)
    for number in range(6):
        store.append(exchange(number).model_copy(update={"session": None}))
        if number in (1, 3):
            store.close()
    parts, shipped = Archive.parts, []

    def ship_first(*given: Any, **more: Any) -> Any:
        store.close()
        shipped.append(ship(store, archive).files)
        return parts(*given, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Archive, "parts", ship_first)
        assert len(store.times(every=timedelta(days=1), most=10)) == 6
        assert shipped == [3]
        store.append(exchange(6))
        assert sorted(e.id for e in store.stream()) == [f"e-{n}" for n in range(7)]
        assert shipped == [3, 1]


def test_what_is_pruned_under_a_stream_is_gone_and_no_error(tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    for _ in range(3):
        ship(filled(tmp_path / "spool", 4), archive)
    store = CaptureStore(tmp_path / "spool", archive=archive)
    stream = store.stream()
    next(stream)
    for file in (tmp_path / "archive").rglob("*.parquet"):
        file.unlink()
    assert len(list(stream)) == 3, "the rest of the file that was open"


def test_an_archive_that_breaks_under_a_stream_is_named(tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    store = filled(tmp_path / "spool", 4, archive)
    ship(store, archive)
    (file,) = (tmp_path / "archive").rglob("*.parquet")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ServiceError, match=r"serve\.capture\.ship"):
        list(store.stream())
    with pytest.raises(ServiceError, match=r"serve\.capture\.ship"):
        store.times(every=timedelta(hours=1), most=3)


def test_times_are_of_the_first_sessions_of_each_interval(tmp_path: Path, url: str) -> None:
    store = CaptureStore(tmp_path / "spool", archive=url)
    draw = random.Random(0)
    shown = [
        exchange(n, at=NOW + timedelta(minutes=draw.randint(0, 179), microseconds=n)).model_copy(
            update={
                "session": draw.choice([None, *(f"s-{i}" for i in range(9))]),
                "variant": draw.choice(["champion", "champion", "challenger", "shadow"]),
            }
        )
        for n in range(150)
    ]
    for e in shown[:100]:
        store.append(e)
    store.close()
    ship(store, url)
    for e in shown[100:]:
        store.append(e)
    start, end = NOW + timedelta(minutes=7), NOW + timedelta(minutes=170)
    found = store.times(every=timedelta(hours=1), most=6, start=start, end=end)
    expected = []
    for hour in range(12, 15):
        firsts: dict[str, datetime] = {}
        for e in sorted(shown, key=lambda e: e.created):
            when = datetime.fromisoformat(e.created)
            if start <= when < end and when.hour == hour and e.variant != "shadow":
                firsts.setdefault(e.session or e.id, when)
        kept = sorted(firsts.items(), key=lambda one: one[1])[:6]
        expected += [(when, name if name.startswith("s-") else None) for name, when in kept]
    assert found == expected
    assert len(found) == 18
    assert len({n for _, n in store.times(every=timedelta(days=1), most=10**6) if n}) == 9
    assert store.times(every=timedelta(days=1), most=5, model="other") == []
    with pytest.raises(ConfigError, match="positive"):
        store.times(every=timedelta(0), most=5)


def test_times_are_read_from_files_of_before_there_were_variants(tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    store = filled(tmp_path / "spool", 4, archive)
    ship(store, archive)
    (file,) = (tmp_path / "archive").rglob("*.parquet")
    pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["variant"]), file)
    assert len(store.times(every=timedelta(days=1), most=10)) == 3, "sessions of four exchanges"


def test_times_names_a_line_that_is_no_exchange(tmp_path: Path) -> None:
    filled(tmp_path / "spool", 1)
    bad = tmp_path / "spool" / "2026-03-04-1-0123456789abcdef.jsonl"
    bad.write_text("{}\n{}\n")
    with pytest.raises(DataError, match=rf"{bad.name}:1: not a captured exchange"):
        CaptureStore(tmp_path / "spool").times(every=timedelta(hours=1), most=3)


def test_what_is_shipped_between_listing_and_reading_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = str(tmp_path / "archive")
    store = filled(tmp_path / "spool", 5, archive)
    whole = capture_files.spool_files

    def listed_and_shipped(folder: Path, start: date | None = None) -> list[Path]:
        files = whole(folder, start)
        monkeypatch.undo()
        assert ship(store, archive).exchanges == 5
        return files

    monkeypatch.setattr(capture_files, "spool_files", listed_and_shipped)
    assert [e.id for e in store.read()] == [f"e-{n}" for n in range(5)]


def test_the_file_of_a_living_writer_is_left_and_that_of_a_dead_one_is_taken(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_capture_shipping import CaptureStore, exchange
store = CaptureStore(Path({str(tmp_path / "spool")!r}))
store.append(exchange(1))
print("written", flush=True)
sys.stdin.read()
"""
    writer = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "written\n"
        store = CaptureStore(tmp_path / "spool", archive=str(tmp_path / "archive"))
        done = ship(store, str(tmp_path / "archive"))
        assert (done.files, done.live) == (0, 1)
        assert prune(store, 1, today=date.today() + timedelta(days=9)) == 0
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        (file,) = (tmp_path / "spool").glob("*.jsonl")
        with file.open("ab") as stream:
            stream.write(file.read_bytes()[:40])
        (tmp_path / "spool" / "mine.jsonl").write_text("")
        done = ship(store, str(tmp_path / "archive"))
        assert (done.files, done.exchanges, done.torn, done.live, done.foreign) == (1, 1, 1, 0, 1)
        assert [e.id for e in store.read()] == ["e-1"]
    finally:
        writer.kill()
        writer.communicate()


@pytest.mark.parametrize("step", ["fsync", "replace", "read back", "delete"])
def test_a_shipping_cut_short_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    archive = str(tmp_path / "archive")
    store = filled(tmp_path / "spool", 5, archive)
    targets = {
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
        "read back": (Archive, "_metadata"),
        "delete": (Path, "unlink"),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*targets[step], die)
        with pytest.raises(Killed):
            ship(store, archive)
    assert [e.id for e in store.read()] == [f"e-{n}" for n in range(5)]
    assert ship(store, archive).exchanges == 5
    assert [e.id for e in store.read()] == [f"e-{n}" for n in range(5)]
    assert store.table(columns=["id"])["id"].is_unique
    left = [p.name for p in tmp_path.rglob("*") if p.is_file()]
    assert len(left) == 1, left


def test_a_reader_misses_nothing_while_files_are_shipped(tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    store = CaptureStore(tmp_path / "spool", archive=archive)
    written, done = 0, threading.Event()

    def work() -> None:
        nonlocal written
        try:
            for number in range(150):
                store.append(exchange(number))
                written = number + 1
                if number % 10 == 9:
                    store.close()
                    ship(store, archive)
        finally:
            done.set()

    thread = threading.Thread(target=work)
    thread.start()
    last = False
    while not last:
        last = done.is_set()
        at_least = written
        ids = [e.id for e in store.read()]
        assert len(ids) == len(set(ids))
        assert {f"e-{n}" for n in range(at_least)} <= set(ids)
    thread.join()
    assert written == 150


def test_files_from_before_a_field_was_added_are_read_with_its_default(tmp_path: Path) -> None:
    archive = str(tmp_path / "archive")
    store = filled(tmp_path / "spool", 4, archive)
    expected = store.read()
    ship(store, archive)
    (file,) = (tmp_path / "archive").rglob("*.parquet")
    pq.write_table(
        pq.read_table(file, partitioning=None).drop_columns(["stream", "parameters", "error"]), file
    )
    assert store.read() == [e.model_copy(update={"parameters": {}}) for e in expected]
    assert store.table()["stream"].tolist() == [False] * 4


def test_every_field_of_the_record_has_a_column(tmp_path: Path) -> None:
    columns = capture_archive.schema()
    assert columns.names == list(CapturedExchange.model_fields)
    assert set(capture_archive.JSON) == {"messages", "parameters"}
    assert str(columns.field("created").type) == "timestamp[us, tz=UTC]"


def test_pruning_deletes_whole_days_in_spool_and_archive(tmp_path: Path, url: str) -> None:
    today = datetime.now(UTC).date()
    store = filled(tmp_path / "spool", 3, url)
    ship(store, url)
    filled(tmp_path / "spool", 3)
    files, root = fsspec.core.url_to_fs(url)
    files.makedirs(f"{root}/day=2020-01-01")
    files.pipe_file(f"{root}/day=2020-01-01/mine.parquet", b"mine")
    assert prune(store, 2, today=today + timedelta(days=2)) == 0
    assert len(store.read()) == 3
    assert prune(url, 2, today=today + timedelta(days=3)) == 1
    assert prune(store, 2, today=today + timedelta(days=3)) == 1
    assert store.read() == []
    assert [Path(path).name for path in files.find(root)] == ["mine.parquet"], "what is not ours stays"


def test_one_bad_file_stays_and_the_others_go(tmp_path: Path) -> None:
    store = filled(tmp_path / "spool", 2)
    bad = tmp_path / "spool" / "2026-03-04-1-0123456789abcdef.jsonl"
    bad.write_text("{}\n{}\n")
    done = ship(store, str(tmp_path / "archive"))
    assert done.files == 1
    (problem,) = done.failed
    assert f"{bad.name}:1: not a captured exchange" in problem
    assert [f.name for f in (tmp_path / "spool").iterdir()] == [bad.name]


def test_a_store_that_cannot_be_had_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path / "spool", 1)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ConfigError, match=r"serve\.capture\.ship: s3://b/c: .*s3fs"):
        ship(store, "s3://b/c")
    with pytest.raises(ConfigError, match="nowhere"):
        ship(store, "nowhere://b/c")
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match=r"NotADirectory|FileExists"):
        ship(store, str(tmp_path / "file" / "archive"))
    assert len(store.read()) == 1


def test_the_shipper_ships_what_is_being_written_and_survives_a_bad_store(tmp_path: Path) -> None:
    store = CaptureStore(tmp_path / "spool", archive=str(tmp_path / "archive"))
    (tmp_path / "archive").write_text("in the way")
    store.append(exchange(1))
    shipper = Shipper(store, every_seconds=3600, keep_days=30)
    shipper.turn()
    state = shipper.state()
    assert (state["errors"], state["exchanges"], state["last_success"]) == (1, 0, None)
    assert "serve.capture.ship" in str(state["last_error"])
    (tmp_path / "archive").unlink()
    store.append(exchange(2))
    shipper.start()
    shipper.stop()  # a last turn
    state = shipper.state()
    assert (state["errors"], state["files"], state["exchanges"]) == (1, 2, 2)
    assert state["last_success"] is not None
    assert [e.id for e in store.read()] == ["e-1", "e-2"]
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_shipper_does_not_start_with_a_wrong_url(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        Shipper(CaptureStore(tmp_path, archive="nowhere://b"), every_seconds=1).start()


def test_the_archive_of_the_yaml_lies_beside_it(tmp_path: Path) -> None:
    context = {"folder": tmp_path}
    assert CaptureSection.model_validate({"ship": "kept"}, context=context).ship == str(tmp_path / "kept")
    assert CaptureSection.model_validate({"ship": "s3://b/c"}, context=context).ship == "s3://b/c"
    assert CaptureSection.model_validate({"ship": "/x"}, context=context).ship == "/x"


def test_the_commands_ship_count_and_prune(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs import captures as commands

    monkeypatch.setenv("REGRAFT_WORKSPACE", str(tmp_path))
    plain = Experiment.load(Path(__file__).parents[2] / "examples" / "utility-support")
    section = CaptureSection(ship=str(tmp_path / "archive"), keep_days=7)
    experiment = plain.model_copy(update={"serve": plain.serve.model_copy(update={"capture": section})})
    filled(tmp_path / "captures" / experiment.name, 5)
    live = CaptureStore(tmp_path / "captures" / experiment.name)
    live.append(exchange(7))
    commands.ship(experiment)
    out = capsys.readouterr().out
    assert "5 exchanges of utility-support in 1 files shipped" in out
    assert "1 files left: they are being written" in out
    commands.stats(experiment)
    out = capsys.readouterr().out
    assert "spool    1 files, 1 being written" in out
    assert "archive  1 files" in out
    assert "6 exchanges of utility-support" in out
    assert tuple(word for word in out.split() if word.startswith("support/")) == ("support/1", "support/2")
    commands.prune(experiment)
    assert "0 files of utility-support deleted" in capsys.readouterr().out
    (tmp_path / "captures" / experiment.name / "2026-03-04-1-0123456789abcdef.jsonl").write_text("{}\n{}\n")
    with pytest.raises(DataError, match="not a captured exchange"):
        commands.ship(experiment)
    for command, field in ((commands.ship, "ship"), (commands.prune, "keep_days")):
        with pytest.raises(ConfigError, match=rf"serve\.capture\.{field}: is not set"):
            command(plain)
