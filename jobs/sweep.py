"""Sweep, rank, register and gate: from an experiment file to a champion.

Runs as `regraft sweep PATH`, or on a cluster as `python jobs/sweep.py PATH` inside a Ray job.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jobs.console import Say, console, say, show_decision, show_leaderboard
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.data.dataset import load_dataset
from regraft.errors import RegraftError
from regraft.records import (
    DatasetVersion,
    EvalReport,
    Leaderboard,
    ModelVersion,
    PromotionDecision,
    TrialResult,
)

CHAMPION, CHALLENGER = "champion", "challenger"
RESULT_FILE = "trial_result.json"


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
    from regraft.selection.rank import rank
    from regraft.selection.render import markdown, page
    from regraft.selection.sweep_report import report_on
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
    board = rank(
        results,
        sweep_id=plan.sweep_id,
        objective=experiment.select.maximise,
        constraints=experiment.select.subject_to,
        level=experiment.select.confidence,
        resamples=experiment.select.resamples,
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


def result_of(version: ModelVersion, connection: Connection) -> TrialResult:
    """The trial that a version came from, with its scores."""
    with tempfile.TemporaryDirectory() as folder:
        file = connection.registry.load_artifact(version.run_id, RESULT_FILE, Path(folder))
        return TrialResult.model_validate_json(file.read_text())


def promote_winner(
    experiment: Experiment, board: Leaderboard, results: Sequence[TrialResult], connection: Connection
) -> tuple[ModelVersion, PromotionDecision]:
    """Register the winner and judge it against the champion, or the control before there is one.

    Raises:
        RegraftError: If there is no winner or nothing to compare it with.
    """
    winner = next((r for r in results if r.key == board.winner_key), None)
    if winner is None or winner.report is None:
        raise RegraftError(
            f"the sweep has no winner: {board.winner_reason}", "look at the runs' reasons in MLflow"
        )
    champion = connection.registry.by_alias(experiment.name, CHAMPION)
    version = connection.registry.register(experiment.name, winner)
    settled = connection.registry.promotion(version)
    if champion == version and settled is not None:
        return version, settled  # this very sweep was settled before
    if champion is None:
        # The best of the controls: what prompting alone can do has to be beaten too.
        best = next((row.key for row in board.rows if row.is_control and row.rank is not None), None)
        control = next((r for r in results if r.key == best), None)
        if control is None or control.report is None:
            raise RegraftError(
                "there is neither a champion nor a control to compare the winner with",
                "add {name: zero_shot} to sweep.methods",
            )
        incumbent, incumbent_name = control.report, f"the untuned base ({control.label})"
    else:
        incumbent, incumbent_name = _scores(champion, connection), champion.served_id
    decision = gate(experiment, version, winner.report, incumbent, incumbent_name)
    settle(experiment, version, winner.report, decision, champion, connection)
    return version, decision


def gate(
    experiment: Experiment,
    version: ModelVersion,
    challenger: EvalReport,
    incumbent: EvalReport,
    incumbent_name: str,
) -> PromotionDecision:
    """Judge with the settings of the experiment."""
    from regraft.selection.gate import judge

    return judge(
        challenger,
        incumbent,
        challenger_name=version.served_id,
        incumbent_name=incumbent_name,
        objective=experiment.select.maximise,
        margin=experiment.select.regression_margin,
        level=experiment.select.confidence,
        resamples=experiment.select.resamples,
    )


def settle(
    experiment: Experiment,
    version: ModelVersion,
    report: EvalReport,
    decision: PromotionDecision,
    champion: ModelVersion | None,
    connection: Connection,
) -> None:
    """Act on the gate's word: log it, and move the alias if it says so.

    The reference that later traffic is compared with is frozen before the alias moves: a champion without
    one could not be watched.
    """
    from monitoring.windows import Row, freeze

    registry = connection.registry
    connection.tracker(experiment).log_decision(version.run_id, decision)
    if decision.outcome != "promote":
        registry.set_alias(experiment.name, CHALLENGER, version.version)
        return
    rows = [Row(id=e.example_id, prompt=e.prompt, output=e.output) for e in report.examples]
    with tempfile.TemporaryDirectory() as folder:
        freeze(Path(folder), model=version.name, version=version.version, rows=rows)
        registry.save_artifact(version.run_id, f"reference-{version.version}", Path(folder))
    registry.promote(version, decision, expected=champion, promotion_lock=connection.promotion_lock)


def _scores(version: ModelVersion, connection: Connection) -> EvalReport:
    report = result_of(version, connection).report
    if report is None:
        raise RegraftError(f"{version.served_id} has no scores to compare with", "evaluate it again")
    return report


def run(path: Path, *, promote: bool = True, resume: bool = False) -> None:
    """The whole stage, as the command line and Ray jobs run it."""
    experiment = Experiment.load(path)
    dataset = load_dataset(experiment.name, experiment.data)
    workspace = Workspace()
    with connected(experiment, workspace, say) as connection:
        board, results, _ = sweep(experiment, dataset, connection, resume=resume)
        show_leaderboard(board)
        if promote:
            version, decision = promote_winner(experiment, board, results, connection)
            show_decision(decision)
            if decision.outcome == "promote":
                say(f"{version.served_id} is the champion")
        console.print(f"compare the runs: {connection.tracker(experiment).leaderboard_url()}", markup=False)


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(lambda: run(Path(sys.argv[1])), "python jobs/sweep.py EXPERIMENT.yaml", arguments=1)
