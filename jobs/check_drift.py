"""Compare what the endpoint answers with the champion's frozen reference, decide, and act.

A round (`watch`) closes the windows that are due, adds each to the evidence, and carries the decision out.
It runs as `regraft drift PATH`, by the monitor's schedule, or as `python jobs/check_drift.py PATH`. A look
(`look`) compares any stretch of time and changes nothing.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from jobs.console import Say, console, say, show_details, show_drift
from jobs.decisions import carry_out, facts_of, reconcile
from jobs.references import freeze_traffic
from jobs.scene import Scene
from jobs.telling import Teller
from jobs.workspace import Connection, Workspace
from monitoring.carrying import FAULTS
from monitoring.check import Checked
from monitoring.policy import decide
from monitoring.schedule import close_windows, due, settling
from monitoring.timeline import clock, metric_points
from regraft.cluster import local
from regraft.cluster.locks import cluster_lock
from regraft.config import Experiment
from regraft.records import CapturedExchange, DriftReport, RetrainDecision
from regraft.tracking.ledger import Ledger


class Watched(NamedTuple):
    """One checked window, what was decided about it, and its page."""

    report: DriftReport
    decision: RetrainDecision
    html: Path


def watch(
    path: Path,
    experiment: Experiment,
    connection: Connection,
    *,
    now: datetime | None = None,
    close: bool = False,
    act: bool = True,
    say: Say = say,
) -> list[Watched]:
    """One round: catch up on all windows that are due, decide about each, and carry it out.

    Two rounds of one model never run at once; the second finds what the first has checked.

    Args:
        path: The experiment's file, which a retraining job reads again.
        experiment: Whose endpoint.
        connection: Where things are. Ray is joined for the lock, if this process has not joined it yet.
        now: The present, if it is not the clock's.
        close: Close the last window now, and not at the next time of the schedule.
        act: Whether decisions are carried out; without, they are recorded alone.
        say: Where lines go.

    Returns:
        What was checked, oldest first; where `close` is given, a last window with too few sessions too.

    Raises:
        RegraftError: If there is no champion or it has no reference.
    """
    now = now or datetime.now(UTC)
    with _alone(experiment, connection):
        if act:  # before the champion is looked up: what is finished may move the alias
            reconcile(path, experiment, connection, Ledger(connection.tracker(experiment)), say)
        scene = Scene.of(path, experiment, connection, now, say)
        teller = Teller(experiment, connection.workspace, say)
        teller.outcomes(scene.ledger, experiment.name, now)
        return list(_rounds(_with_traffic(scene), teller, close=close, act=act))


def look(
    experiment: Experiment, connection: Connection, *, start: datetime | None, end: datetime | None
) -> tuple[Checked, Path]:
    """Compare any stretch of time with the champion's reference; nothing is counted, decided or logged.

    Raises:
        RegraftError: If there is no champion or it has no reference.
    """
    from monitoring.report import write_report

    scene = Scene.of(Path(), experiment, connection, datetime.now(UTC), say)
    checked = scene.check(scene.sample(start, end).exchanges, None)
    html = scene.page(checked.report)
    write_report(
        html, checked.report, detection=checked.detection, reference=checked.reference, window=checked.window
    )
    return checked, html


@contextmanager
def _alone(experiment: Experiment, connection: Connection) -> Iterator[None]:
    """Hold the model's locks: of this workspace's file, and of the whole cluster."""
    file = connection.workspace / f"monitor-{experiment.name}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    local.join(connection.ray_address)
    with file.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # released when the file closes, also if this process dies
        with cluster_lock(f"monitor:{experiment.name}"):
            yield


def _with_traffic(scene: Scene) -> Scene:
    """The scene with the first accepted traffic as its reference, where that is due now."""
    reference = scene.reference
    if reference.source == "traffic" or scene.experiment.monitor.reference_rows == 0:
        return scene
    last = scene.latest()
    if last is not None and last.kind in FAULTS:  # no traffic is taken for ordinary
        return scene
    frozen = freeze_traffic(
        scene.experiment, scene.champion, reference, scene.first, scene.feedback,
        scene.connection, scene.say,
    )  # fmt: skip
    return scene if frozen is None else scene._replace(reference=frozen)


def _rounds(scene: Scene, teller: Teller, *, close: bool, act: bool) -> Iterator[Watched]:
    """Check the windows that are due, one after the other."""
    monitor = scene.experiment.monitor
    previous = scene.latest()
    reached = (previous.covered if previous else "") or scene.reference.until
    covered = datetime.fromisoformat(reached) if reached else None
    if covered is not None and not (previous and previous.covered):
        covered += timedelta(microseconds=1)  # after the last exchange of the reference
    times = scene.times(covered)
    if covered is None:
        covered = times[0][0] if times else scene.now
    ticks = due(
        covered, scene.now, timedelta(seconds=monitor.every_seconds), settle=settling(scene.experiment.serve)
    )
    spans = list(close_windows(times, covered, ticks, monitor.min_rows).closed)
    at = spans[-1][1] if spans else covered
    if close and at < scene.now:
        spans.append((at, scene.now))
    for span in spans:
        watched = _one(scene, previous, span, act=act)
        teller.checked(watched.report, watched.decision)
        previous = watched.report
        yield watched


def _one(
    scene: Scene, previous: DriftReport | None, span: tuple[datetime, datetime], *, act: bool
) -> Watched:
    """Check a window, decide, write it all down, and only then act: what is cut short is found again."""
    from monitoring.report import write_report

    start, end = (time.astimezone(UTC).isoformat(timespec="microseconds") for time in span)
    sample = scene.sample(*span)
    checked = scene.check(sample.exchanges, scene.carried(previous) if previous else None, start, end)
    report = checked.report.model_copy(update={"exchanges": sample.total})
    ledger = scene.ledger
    scene.say(f"{sample.total} exchanges of {scene.champion.served_id}, {start} to {end}: {report.status}")
    facts = facts_of(
        scene.experiment, scene.connection, scene.champion, report, ledger, now=scene.now,
        exchanges=sample.exchanges, reference=checked.reference, feedback=scene.feedback,
    )  # fmt: skip
    decision = decide(report, scene.experiment.retrain, facts, now=scene.now)
    html = scene.page(report)
    write_report(
        html,
        report,
        decision=decision,
        detection=checked.detection,
        reference=checked.reference,
        window=checked.window,
        history=ledger.reports(report.model, limit=50, version=report.model_version),
    )
    run_id = ledger.log_report(report, html, metric_points(report))
    report = report.model_copy(update={"run_id": run_id, "report_path": str(html)})
    decision = ledger.note(decision.model_copy(update={"run_id": run_id}))
    if act:
        carry_out(
            scene.path, scene.experiment, decision, scene.connection, ledger, scene.say,
            drifted=_drifted(sample.exchanges, checked.drifted),
        )  # fmt: skip
    return Watched(report, decision, html)


def _drifted(exchanges: Sequence[CapturedExchange], first: Sequence[str]) -> list[CapturedExchange]:
    """The exchanges of these ids, in their order."""
    by_id = {e.id: e for e in exchanges}
    return [by_id[name] for name in first if name in by_id]


def run(
    path: Path, *, start: datetime | None = None, end: datetime | None = None, act: bool = True
) -> list[DriftReport]:
    """What `regraft drift` does: a round that closes its window now, or a look at a stretch of time."""
    experiment = Experiment.load(path)
    connection = Workspace().connect(experiment)
    if start is not None or end is not None:
        checked, html = look(experiment, connection, start=start, end=end)
        show_drift([("looked at", checked.report)])
        show_details(checked.report)
        console.print(checked.report.summary, markup=False)
        say(f"report: {html}")
        say("only looked at: nothing was counted or decided; without --start and --end it is")
        return [checked.report]
    rounds = watch(path, experiment, connection, close=True, act=act)
    show_drift(
        [(clock(watched.report.window_end), watched.report) for watched in rounds],
        {watched.report.id: watched.decision for watched in rounds},
    )
    for watched in rounds:
        if watched.report.alarms or watched is rounds[-1]:
            show_details(watched.report)
        console.print(watched.report.summary, markup=False)
        say(f"report: {watched.html}")
        say(f"decision: {watched.decision.action}: {watched.decision.reason}")
    return [watched.report for watched in rounds]


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(lambda: run(Path(sys.argv[1])), "python jobs/check_drift.py EXPERIMENT.yaml", arguments=1)
