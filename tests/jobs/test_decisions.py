"""Decisions carried out once, whatever is cut short: on a real MLflow server and a real Ray job server."""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

import jobs.decisions
from jobs.decisions import carry_out, facts_of, former_champion, job_state, reconcile
from jobs.retrain import conclude, drawn, fresh_dataset, retrain_experiment
from jobs.review import reviewed
from jobs.workspace import Connection
from monitoring.policy import Facts, decide
from regraft.cluster import local
from regraft.cluster.jobs import client, follow
from regraft.cluster.local import LocalRay, start_local_ray, stop_local_ray
from regraft.cluster.locks import cluster_lock
from regraft.config import Experiment
from regraft.data.chats import read_chats, write_chats
from regraft.errors import DataError, ServiceError
from regraft.records import (
    CapturedExchange,
    DatasetVersion,
    DecisionOutcome,
    DriftReport,
    Evidence,
    Example,
    Message,
    ModelVersion,
    PromotionDecision,
    RetrainDecision,
    TrialResult,
    content_hash,
)
from regraft.tracking.ledger import Ledger

NOW = datetime(2026, 1, 20, tzinfo=UTC)
#: What a job does in place of a retraining: it says what became of it.
STUB = (
    "from regraft.tracking.ledger import Ledger; from regraft.records import DecisionOutcome; import sys; "
    "Ledger(*sys.argv[1:3]).note_outcome(DecisionOutcome(decision_id=sys.argv[3], status='promoted', "
    "detail='by the job', version=2, ended='2026-01-20T01:00:00+00:00'))"
)


def say(_: str) -> None:
    """Nobody listens."""


def chat(name: str, question: str, answer: str = "An answer.", **tags: str) -> Example:
    turns = (Message(role="user", content=question), Message(role="assistant", content=answer))
    return Example(id=name, messages=turns, tags=tags)


def exchange(number: int, output: str = "As it was answered.", **more: Any) -> CapturedExchange:
    fields: dict[str, Any] = {
        "id": f"e{number}",
        "created": "2026-01-19T00:00:00.000000+00:00",
        "model": "bot",
        "model_version": 2,
        "messages": (Message(role="user", content=f"What of {number}?"),),
        "output": output,
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 1,
        "latency_ms": 1.0,
    }
    return CapturedExchange.model_validate(fields | more)


def report(name: str = "r1", day: int = 19, **more: Any) -> DriftReport:
    fields: dict[str, Any] = {
        "id": name, "model": "bot", "model_version": 2, "reference_id": "ref",
        "window_start": f"2026-01-{day}T00:00:00+00:00", "window_end": f"2026-01-{day}T01:00:00+00:00",
        "rows": 100, "reference_rows": 100, "status": "drift", "p_value": 0.001, "effect": 0.2, "alpha": 0.01,
        "summary": "", "kind": "new_content", "alarms": ("drift",),
        "evidence": {"drift": Evidence(value=2000, checks=3, alarmed_by="a1")},
    }  # fmt: skip
    return DriftReport.model_validate(fields | more)


