"""Sweep, rank, register and gate: from an experiment file to a champion.

Runs as `regraft sweep PATH`, or on a cluster as `python jobs/sweep.py PATH` inside a Ray job.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jobs.console import Say, console, say, show_decision, show_leaderboard
from jobs.evaluation_sets import with_registered
from jobs.promotion import promote_winner
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.data.dataset import load_dataset
from regraft.records import DatasetVersion, Leaderboard, TrialResult


def sweep(
    experiment: Experiment,
    dataset: DatasetVersion,
    connection: Connection,
    say: Say = say,
    tags: dict[str, str] | None = None,
    *,
    resume: bool = False,
) -> tuple[Leaderboard, tuple[TrialResult, ...], str]:
    """Run the sweep and rank its trials; gives the board, the trials, and the sweep's run id."""
    from regraft.selection.render import markdown, page
    from regraft.selection.sweep_report import report_on
    from regraft.tuning.finals import run_finals
    from regraft.tuning.sweep import run_sweep

    plan, run_id, results, left_out, _ = run_sweep(
        experiment,
        dataset,
        tracking_uri=connection.tracking_uri,
        storage=experiment.cluster.storage or connection.storage,
        say=say,
        tags=dict(tags or {}),
        resume=resume,
    )
    board, results = run_finals(
        experiment, dataset, plan.sweep_id, results, tracking_uri=connection.tracking_uri, say=say
    )
    tracker = connection.tracker(experiment)
    report = report_on(
        board,
        results,
        level=experiment.select.confidence,
        resamples=experiment.select.resamples,
        left_out=left_out,
    )
    shown = page(report)
    tracker.log_report(run_id, html=shown, text=markdown(report))
    tracker.finish_sweep(run_id, board)
    file = connection.workspace / "reports" / f"{plan.sweep_id}.html"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(shown, encoding="utf-8")
    say(report.recommendation)
    say(f"the sweep's report: {file} (and report.html in its run)")
    return board, results, run_id


def run(path: Path, *, promote: bool = True, resume: bool = False) -> None:
    """The whole stage, as the command line and Ray jobs run it."""
    experiment = Experiment.load(path)
    dataset = load_dataset(experiment.name, experiment.data)
    with connected(experiment, Workspace(), say) as connection:
        dataset = with_registered(experiment, dataset, connection.registry, say)
        board, results, _ = sweep(experiment, dataset, connection, resume=resume)
        show_leaderboard(board)
        if promote:
            version, decision = promote_winner(experiment, dataset, board, results, connection)
            show_decision(decision)
            if decision.outcome == "promote":
                say(f"{version.served_id} is the champion")
        console.print(f"compare the runs: {connection.tracker(experiment).leaderboard_url()}", markup=False)


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(lambda: run(Path(sys.argv[1])), "python jobs/sweep.py EXPERIMENT.yaml", arguments=1)
