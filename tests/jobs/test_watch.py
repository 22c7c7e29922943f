"""Rounds of the monitor over days of traffic, with a real MLflow server and a real cluster."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import jobs.check_drift
from jobs.check_drift import Watched, watch
from jobs.references import captured, freeze_evaluation, reference_of
from jobs.scene import Scene
from jobs.workspace import Connection
from regraft.config import Experiment
from regraft.data.captures import CaptureStore
from regraft.data.chats import read_chats
from regraft.methods import parse_method
from regraft.models import resolve
from regraft.records import (
    CapturedExchange,
    DatasetVersion,
    EvalReport,
    Example,
    ExampleScore,
    Message,
    ModelVersion,
    TrialResult,
)
from regraft.tracking.ledger import Ledger

BEGIN = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)
KNOWN = {
    "bread": ["loaf", "crust", "oven", "flour", "dough", "rye", "slice", "bakery", "yeast", "bagel"],
    "garden": ["rose", "soil", "shovel", "hedge", "seed", "lawn", "compost", "tulip", "rake", "pond"],
    "music": ["violin", "chord", "tempo", "choir", "drum", "flute", "sonata", "melody", "tune", "harp"],
}
NEW = {"space": ["rocket", "orbit", "lunar", "comet", "probe", "galaxy", "crater", "launch", "meteor"]}

CHAT = '{"messages": [{"role": "user", "content": "%s"}, {"role": "assistant", "content": "y"}]}\n'


def said(topics: dict[str, list[str]], draw: random.Random) -> tuple[str, str]:
    words = topics[draw.choice(sorted(topics))]
    asked, told = draw.sample(words, 3), draw.sample(words, 5)
    return f"tell me of {', '.join(asked)} no {draw.randint(0, 99999)}", f"Look at {' and '.join(told)}."


class House(NamedTuple):
    """One model with a champion, and the traffic of its endpoint."""

    path: Path
    experiment: Experiment
    connection: Connection
    champion: ModelVersion

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.connection.tracker(self.experiment))

    def day(
        self, number: int, topics: dict[str, list[str]], answer: str | None = None, count: int = 60
    ) -> None:
        """Traffic of one day, evenly spread."""
        store = captured(self.experiment, self.connection)
        draw = random.Random(f"{self.experiment.name} {number}")
        for i in range(count):
            prompt, output = said(topics, draw)
            store.append(
                CapturedExchange(
                    id=f"day{number}-{i}",
                    created=(BEGIN + number * DAY + i * DAY / count).isoformat(timespec="microseconds"),
                    model=self.champion.name,
                    model_version=self.champion.version,
                    messages=(Message(role="user", content=prompt),),
                    output=output if answer is None else answer,
                    finish_reason="stop",
                    prompt_tokens=9,
                    completion_tokens=9,
                    latency_ms=40.0 + draw.random(),
                )
            )
        store.close()

    def watch(self, day: float, **more: Any) -> list[Watched]:
        return watch(
            self.path, self.experiment, self.connection, now=BEGIN + day * DAY, say=lambda line: None, **more
        )


@pytest.fixture
def house(
    two_nodes: Any, mlflow_url: str, tiny_model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Callable[..., House]]:
    def build(**monitor: Any) -> House:
        name = request.node.name.removeprefix("test_").replace("_", "-")[:40]
        raw = {
            "name": name,
            "model": {"source": str(tiny_model), "dtype": "float32"},
            "data": {"train": "train.jsonl", "evaluation": "evaluation.jsonl"},
            "sweep": {"methods": [{"name": "zero_shot"}]},
            "monitor": {
                "detector": {"name": "omnibus"},
                "min_rows": 50,
                "min_effect": 0.1,
                "arl": 200,
                "every_seconds": DAY.total_seconds(),
                "reference_rows": 0,
                **monitor,
            },
            "retrain": {"reviewed": "reviewed.jsonl", "min_fresh": 5, "collect": 7},
        }
        (tmp_path / "regraft.yaml").write_text(yaml.safe_dump(raw))
        for split in ("train", "evaluation"):
            (tmp_path / f"{split}.jsonl").write_text(CHAT % split)
        experiment = Experiment.load(tmp_path / "regraft.yaml")
        connection = Connection(
            tracking_uri=mlflow_url, ray_address=two_nodes.address, jobs_url=None, workspace=tmp_path / "w"
        )
        champion = promoted(experiment, connection, tmp_path, tiny_model)
        return House(tmp_path / "regraft.yaml", experiment, connection, champion)

    yield build


def promoted(experiment: Experiment, connection: Connection, folder: Path, base: Path) -> ModelVersion:
    """A version that is said to answer ordinary prompts in the ordinary way, made the champion."""
    method, adapter = parse_method({"name": "lora", "rank": 2}), folder / "adapter"
    method.save(method.apply(method.load_base(base, "float32", "cpu")), adapter)
    example = Example(
        id="e", messages=(Message(role="user", content="a"), Message(role="assistant", content="b"))
    )
    data = DatasetVersion(id="d", name="d", splits={"train": (example,)})
    tracker = connection.tracker(experiment)
    sweep = tracker.start_sweep("s", params={}, dataset=data)
    trial = tracker.start_trial(sweep, sweep_id="s", key="k", label="k", params={}, dataset=data)
    result = TrialResult(
        key="k", sweep_id="s", run_id=trial.run_id, label="k", method={"name": "lora", "rank": 2},
        base_model=str(base), base_revision=resolve(str(base)).revision, dataset_id="d", status="completed",
        logged_model_id=trial.log_adapter(adapter, name="k", params={}, step=1),
    )  # fmt: skip
    version = connection.registry.register(experiment.name, result)
    draw = random.Random(0)
    answers = [said(KNOWN, draw) for _ in range(90)]
    report = EvalReport(
        dataset_id="d", split="evaluation", metric_versions={},
        examples=tuple(
            ExampleScore(example_id=f"e{i}", prompt=p, reference=o, output=o, scores={"rougeL": 0.5})
            for i, (p, o) in enumerate(answers)
        ),
    )  # fmt: skip
    freeze_evaluation(experiment, version, (report, None), connection)
    connection.registry.set_alias(experiment.name, "champion", version.version)
    return version


def test_ordinary_days_are_checked_once_each_whoever_looks(house) -> None:
    here = house()
    for day in range(3):
        here.day(day, KNOWN)
    assert [w.report.status for w in here.watch(0.5)] == [], "no window has closed yet"
    with ThreadPoolExecutor(2) as pool:  # two schedulers at once, after a weekend without any
        both = list(pool.map(lambda _: here.watch(3.5), range(2)))
    found = sorted((w for watched in both for w in watched), key=lambda w: w.report.window_end)
    assert [w.report.status for w in found] == ["stable"] * 3
    assert [w.decision.action for w in found] == ["nothing"] * 3
    assert [len(w) for w in both] in ([3, 0], [0, 3])
    for before, after in pairwise(found):
        assert after.report.window_start == before.report.window_end
        assert after.report.previous == before.report.id
        assert after.report.evidence["drift"].checks == before.report.evidence["drift"].checks + 1
    assert here.watch(3.6) == []
    assert [r.id for r in here.ledger.reports(here.experiment.name, limit=9)] == [
        w.report.id for w in reversed(found)
    ]


def test_a_storm_is_suspected_then_an_alarm_and_goes_to_a_reviewer(house) -> None:
    here = house()
    here.day(0, KNOWN)
    for day in (1, 2, 3):
        here.day(day, NEW)
    ordinary, first, second, third = here.watch(4.5)
    assert ordinary.report.status == "stable"
    assert (first.report.status, first.decision.action) == ("suspected", "watch")
    assert (second.report.status, second.report.kind, second.decision.action) == (
        "drift", "new_content", "collect",
    )  # fmt: skip
    assert second.report.attribution is not None
    assert second.report.attribution.since == first.report.window_start
    assert any("fresh" in condition for condition in second.decision.waiting)
    assert third.report.evidence["drift"].alarmed_by == second.report.id
    drafts = sorted((here.connection.workspace / "review" / here.experiment.name).glob("*.jsonl"))
    assert 1 <= sum(len(file.read_text().splitlines()) for file in drafts) <= 7
    assert all(example.id.startswith("day") for file in drafts for example in read_chats(file))
    page = second.html.read_text()
    assert "new content" in page
    assert here.ledger.outcome(second.decision.id) is not None


def test_the_first_exchanges_are_found_without_listing_the_others(house, monkeypatch) -> None:
    here = house()
    for day in (0, 1):
        here.day(day, KNOWN)
    listed: list[int] = []
    times = CaptureStore.times

    def counted(self: CaptureStore, **given: Any) -> Any:
        found = times(self, **given)
        listed.append(len(found))
        return found

    monkeypatch.setattr(CaptureStore, "times", counted)
    scene = Scene.of(here.path, here.experiment, here.connection, BEGIN + 2 * DAY, lambda line: None)
    found = scene.first(lambda found: len(found) >= 30)
    assert listed == [1]
    assert [e.id for e in found] == [f"day0-{i}" for i in range(len(found))]
    assert 30 <= len(found) < 120


def test_like_prompts_answered_otherwise_call_a_person_and_never_train(house) -> None:
    here = house()
    for day in (0, 1, 2):
        here.day(day, KNOWN, answer=None if day == 0 else "I'm sorry, I cannot help with that.")
    (here.path.parent / "reviewed.jsonl").write_text("".join(CHAT % f"fresh {i}" for i in range(9)))
    _, found, *_ = here.watch(3.5)
    assert found.report.status == "drift", "a collapse is found in the window it happens in"
    assert "refusal_rate" in found.report.alarms
    assert found.report.kind in {"behaviour", "quality"}
    assert found.decision.page
    assert found.decision.action in {"watch", "roll_back"}


def test_the_first_accepted_traffic_becomes_the_reference(house) -> None:
    here = house(reference_rows=100)
    here.day(0, KNOWN)
    here.watch(1.5)
    assert reference_of(here.champion, here.connection).source == "evaluation"
    for day in (1, 2, 3):
        here.day(day, KNOWN)
    watched = here.watch(4.5)
    frozen = reference_of(here.champion, here.connection)
    assert frozen.source == "traffic"
    assert len(frozen.rows) == 100
    assert frozen.quality.counts["error_rate"].of == 100
    assert frozen.quality.scores == (0.5,) * 90, "what the evaluation scored is kept"
    assert watched
    assert all(w.report.reference_id == frozen.id for w in watched)
    assert all(w.report.window_start >= frozen.until for w in watched)
    here.day(4, KNOWN)
    here.watch(5.5)
    assert reference_of(here.champion, here.connection) == frozen, "frozen once"


def test_a_fault_that_is_over_explains_nothing_that_comes_later(house) -> None:
    here = house()
    here.day(0, KNOWN)
    here.day(1, KNOWN, answer="I'm sorry, I cannot help with that.")
    here.day(2, KNOWN)
    for day in (3, 4):
        here.day(day, NEW)
    _, fault, ordinary, first, storm = (w.report for w in here.watch(5.5))
    assert fault.kind in {"behaviour", "quality"}
    assert (ordinary.status, ordinary.alarms) == ("stable", ())
    assert ordinary.evidence["drift"].since == fault.window_start, "the fault moved what did not alarm too"
    assert not any(e.alarmed_by for e in first.evidence.values()), "and all of that went with the fault"
    assert storm.status == "drift"
    assert storm.kind == "new_content"
    assert storm.attribution is not None
    assert storm.attribution.since == first.window_start
    assert {e.alarmed_by for e in storm.evidence.values() if e.alarmed_by} == {storm.id}


def test_a_fault_that_goes_on_keeps_its_alarm(house) -> None:
    here = house()
    for day in range(4):
        here.day(day, KNOWN, answer=None if day == 0 else "I'm sorry, I cannot help with that.")
    _, first, *later = (w.report for w in here.watch(4.5))
    assert [r.evidence["refusal_rate"].alarmed_by for r in later] == [first.id, first.id]


def test_how_likely_the_champion_finds_its_answers_is_told_where_it_is_asked_for(
    house, monkeypatch, tmp_path
) -> None:
    monkeypatch.setenv("REGRAFT_HOME", str(tmp_path / "home"))
    here = house(reference_rows=100, logprob_answers=12)
    for day in range(3):
        here.day(day, KNOWN)
    *_, last = here.watch(3.5)
    found = last.report.answer_logprob
    assert found is not None
    assert (found.count, found.reference_count) == (12, 12)
    assert found.window < 0
    assert found.reference is not None
    assert abs(found.window - found.reference) < 1, "all are as unlikely to a random model"
    assert f"{found.window:.2f} nats a token (12 answers; {found.reference:.2f}" in last.report.summary
    assert f"{found.window:.2f} nats a token" in last.html.read_text()


def test_a_terminal_shows_quality_and_what_changed_after_the_verdict(house, monkeypatch, capsys) -> None:
    here = house()
    here.day(0, KNOWN)
    here.day(1, NEW)
    rounds = here.watch(2.5)
    monkeypatch.setattr(jobs.check_drift.Workspace, "connect", lambda *_: here.connection)
    monkeypatch.setattr(jobs.check_drift, "watch", lambda *_, **__: rounds)
    jobs.check_drift.run(here.path)
    shown = capsys.readouterr().out
    verdict, quality, changed, decision = (
        shown.index(words) for words in ("Drift checks", "Quality of", "What changed", "decision: watch")
    )
    assert verdict < quality < changed < decision
    assert "refusal rate" in shown[quality:changed]
    assert shown.count("Quality of") == 1, "of the last check alone, where no other alarms"
    assert max(map(len, shown[quality:changed].splitlines())) <= 100