class Case:
    """An experiment of two versions that were both promoted, the second the champion."""

    def __init__(self, folder: Path, name: str, mlflow_url: str, jobs_url: str | None) -> None:
        write_chats(folder / "train.jsonl", [chat(f"t{i}", f"Old question {i}?") for i in range(8)])
        write_chats(folder / "evaluation.jsonl", [chat(f"v{i}", f"How about item {i}?") for i in range(4)])
        self.path = folder / "regraft.yaml"
        self.raw: dict[str, Any] = {
            "name": name,
            "model": {"source": str(folder)},
            "data": {"train": "train.jsonl", "evaluation": "evaluation.jsonl"},
            "sweep": {
                "methods": [{"name": "zero_shot"}, {"name": "lora"}, {"name": "full"}],
                "ray_train": [],
            },
            "retrain": {"reviewed": "reviewed.jsonl", "collect": 3},
        }
        self.change()
        self.connection = Connection(
            tracking_uri=mlflow_url, ray_address="", jobs_url=jobs_url, workspace=folder / "workspace"
        )
        self.ledger = Ledger(mlflow_url, name)

    def change(self, **retrain: Any) -> Experiment:
        self.raw["retrain"] |= retrain
        self.path.write_text(yaml.safe_dump(self.raw))
        self.experiment = Experiment.load(self.path)
        return self.experiment

    def promote(self, count: int) -> list[ModelVersion]:
        """Register and promote versions, one after the other."""
        tracker, registry = self.connection.tracker(self.experiment), self.connection.registry
        data = DatasetVersion(id="d", name="d", splits={"train": (chat("x", "x"),)})
        sweep = tracker.start_sweep("s", params={}, dataset=data)
        found: list[ModelVersion] = []
        for number in range(count):
            run = tracker.start_trial(
                sweep, sweep_id="s", key=f"k{number}", label="l", params={}, dataset=data
            )
            folder = self.path.parent / f"adapter-{number}"
            folder.mkdir()
            (folder / "adapter_config.json").write_text("{}")
            model = run.log_adapter(folder, name="bot", params={}, step=1)
            result = TrialResult(
                key=f"k{number}", sweep_id="s", run_id=run.run_id, label="l", method={"name": "lora"},
                base_model="b", base_revision="r", dataset_id="d", status="completed", logged_model_id=model,
            )  # fmt: skip
            version = registry.register(self.experiment.name, run.finish(result))
            word = PromotionDecision(
                id=f"p{number}", outcome="promote", reason="", challenger="", incumbent="", evidence=()
            )
            before = found[-1] if found else None
            lock = self.connection.promotion_lock
            registry.promote(version, word, expected=before, promotion_lock=lock)
            found.append(version)
        return found

    def decided(self, seen: DriftReport | None = None, **more: Any) -> RetrainDecision:
        """A decision about a report of this experiment, as the policy gives it; not in the ledger yet."""
        facts = Facts.model_validate({"alarm_id": "a1", "fresh_examples": 99} | more)
        seen = (seen or report()).model_copy(update={"model": self.experiment.name})
        return decide(seen, self.experiment.retrain, facts, now=NOW)

    def champion(self) -> int:
        found = self.connection.registry.by_alias(self.experiment.name, "champion")
        assert found is not None
        return found.version

    def stub(self, decision: RetrainDecision) -> str:
        words = [sys.executable, "-c", STUB, self.ledger.uri, self.ledger.experiment, decision.id]
        return shlex.join(words)

    def go_on(self, command: str) -> tuple[DecisionOutcome, ...]:
        return reconcile(self.path, self.experiment, self.connection, self.ledger, say, command=command)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalRay]:
    ray = start_local_ray(
        tmp_path_factory.mktemp("ray"), num_cpus=2, num_gpus=None, dashboard_port=0, environment={}
    )
    yield ray
    stop_local_ray(ray.pid)


@pytest.fixture(scope="module")
def jobs_url(cluster: LocalRay) -> str:
    return cluster.dashboard_url


@pytest.fixture
def joined(cluster: LocalRay, case: Case) -> Iterator[Case]:
    """The case on a cluster, which this process leaves afterwards."""
    import ray

    case.connection = case.connection.model_copy(update={"ray_address": cluster.address})
    yield case
    ray.shutdown()


@pytest.fixture
def case(tmp_path: Path, mlflow_url: str, request: pytest.FixtureRequest) -> Case:
    needed = "jobs_url" in request.fixturenames
    name = f"bot-{content_hash([request.node.name], 8)}"
    return Case(tmp_path, name, mlflow_url, request.getfixturevalue("jobs_url") if needed else None)


def submissions(url: str, decision: RetrainDecision) -> list[Any]:
    return [job for job in client(url).list_jobs() if job.submission_id == decision.job_id]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize(
    ("where", "speaks"),
    [
        pytest.param("before noting", False, marks=pytest.mark.slow),
        ("before submitting", False),
        pytest.param("after submitting", True, marks=pytest.mark.slow),
    ],
)
def test_a_scheduler_killed_anywhere_comes_to_one_job_and_one_outcome(
    case: Case, jobs_url: str, monkeypatch: pytest.MonkeyPatch, where: str, speaks: bool
) -> None:
    def scheduler() -> None:
        """One round: what was left first, then a new check of the same alarm, which decides the same."""
        case.go_on(command)
        seen = case.decided(report("r2", 20))
        if not case.ledger.open(case.experiment.name) and case.ledger.outcome(seen.id) is None:
            kept = case.ledger.note(seen)
            carry_out(case.path, case.experiment, kept, case.connection, case.ledger, say, command=command)

    def killed(*args: Any, **options: Any) -> Any:
        if where == "after submitting":
            submit(*args, **options)
        raise Killed

    decision = case.decided()
    # Importing MLflow takes seconds: one job says itself what became of it, the others end without a word.
    command = case.stub(decision) if speaks else f"echo {decision.id}"
    submit = jobs.decisions.submit_retrain
    with monkeypatch.context() as patched:
        target = (case.ledger, "note") if where == "before noting" else (jobs.decisions, "submit_retrain")
        patched.setattr(*target, killed)
        with pytest.raises(Killed):
            scheduler()
    for _ in range(2):
        scheduler()
    assert decision.job_id is not None
    assert follow(jobs_url, decision.job_id, say) == "SUCCEEDED"
    scheduler()
    (job,) = submissions(jobs_url, decision)
    assert decision.id in job.entrypoint
    assert [d.id for d in case.ledger.decisions(case.experiment.name)] == [decision.id]
    outcome = case.ledger.outcome(decision.id)
    assert outcome is not None
    assert outcome.status == ("promoted" if speaks else "failed")
    assert case.ledger.open(case.experiment.name) == ()


