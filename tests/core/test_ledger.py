"""The ledger of checks, decisions and outcomes, on a real MLflow server."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from regraft.errors import DataError, ServiceError
from regraft.records import (
    Attribution,
    DecisionOutcome,
    DriftReport,
    Evidence,
    RetrainDecision,
    Shown,
    TopicChange,
)
from regraft.tracking.ledger import Ledger
from regraft.tracking.runs import Tracker

SECRET = "my card is 4111 1111 1111 1111"


@pytest.fixture
def ledger(mlflow_url: str, request: pytest.FixtureRequest) -> Ledger:
    return Ledger(mlflow_url, f"ledger-{request.node.name}")


def report(name: str = "r1", day: int = 5, **more: Any) -> DriftReport:
    fields: dict[str, Any] = {
        "id": name,
        "model": "bot",
        "model_version": 2,
        "reference_id": "ref",
        "window_start": f"2026-01-{day - 1:02}T00:00:00+00:00",
        "window_end": f"2026-01-{day:02}T00:00:00+00:00",
        "covered": f"2026-01-{day:02}T00:00:00+00:00",
        "rows": 100,
        "reference_rows": 200,
        "status": "stable",
        "p_value": 0.4,
        "effect": 0.01,
        "alpha": 0.01,
        "summary": "Stable.",
        "evidence": {"drift": Evidence(value=1.5, checks=day)},
    }
    return DriftReport.model_validate(fields | more)


def decision(name: str = "d1", action: str = "retrain", day: int = 5, **more: Any) -> RetrainDecision:
    fields: dict[str, Any] = {
        "id": name,
        "drift_report_id": "r1",
        "model": "bot",
        "model_version": 2,
        "action": action,
        "reason": "New content.",
        "created": f"2026-01-{day:02}T01:00:00+00:00",
        "alarm_id": "a1",
        "job_id": "job-a1" if action == "retrain" else None,
    }
    return RetrainDecision.model_validate(fields | more)


def outcome(name: str = "d1", status: str = "promoted", **more: Any) -> DecisionOutcome:
    fields: dict[str, Any] = {
        "decision_id": name,
        "status": status,
        "detail": "better",
        "ended": "2026-01-05T03:00:00+00:00",
    }
    return DecisionOutcome.model_validate(fields | more)


def runs(ledger: Ledger, role: str) -> list[Any]:
    return list(MlflowClient(ledger.uri).search_runs([ledger.experiment_id], f"tags.role = '{role}'"))


def test_a_report_is_found_by_its_tags_and_comes_back_whole(ledger: Ledger, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>größer</p>", encoding="utf-8")
    given = report(status="drift", alarms=("drift", "refusal_rate"))
    run_id = ledger.log_report(given, page)
    assert ledger.latest("bot", 2, "ref") == given.model_copy(update={"run_id": run_id})
    for other in (("bot", 1, "ref"), ("bot", 2, "other"), ("both", 2, "ref")):
        assert ledger.latest(*other) is None
    (run,) = runs(ledger, "drift")
    kept = {key: run.data.tags[key] for key in ("reference", "window_start", "window_end", "covered")}
    assert kept == {
        "reference": "ref", "window_start": given.window_start,
        "window_end": given.window_end, "covered": given.covered,
    }  # fmt: skip
    assert (run.data.tags["status"], run.data.tags["alarms"]) == ("drift", "drift,refusal_rate")
    assert run.info.status == "FINISHED"
    files = {f.path for f in MlflowClient(ledger.uri).list_artifacts(run_id)}
    assert files == {"report.html", "report.json"}


def test_the_same_report_from_many_at_once_is_one_report(ledger: Ledger) -> None:
    assert ledger.experiment_id
    gate = threading.Barrier(4)

    def log(_: int) -> str:
        gate.wait()
        return Ledger(ledger.uri, ledger.experiment).log_report(report(), None)

    with ThreadPoolExecutor(4) as threads:
        found = set(threads.map(log, range(4)))
    (kept,) = ledger.reports("bot", limit=9)
    assert kept.run_id in found
    assert ledger.log_report(report(), None) == kept.run_id


def test_reports_come_by_the_end_of_their_windows_not_by_when_they_were_logged(ledger: Ledger) -> None:
    for name, day in (("late", 9), ("early", 3), ("middle", 6)):
        ledger.log_report(report(name, day), None)
    ledger.log_report(report("other", 12, model_version=3), None)
    ledger.log_report(report("empty", window_start="", window_end=""), None)
    assert [r.id for r in ledger.reports("bot", limit=9)] == ["other", "late", "middle", "early"]
    assert [r.id for r in ledger.reports("bot", limit=2, version=2)] == ["late", "middle"]
    newest = ledger.latest("bot", 2, "ref")
    assert newest is not None
    assert newest.id == "late"


def test_a_report_cut_short_is_no_report_until_it_is_logged_again(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ledger, "_log_points", killed)
        with pytest.raises(KeyboardInterrupt):
            ledger.log_report(report(), None)
    assert ledger.latest("bot", 2, "ref") is None
    run_id = ledger.log_report(report(), None)
    assert ledger.latest("bot", 2, "ref") == report(run_id=run_id)
    assert len(runs(ledger, "drift")) == 1
    assert ledger.log_report(report(), None) == run_id


def test_the_curves_of_a_version_are_one_run_and_a_check_logged_twice_is_one_point(ledger: Ledger) -> None:
    points = {
        name: [
            ("drift/p_value", value, step, step * 60_000),
            ("quality/refusal_rate", 0.1, step, step * 60_000),
        ]
        for name, value, step in (("r1", 0.4, 5), ("r2", 0.02, 6))
    }
    for name in ("r2", "r1", "r1"):
        ledger.log_report(report(name), None, points[name])
    ledger.log_report(report("r3", 7, model_version=3), None, points["r1"])
    ledger.log_report(report("r4", 8), None)
    assert {r.data.tags["monitored"] for r in runs(ledger, "monitor")} == {"bot/2", "bot/3"}
    two = next(r for r in runs(ledger, "monitor") if r.data.tags["monitored"] == "bot/2")
    history = MlflowClient(ledger.uri).get_metric_history(two.info.run_id, "drift/p_value")
    assert sorted((m.step, m.value, m.timestamp) for m in history) == [(5, 0.4, 300_000), (6, 0.02, 360_000)]
    assert two.data.metrics == {"drift/p_value": 0.02, "quality/refusal_rate": 0.1}


def test_what_users_wrote_is_in_the_report_alone(ledger: Ledger, tmp_path: Path) -> None:
    shown = Shown(id="e1", prompt=SECRET, answer="no")
    topic = TopicChange(
        name="cards", side="prompt", new=True, reference_share=0, window_share=1, count=1, examples=(shown,)
    )
    run_id = ledger.log_report(report(attribution=Attribution(where="inputs", topics=(topic,))), None)
    ledger.note(decision(run_id=run_id))
    ledger.note_outcome(outcome())
    store = MlflowClient(ledger.uri)
    holding = set()
    for run in store.search_runs([ledger.experiment_id]):
        assert SECRET not in json.dumps(run.to_dictionary())
        for file in store.list_artifacts(run.info.run_id):
            text = Path(store.download_artifacts(run.info.run_id, file.path, str(tmp_path))).read_text()
            holding |= {file.path} if SECRET in text else set()
    assert holding == {"report.json"}


def test_decisions_are_kept_by_id_and_the_first_counts(ledger: Ledger) -> None:
    run_id = ledger.log_report(report(), None)
    given = decision(run_id=run_id)
    assert ledger.note(given) == given
    assert ledger.note(given.model_copy(update={"created": "2026-02-01T00:00:00+00:00"})) == given
    assert ledger.decision("d1") == given
    assert ledger.decision("d2") is None
    (run,) = runs(ledger, "decision")
    assert run.data.tags["mlflow.parentRunId"] == run_id
    assert MlflowClient(ledger.uri).get_run(run_id).data.tags["retrain.action"] == "retrain"
    ledger.note(decision("d0", "nothing", 3))
    ledger.note(decision("d3", "collect", 7))
    assert [d.id for d in ledger.decisions("bot")] == ["d3", "d1", "d0"]
    assert [d.id for d in ledger.decisions("bot", datetime(2026, 1, 5, 1, tzinfo=UTC))] == ["d3", "d1"]
    assert [d.id for d in ledger.decisions("bot", action="collect")] == ["d3"]
    assert ledger.decisions("other") == ()


def test_an_outcome_is_never_overwritten(ledger: Ledger) -> None:
    with pytest.raises(DataError, match="there is no decision 'd1'"):
        ledger.note_outcome(outcome())
    ledger.note(decision())
    assert ledger.outcome("d1") is None
    first = ledger.note_outcome(outcome(status="failed", detail="out of memory\x1b[0m " * 900, gpu_hours=2))
    assert first.status == "failed"
    assert ledger.note_outcome(outcome(status="promoted")) == first == ledger.outcome("d1")
    assert ledger.outcomes("bot") == {"d1": first}
    assert first.gpu_hours == 2


def test_of_outcomes_at_the_same_moment_all_see_the_same_one(ledger: Ledger) -> None:
    names = [f"d{number}" for number in range(6)]
    for name in names:
        ledger.note(decision(name))
    gate = threading.Barrier(4)

    def note(number: int) -> list[int | None]:
        own = Ledger(ledger.uri, ledger.experiment)
        found = []
        for name in names:
            gate.wait()
            found.append(own.note_outcome(outcome(name, version=number)).version)
        return found

    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(note, range(4)))
    kept = [ledger.outcome(name).version for name in names]  # type: ignore[union-attr]
    assert found == [kept] * 4


def test_open_are_retrainings_without_an_outcome(ledger: Ledger) -> None:
    for name, action, day in (("d1", "retrain", 5), ("d2", "retrain", 6), ("d3", "collect", 7)):
        ledger.note(decision(name, action, day))
    assert [d.id for d in ledger.open("bot")] == ["d2", "d1"]
    ledger.note_outcome(outcome("d2", "failed"))
    assert [d.id for d in ledger.open("bot")] == ["d1"]


def test_examples_count_as_seen_once_a_retraining_with_them_came_to_a_verdict(ledger: Ledger) -> None:
    for name in ("d1", "d2", "d3"):
        ledger.note(decision(name))
    ledger.note_seen("d1", ["x", "y"])
    ledger.note_seen("d2", ["z"])
    assert ledger.seen("bot") == frozenset()
    ledger.note_outcome(outcome("d1", "rejected"))
    ledger.note_outcome(outcome("d2", "failed"))
    assert ledger.seen("bot") == {"x", "y"}


def test_rejected_examples_of_a_version_are_those_that_no_other_version_was_trained_on(
    ledger: Ledger,
) -> None:
    for name, version, status, hashes in (
        ("d1", 1, "rejected", ["a", "b"]), ("d2", 1, "promoted", ["a", "b", "c"]),
        ("d3", 2, "rejected", ["a", "b", "c", "d", "e"]), ("d4", 2, "failed", ["z"]),
    ):  # fmt: skip
        ledger.note(decision(name).model_copy(update={"model_version": version}))
        ledger.note_seen(name, hashes)
        ledger.note_outcome(outcome(name, status))
    assert ledger.tried("bot", 2) == {"d", "e"}
    assert ledger.tried("bot", 3) == frozenset()
    assert ledger.seen("bot") == set("abcde")


def test_the_tracker_writes_into_the_same_ledger(ledger: Ledger) -> None:
    tracker = Tracker(ledger.uri, ledger.experiment)
    assert (Ledger(tracker).uri, Ledger(tracker).experiment) == (ledger.uri, ledger.experiment)
    run_id = tracker.log_drift(report(), None)
    tracker.log_decision(run_id, decision())
    assert ledger.latest("bot", 2, "ref") == report(run_id=run_id)
    assert ledger.decision("d1") == decision(run_id=run_id)


def test_a_server_that_is_away_is_named(closed: int) -> None:
    with pytest.raises(ServiceError, match=f"MLflow at http://127.0.0.1:{closed}"):
        Ledger(f"http://127.0.0.1:{closed}", "x").latest("bot", 1, "ref")


@pytest.fixture
def closed() -> int:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])
