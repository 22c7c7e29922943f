"""From a check to a decision's outcome: what the policy looks at, and carrying out what it decided.

Whatever is cut short anywhere is found again: decisions stand in the ledger before anything is done, a job
has one id, and of outcomes the first counts.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jobs.console import Say
from jobs.review import put_before_reviewer, reviewed, text_hash
from jobs.rollback import roll_back
from jobs.workspace import Connection
from monitoring.policy import Facts
from monitoring.segments import worse_segments
from monitoring.waiting import MONTH, fresh_needed
from monitoring.windows import Row
from regraft.config import Experiment, RetrainSection
from regraft.data.chats import read_chats
from regraft.errors import DataError, ServiceError
from regraft.records import (
    CapturedExchange,
    DecisionOutcome,
    DriftReport,
    Feedback,
    ModelVersion,
    RetrainDecision,
)
from regraft.times import utc
from regraft.tracking.ledger import Ledger
from regraft.tracking.registry import PromotionConflictError, Registry

#: So many reports are looked through for windows that looked changed after an alarm.
_REPORTS = 200


def facts_of(
    experiment: Experiment,
    connection: Connection,
    champion: ModelVersion,
    report: DriftReport,
    ledger: Ledger,
    *,
    now: datetime,
    exchanges: Sequence[CapturedExchange] = (),
    reference: Sequence[Row] = (),
    feedback: Sequence[Feedback] = (),
) -> Facts:
    """What the policy looks at beside the report.

    Args:
        experiment: Whose model.
        connection: Where things are.
        champion: The version that was checked.
        report: Of the check.
        ledger: What was decided before.
        now: The present.
        exchanges: Of the window, those that failed too: their quality is looked at topic by topic where
            known topics come in other shares.
        reference: Rows that the window was compared with.
        feedback: On any answers.
    """
    name = report.model
    alarm = alarm_of(report)
    decided = ledger.decisions(name, action="retrain")
    outcomes = ledger.outcomes(name)
    month = [o for o in outcomes.values() if now - MONTH < utc(o.ended) <= now]
    settled = [outcomes[d.id] for d in decided if d.alarm_id == alarm and d.id in outcomes]
    under_way = [d.job_id for d in decided if d.id not in outcomes]
    former = former_champion(connection.registry, champion)
    worse: tuple[str, ...] = ()
    if report.kind == "prompt_mix" and report.status == "drift":
        cache = connection.workspace / "embeddings"
        worse = worse_segments(exchanges, reference, experiment.monitor, feedback=feedback, cache=cache)
    return Facts(
        alarm_id=alarm,
        fresh_examples=fresh_examples(experiment, ledger),
        tried_examples=len(ledger.tried(name, champion.version)) if decided else 0,
        last_retrain=max((utc(d.created) for d in decided), default=None),
        gpu_hours=sum(o.gpu_hours for o in month),
        cpu_hours=sum(o.cpu_hours for o in month),
        affordable=_affordable(month, experiment.retrain),
        under_way=under_way[0] if under_way else None,
        settled=f"{settled[0].status}: {settled[0].detail}" if settled else "",
        former_champion=former.version if former else None,
        suspected_since_alarm=_confirmed(report, alarm, ledger) if experiment.retrain.confirmations else 0,
        segment_worse=worse,
    )


def alarm_of(report: DriftReport) -> str:
    """The report that raised the alarm: of several alarms that of the texts; its own id without one."""
    names = sorted(report.alarms, key=lambda name: (name != "drift", name != "prompts", name))
    raised = (report.evidence[n].alarmed_by for n in names if n in report.evidence)
    return next((alarm for alarm in raised if alarm is not None), report.id)


def fresh_examples(experiment: Experiment, ledger: Ledger) -> int:
    """Reviewed examples that no training has seen: neither a retraining with a verdict, nor the data."""
    found = {text_hash(e) for e in reviewed(experiment)}
    if found:
        found -= ledger.seen(experiment.name)
    if found:
        found -= {text_hash(e) for path in experiment.data.train for e in read_chats(path)}
    return len(found)


def former_champion(registry: Registry, champion: ModelVersion) -> ModelVersion | None:
    """The newest version before this one that was a champion; None if this was the first.

    Never a later one: having gone back once, one does not go back to what one came from.
    """
    earlier = (v for v in registry.promoted(champion.name) if v.version < champion.version)
    return next(earlier, None)


def submit_retrain(
    path: Path, decision: RetrainDecision, connection: Connection, *, command: str | None = None
) -> bool:
    """Turn a decision into a job, exactly once; whether this call submitted it.

    Args:
        path: The experiment's file, as the cluster sees it.
        decision: To retrain.
        connection: Where things are.
        command: What the job runs, in place of the retraining.

    Raises:
        DataError: If the decision is another.
        ServiceError: If no job server is known or it refuses.
    """
    from regraft.cluster.jobs import submit_once

    if decision.job_id is None:
        raise DataError(
            f"decision {decision.id} is {decision.action!r} and has no job", "only 'retrain' becomes a job"
        )
    return submit_once(
        _jobs_url(connection),
        decision.job_id,
        command or f"python -m jobs.retrain {shlex.quote(str(path.resolve()))} {decision.id}",
        runtime_env={
            "env_vars": {
                "MLFLOW_TRACKING_URI": connection.tracking_uri,
                "REGRAFT_WORKSPACE": str(connection.workspace),
            }
        },
        metadata={"experiment": decision.model, "drift_report": decision.drift_report_id},
    )


def carry_out(
    path: Path,
    experiment: Experiment,
    decision: RetrainDecision,
    connection: Connection,
    ledger: Ledger,
    say: Say,
    *,
    drifted: Sequence[CapturedExchange] = (),
    command: str | None = None,
) -> DecisionOutcome | None:
    """Do what was decided, unless that was done already. The decision must stand in the ledger.

    Args:
        path: The experiment's file.
        experiment: The same, read.
        decision: What to do.
        connection: Where things are.
        ledger: Where the outcome is written.
        say: Where lines go.
        drifted: Exchanges to put before a reviewer, those that drifted most first.
        command: As in `submit_retrain`.

    Returns:
        The outcome where there is one now; a retraining writes its own.

    Raises:
        DataError: If a decision to retrain or to go back is not in the ledger.
        ServiceError: If MLflow or the job server cannot be reached.
    """
    if decision.action not in {"retrain", "roll_back", "collect"} or not decision.automatic:
        return None
    if ledger.decision(decision.id) is None:
        raise DataError(f"decision {decision.id} is not in the ledger", "note it before it is carried out")
    if (known := ledger.outcome(decision.id)) is not None:
        return known
    if decision.action == "retrain":
        new = submit_retrain(path, decision, connection, command=command)
        say(f"{'submitted' if new else 'already submitted'} {decision.job_id}")
        return None
    if decision.action == "roll_back":
        return _go_back(experiment, decision, connection, ledger, say)
    retrain = experiment.retrain
    needed = fresh_needed(retrain, len(ledger.tried(decision.model, decision.model_version)))
    # Twice what is needed more: a reviewer drops some of it, and a bound below that would never be met.
    most = retrain.collect + 2 * (needed - retrain.min_fresh)
    detail = put_before_reviewer(experiment, decision, connection.workspace, drifted, most)
    say(detail)
    return ledger.note_outcome(
        DecisionOutcome(decision_id=decision.id, status="collected", detail=detail, ended=present())
    )


def reconcile(
    path: Path,
    experiment: Experiment,
    connection: Connection,
    ledger: Ledger,
    say: Say,
    *,
    command: str | None = None,
) -> tuple[DecisionOutcome, ...]:
    """Bring what was decided to an end: submit what is no job yet, and write down what ended without a word.

    Args:
        path: The experiment's file.
        experiment: The same, read.
        connection: Where things are.
        ledger: What was decided.
        say: Where lines go.
        command: As in `submit_retrain`.

    Returns:
        Outcomes that were written down now.

    Raises:
        ServiceError: If MLflow cannot be reached; the job server only where a retraining is open.
    """
    found = []
    for decision in ledger.open(experiment.name):
        assert decision.job_id is not None
        # In this order: what a job that has ended did not write before, it never will.
        state = job_state(_jobs_url(connection), decision.job_id)
        if state is None:
            submit_retrain(path, decision, connection, command=command)
            say(f"submitted {decision.job_id}, which was decided before and not submitted")
            continue
        ended, words = state
        if not ended or ledger.outcome(decision.id) is not None:
            continue
        outcome = DecisionOutcome(
            decision_id=decision.id, status="failed", ended=present(),
            detail=f"job {decision.job_id} ended without an outcome: {words}",
        )  # fmt: skip
        found.append(ledger.note_outcome(outcome))
        say(f"retraining {decision.id}: {found[-1].status}: {found[-1].detail}")
    for decision in ledger.decisions(experiment.name, action="roll_back"):
        if decision.automatic and ledger.outcome(decision.id) is None:
            gone = _go_back(experiment, decision, connection, ledger, say)
            found += [gone] if gone else []
    return tuple(found)


def job_state(url: str, job_id: str) -> tuple[bool, str] | None:
    """Whether a job has ended, and its state in words; None if the job server knows none of that id.

    Raises:
        ServiceError: If there is no job server at the URL, or it does not say.
    """
    from regraft.cluster.jobs import client

    try:
        info = client(url).get_job_info(job_id)
    except RuntimeError as error:
        if "does not exist" in str(error):
            return None
        raise ServiceError(f"the job server at {url} does not say of {job_id}: {error}") from error
    words = f"{info.status.value}: {info.message}" if info.message else str(info.status.value)
    return info.status.is_terminal(), words


def present() -> str:
    """The present, UTC in ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _go_back(
    experiment: Experiment, decision: RetrainDecision, connection: Connection, ledger: Ledger, say: Say
) -> DecisionOutcome | None:
    """Make the former champion of the version that was decided about the champion again."""
    registry = connection.registry
    former = former_champion(registry, registry.version(decision.model, decision.model_version))
    champion = registry.by_alias(decision.model, "champion")
    if former is None or champion is None:
        raise DataError(
            f"decision {decision.id}: {decision.model}/{decision.model_version} has no former champion",
            "point the alias to another version by `regraft rollback`",
        )
    if champion.version == decision.model_version:
        try:
            roll_back(experiment, connection, former.version, say, instead_of=champion)
        except PromotionConflictError as conflict:  # while this waited for the lock
            say(f"{conflict.problem}: not gone back")
            return None
    elif champion.version != former.version:
        return None  # another was promoted meanwhile: nothing is left to go back from
    return ledger.note_outcome(
        DecisionOutcome(
            decision_id=decision.id, status="rolled_back", version=former.version, ended=present(),
            detail=f"{former.served_id} is the champion again, in place of version {decision.model_version}",
        )
    )  # fmt: skip