def test_a_job_that_ends_without_a_word_is_noted_as_failed_and_one_that_runs_is_left(
    case: Case, jobs_url: str, tmp_path: Path
) -> None:
    decision = case.ledger.note(case.decided())
    assert decision.job_id is not None
    assert job_state(jobs_url, decision.job_id) is None
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    # It runs until somebody writes, and then ends as if it were killed.
    command = f"cat {shlex.quote(str(pipe))}; exit 137"
    assert case.go_on(command) == ()
    assert case.go_on(command) == ()
    state = job_state(jobs_url, decision.job_id)
    assert state is not None
    assert not state[0]
    pipe.write_text("go on")
    assert follow(jobs_url, decision.job_id, say) == "FAILED"
    (failed,) = case.go_on(command)
    assert failed.status == "failed"
    assert "137" in failed.detail
    assert case.go_on(command) == ()
    late = DecisionOutcome(decision_id=decision.id, status="promoted", detail="late", ended=failed.ended)
    assert case.ledger.note_outcome(late) == failed
    assert len(submissions(jobs_url, decision)) == 1


def test_nothing_is_carried_out_that_is_not_in_the_ledger(case: Case) -> None:
    decision = case.decided()
    with pytest.raises(DataError, match="is not in the ledger"):
        carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say)
    case.ledger.note(decision)
    with pytest.raises(ServiceError, match=r"cluster\.jobs: no job server is known"):
        carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say)


def test_going_back_is_done_once_and_only_from_the_version_it_was_decided_about(
    joined: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = joined
    first, second, third = case.promote(3)
    case.change(roll_back="automatic")
    seen = report(kind="behaviour", model_version=third.version)
    decision = case.ledger.note(case.decided(seen, former_champion=second.version))
    assert (decision.action, decision.automatic) == ("roll_back", True)

    def killed(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:  # the alias has moved, the outcome is not written
        patched.setattr(case.ledger, "note_outcome", killed)
        with pytest.raises(Killed):
            carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say)
    assert case.champion() == second.version
    (outcome,) = reconcile(case.path, case.experiment, case.connection, case.ledger, say)
    assert (outcome.status, outcome.version, case.champion()) == (
        "rolled_back",
        second.version,
        second.version,
    )
    assert carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say) == outcome
    # Having gone back, one goes further back, and never to where one came from.
    assert former_champion(case.connection.registry, second) == first
    assert former_champion(case.connection.registry, first) is None
    # Another champion came before this one was carried out.
    stale = case.ledger.note(case.decided(seen.model_copy(update={"id": "r9"}), former_champion=2))
    case.connection.registry.set_alias(case.experiment.name, "champion", first.version)
    assert carry_out(case.path, case.experiment, stale, case.connection, case.ledger, say) is None
    assert case.champion() == first.version


