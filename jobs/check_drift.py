"""Compare a window of captured exchanges with the champion's frozen reference, and decide.

Runs as `regraft drift PATH`, by the monitor's schedule, or as `python jobs/check_drift.py PATH`.
"""

from __future__ import annotations

import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from jobs.console import Say, console, say, show_drift
from jobs.workspace import Connection, Workspace
from monitoring.check import check_window
from monitoring.policy import decide
from monitoring.windows import load
from regraft.config import Experiment
from regraft.data.captures import CaptureStore
from regraft.data.chats import read_chats
from regraft.errors import DataError, RegraftError, ServiceError
from regraft.records import DriftReport, ModelVersion, RetrainDecision


def check_drift(
    experiment: Experiment,
    connection: Connection,
    *,
    start: datetime | None,
    end: datetime | None,
    say: Say = say,
) -> tuple[DriftReport, RetrainDecision, Path]:
    """Check one window of the present champion's exchanges; report and decision are logged whatever they say.

    Args:
        experiment: Whose endpoint.
        connection: Where things are.
        start: Exchanges from here on; all if None.
        end: Exchanges before here; all if None.
        say: Where lines go.

    Returns:
        The report, the decision, and the HTML file.

    Raises:
        RegraftError: If there is no champion or it has no reference.
    """
    champion = connection.registry.by_alias(experiment.name, "champion")
    if champion is None:
        raise RegraftError(f"{experiment.name} has no champion to watch", "run `regraft sweep` first")
    with tempfile.TemporaryDirectory() as folder:
        name = f"reference-{champion.version}"
        reference = load(connection.registry.load_artifact(champion.run_id, name, Path(folder)))
    store = CaptureStore.of(connection.captures(experiment), experiment.serve.capture)
    found = store.read(start=start, end=end, model=experiment.name, version=champion.version)
    exchanges = [e for e in found if e.variant != "shadow"]  # nobody saw those
    say(f"{len(exchanges)} exchanges of {champion.served_id} against {len(reference.rows)} reference answers")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    html = connection.workspace / "reports" / f"drift-{experiment.name}-{stamp}.html"
    html.parent.mkdir(parents=True, exist_ok=True)
    report = check_window(reference, exchanges, experiment.monitor, html)
    tracker = connection.tracker(experiment)
    run_id = tracker.log_drift(report, html if html.exists() else None)
    report = report.model_copy(update={"run_id": run_id, "report_path": str(html)})
    decision = decide(
        report,
        experiment.retrain,
        fresh_examples=fresh_examples(experiment),
        last_retrain=last_retrain(experiment, connection, champion),
        now=datetime.now(UTC),
    )
    tracker.log_decision(run_id, decision)
    ledger = connection.workspace / "decisions" / f"{decision.id}.json"
    ledger.parent.mkdir(parents=True, exist_ok=True)
    ledger.write_text(decision.model_dump_json(indent=1))
    return report, decision, html


def fresh_examples(experiment: Experiment) -> int:
    """Reviewed fresh examples that a retraining could use."""
    path = experiment.retrain.reviewed
    if path is None or not path.exists():
        return 0
    return len(read_chats(path))


def last_retrain(experiment: Experiment, connection: Connection, champion: ModelVersion) -> datetime | None:
    """When the last retraining of this model was decided, from the workspace's ledger."""
    found = None
    for file in (connection.workspace / "decisions").glob("*.json"):
        decision = RetrainDecision.model_validate_json(file.read_text())
        if decision.action == "retrain" and decision.model == champion.name:
            when = datetime.fromisoformat(decision.created)
            found = when if found is None else max(found, when)
    return found


def submit_retrain(path: Path, decision: RetrainDecision, connection: Connection) -> bool:
    """Turn a decision into a job, exactly once; whether this call submitted it.

    Raises:
        ServiceError: If no job server is known or it refuses.
    """
    from regraft.cluster.jobs import submit_once

    if decision.job_id is None:
        raise DataError(
            f"decision {decision.id} is {decision.action!r} and has no job", "only 'retrain' becomes a job"
        )
    if connection.jobs_url is None:
        raise ServiceError("cluster.jobs: no job server is known", "set cluster.jobs to http://<head>:8265")
    return submit_once(
        connection.jobs_url,
        decision.job_id,
        f"python -m jobs.retrain {path.resolve()} {decision.id}",
        runtime_env={
            "env_vars": {
                "MLFLOW_TRACKING_URI": connection.tracking_uri,
                "REGRAFT_WORKSPACE": str(connection.workspace),
            }
        },
        metadata={"experiment": decision.model, "drift_report": decision.drift_report_id},
    )


def run(
    path: Path, *, start: datetime | None = None, end: datetime | None = None, act: bool = True
) -> DriftReport:
    """One check, as the command line and the schedule run it."""
    experiment = Experiment.load(path)
    connection = Workspace().connect(experiment)
    report, decision, html = check_drift(experiment, connection, start=start, end=end)
    show_drift([("checked", report)])
    console.print(report.summary, markup=False)
    console.print(f"report: {html}", markup=False)
    say(f"decision: {decision.action}: {decision.reason}")
    if act and decision.action == "retrain":
        new = submit_retrain(path, decision, connection)
        say(f"{'submitted' if new else 'already submitted'} {decision.job_id}")
    return report


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(lambda: run(Path(sys.argv[1])), "python jobs/check_drift.py EXPERIMENT.yaml", arguments=1)