def _confirmed(report: DriftReport, alarm: str, ledger: Ledger) -> int:
    """Windows that looked changed after the one that raised the alarm, this one among them."""
    before = ledger.reports(report.model, limit=_REPORTS, version=report.model_version)
    return sum(
        seen.status in {"suspected", "drift"} and seen.id != alarm
        for seen in {r.id: r for r in (*before, report)}.values()
        if any(e.alarmed_by == alarm for e in seen.evidence.values())
    )


def _affordable(month: Sequence[DecisionOutcome], settings: RetrainSection) -> datetime | None:
    """When so much lies 30 days back that both budgets have room; None where that is so now, or never."""
    left = sorted(month, key=lambda o: utc(o.ended))
    moment = None
    while left and (
        _over(sum(o.gpu_hours for o in left), settings.gpu_hours_a_month)
        or _over(sum(o.cpu_hours for o in left), settings.cpu_hours_a_month)
    ):
        moment = utc(left.pop(0).ended) + MONTH
    return moment


def _over(hours: float, bound: float | None) -> bool:
    return bound is not None and hours >= bound


def _jobs_url(connection: Connection) -> str:
    if connection.jobs_url is None:
        raise ServiceError("cluster.jobs: no job server is known", "set cluster.jobs to http://<head>:8265")
    return connection.jobs_url