@pytest.mark.parametrize("held", ["by the cluster", "by the registry"])
def test_going_back_waits_for_a_promotion_under_way_and_leaves_what_it_promoted(
    joined: Case, held: str
) -> None:
    case = joined
    first, second, third = case.promote(3)
    name = case.experiment.name
    case.change(roll_back="automatic")
    seen = report(kind="behaviour", model_version=second.version)
    case.connection.registry.set_alias(name, "champion", second.version)
    decision = case.ledger.note(case.decided(seen, former_champion=first.version))
    outcomes: list[DecisionOutcome | None] = []

    def go_back() -> None:
        outcomes.append(carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say))

    local.join(case.connection.ray_address)
    thread = threading.Thread(target=go_back)
    with ExitStack() as promotion:
        if held == "by the cluster":
            promotion.enter_context(cluster_lock(f"promotion:{name}"))
        else:
            file = promotion.enter_context(case.connection.promotion_lock.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        thread.start()
        thread.join(1.5)
        assert case.champion() == second.version
        case.connection.registry.set_alias(name, "champion", third.version)
    thread.join(60)
    assert outcomes == [None]
    assert case.champion() == third.version
    assert case.ledger.outcome(decision.id) is None


def test_a_rollback_that_is_only_proposed_moves_nothing(case: Case) -> None:
    _, second = case.promote(2)
    seen = report(kind="behaviour", model_version=second.version)
    decision = case.ledger.note(case.decided(seen, former_champion=1))
    assert carry_out(case.path, case.experiment, decision, case.connection, case.ledger, say) is None
    assert reconcile(case.path, case.experiment, case.connection, case.ledger, say) == ()
    assert case.champion() == second.version


def test_what_is_collected_waits_for_a_person_and_is_never_overwritten(case: Case) -> None:
    case.change(min_fresh=1)

    def collect(name: str, *drifted: CapturedExchange) -> DecisionOutcome:
        decision = case.ledger.note(case.decided(report(name), fresh_examples=0))
        assert decision.action == "collect"
        found = carry_out(
            case.path, case.experiment, decision, case.connection, case.ledger, say, drifted=drifted
        )
        assert found is not None
        return found

    system = Message(role="system", content="Be brief.")
    user = Message(role="user", content="Hm?")
    left_out = (exchange(8, error="boom"), exchange(9, messages=(user, user)))
    outcome = collect("r1", *left_out, exchange(1, messages=(system, user)), exchange(2))
    folder = case.connection.workspace / "review" / case.experiment.name
    file = folder / "a1.jsonl"
    assert str(file) in outcome.detail
    assert [e.id for e in read_chats(file)] == ["e1", "e2"]
    assert read_chats(file)[0].reference == "As it was answered."
    # Drafts are no examples to learn from until somebody has looked.
    case.change(reviewed=str(file))
    assert reviewed(case.experiment) == ()
    edited = chat("e2", "What of 2?", "As it should be answered.")
    file.write_text(edited.model_dump_json() + "\n")  # and e1 was thrown out
    collect("r2", exchange(1), exchange(2), exchange(3), exchange(4))
    assert [e.id for e in read_chats(folder / "a1-2.jsonl")] == ["e3"]  # three in all, as the YAML says
    assert "nothing new" in collect("r3", exchange(5)).detail
    assert reviewed(case.experiment) == read_chats(file)
    assert sorted(p.name for p in folder.glob("*.jsonl")) == ["a1-2.jsonl", "a1.jsonl"]
    # After a rejected retraining the next one needs more, and there is room for it.
    tried = case.ledger.note(case.decided(alarm_id="a0"))
    case.ledger.note_seen(tried.id, ["a", "b", "c", "d"])
    case.ledger.note_outcome(
        DecisionOutcome(decision_id=tried.id, status="rejected", detail="no better", ended=NOW.isoformat())
    )
    collect("r4", *(exchange(i) for i in range(10, 15)))
    assert [e.id for e in read_chats(folder / "a1-3.jsonl")] == ["e10", "e11"]


def test_an_empty_answer_cannot_be_trained_on_before_somebody_writes_one(case: Case) -> None:
    decision = case.ledger.note(case.decided(fresh_examples=0))
    carry_out(
        case.path, case.experiment, decision, case.connection, case.ledger, say, drifted=[exchange(1, "")]
    )
    file = case.connection.workspace / "review" / case.experiment.name / "a1.jsonl"
    assert json.loads(file.read_text())["messages"][-1] == {"role": "assistant", "content": ""}
    with pytest.raises(DataError, match=r"messages\.1\.content"):
        read_chats(file)


def test_facts_come_from_the_ledger_the_registry_and_the_files(case: Case) -> None:
    first, second = case.promote(2)
    name = case.experiment.name

    def facts(seen: DriftReport | None = None) -> Facts:
        seen = (seen or report()).model_copy(update={"model": name})
        return facts_of(case.experiment, case.connection, second, seen, case.ledger, now=NOW)

    assert facts() == Facts(alarm_id="a1", former_champion=first.version)
    (case.path.parent / "reviewed.jsonl").touch()
    assert facts().fresh_examples == 0, "everything was dropped"
    assert facts(report(evidence={}, alarms=())).alarm_id == "r1"
    fresh = [chat(f"f{i}", f"Fresh question {i}?") for i in range(4)]
    old = chat("again", "Old question 3?")
    write_chats(case.path.parent / "reviewed.jsonl", [*fresh, old, chat("w", "Why?", review="draft")])
    assert facts().fresh_examples == 4

    def ended(alarm: str, status: str, days: float, **more: Any) -> RetrainDecision:
        decision = case.decided(alarm_id=alarm).model_copy(
            update={"created": (NOW - timedelta(days=days)).isoformat()}
        )
        case.ledger.note(decision)
        case.ledger.note_outcome(
            DecisionOutcome.model_validate(
                {
                    "decision_id": decision.id,
                    "status": status,
                    "detail": "so it was",
                    "ended": decision.created,
                }
                | more
            )
        )
        return decision

    ended("long ago", "promoted", 31, gpu_hours=100)
    ended("a0", "failed", 20, gpu_hours=3, cpu_hours=4)
    last = ended("a1", "rejected", 10, gpu_hours=2, cpu_hours=1)
    case.ledger.note_seen(last.id, [jobs.decisions.text_hash(e) for e in fresh[:3]])
    case.change(gpu_hours_a_month=5)
    found = facts()
    assert (found.gpu_hours, found.cpu_hours, found.fresh_examples) == (5, 5, 1)
    assert found.tried_examples == 3
    assert found.last_retrain == NOW - timedelta(days=10)
    assert found.affordable == NOW + timedelta(days=10)
    assert found.settled == "rejected: so it was"
    assert found.under_way is None
    open_one = case.ledger.note(case.decided(alarm_id="a2"))
    assert facts().under_way == open_one.job_id


def test_windows_that_looked_changed_after_the_alarm_confirm_it(case: Case) -> None:
    case.promote(2)
    name = case.experiment.name
    champion = case.connection.registry.version(name, 2)
    case.change(confirmations=2)

    def seen(number: str, day: int, status: str, alarm: str = "a1") -> DriftReport:
        evidence = {"drift": Evidence(alarmed_by=alarm)}
        return report(number, day, model=name, status=status, evidence=evidence)

    for given in (
        seen("a0", 10, "drift", "a0"), seen("a1", 11, "drift"), seen("r2", 12, "stable"), seen("r3", 13, "suspected")
    ):  # fmt: skip
        case.ledger.log_report(given, None)
    now = seen("r4", 14, "drift")
    found = facts_of(case.experiment, case.connection, champion, now, case.ledger, now=NOW)
    assert found.suspected_since_alarm == 2
    case.ledger.log_report(now, None)  # the same again, now that it stands there
    again = facts_of(case.experiment, case.connection, champion, now, case.ledger, now=NOW)
    assert again.suspected_since_alarm == 2


def test_old_examples_are_drawn_by_hash_and_evaluation_sets_stay(case: Case) -> None:
    write_chats(case.path.parent / "reviewed.jsonl", [chat("f0", "Fresh?"), chat("f1", "Newer?")])
    every = fresh_dataset(case.experiment)
    assert len(every.split("train")) == 10
    some = fresh_dataset(case.change(old_per_fresh=1.5))
    ids = [e.id for e in some.split("train")]
    assert len(ids) == 5
    assert ids[-2:] == ["f0", "f1"]
    assert some.split("evaluation") == every.split("evaluation")
    assert fresh_dataset(case.experiment).id == some.id
    old = every.split("train")[:8]
    assert {e.id for e in drawn(old, 1, 3)} < {e.id for e in drawn(old, 1, 4)}
    assert drawn(old, 0, 4) == ()
    assert drawn(old, 9, 4) == old


def test_a_retraining_sweeps_the_champions_method_or_everything_again(case: Case) -> None:
    champion = ModelVersion(
        name="bot", version=1, logged_model_id="m", run_id="r", method={"name": "lora", "rank": 4},
        base_model="b", base_revision="r", dataset_id="d",
    )  # fmt: skip
    narrow = retrain_experiment(case.change(epochs=3), champion).sweep
    assert narrow.methods == ({"name": "zero_shot"}, {"name": "lora", "rank": 4})
    full = retrain_experiment(case.change(sweep="full"), champion).sweep
    assert full.methods == case.experiment.sweep.methods
    assert (narrow.epochs, full.epochs) == (3, 3)


def test_a_retraining_that_cannot_be_done_says_why_in_its_outcome(case: Case) -> None:
    case.promote(2)
    write_chats(case.path.parent / "reviewed.jsonl", [chat("w", "Why?", review="draft")])
    decision = case.ledger.note(case.decided())
    with pytest.raises(DataError, match="no example that is reviewed"):
        conclude(case.experiment, decision, case.connection, case.ledger, say)
    outcome = case.ledger.outcome(decision.id)
    assert outcome is not None
    assert outcome.status == "failed"
    assert "no example that is reviewed" in outcome.detail
    assert case.ledger.seen(case.experiment.name) == frozenset()
    assert conclude(case.experiment, decision, case.connection, case.ledger, say) == outcome
