"""Sweeps, trials, drift checks and decisions as MLflow runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, RunTag

from regraft.records import (
    DatasetVersion,
    DriftReport,
    EvalReport,
    Leaderboard,
    ModelVersion,
    PromotionDecision,
    RetrainDecision,
    Speed,
    TrialResult,
    TrialStatus,
)
from regraft.tracking.client import guarded, log_decision, now_ms, to_json
from regraft.tracking.leaderboard import markdown
from regraft.tracking.ledger import Ledger
from regraft.tracking.results import Results
from regraft.tracking.trials import RESULT_FILE, TAG_CHARACTERS, RunAt, TrialRun, end_tags
from regraft.tracking.view import METRICS, VIEW_TAG, view_path, view_value

#: What MLflow calls a run that ended so; FINISHED all others.
ENDS = {"failed": "FAILED", "cancelled": "KILLED"}


class Tracker(Results):
    """One MLflow experiment: the sweeps, trials, drift checks and decisions about one model.

    Args:
        uri: URL of the MLflow server.
        experiment: Name of the experiment; made on first use if there is none.
    """

    @guarded
    def start_sweep(self, sweep_id: str, *, params: dict[str, Any], dataset: DatasetVersion) -> str:
        """Find or create the parent run of a sweep, and set it running.

        Returns:
            The id of the run.
        """
        run = self._resume({"role": "sweep", "sweep": sweep_id}, name=f"sweep {sweep_id}")
        self._describe(run, params, dataset)
        return str(run.info.run_id)

    @guarded
    def finish_sweep(self, run_id: str, leaderboard: Leaderboard, status: str = "FINISHED") -> None:
        """Log the leaderboard, mark the winner, and end the sweep's run."""
        self._client.log_text(run_id, to_json(leaderboard), "leaderboard.json")
        self._client.log_text(run_id, markdown(leaderboard), "leaderboard.md")
        self._client.set_tag(run_id, "winner_reason", leaderboard.winner_reason[:TAG_CHARACTERS])
        winner = next((row for row in leaderboard.rows if row.key == leaderboard.winner_key), None)
        winning_run = winner.run_id if winner else None
        # A resumed sweep may have another winner than it had before.
        for run in self._search({"role": "trial", "sweep": leaderboard.sweep_id, "winner": "true"}):
            if run.info.run_id != winning_run:
                self._client.delete_tag(run.info.run_id, "winner")
        if winner is not None:
            objective = leaderboard.objective
            best = winner.quality.mean if winner.quality else winner.metrics.get(objective)
            if best is not None:
                self._client.log_metric(run_id, f"best/{objective}", best)
            self._client.set_tag(run_id, "winner", winner.key)
            self._client.set_tag(run_id, "winner_label", winner.label)
            self._client.set_tag(winner.run_id, "winner", "true")
        self._client.set_terminated(run_id, status)

    @guarded
    def save_spent(self, run_id: str, spent: dict[str, float]) -> None:
        """Keep what a sweep took so far with its run: for people as metrics, exactly as a tag."""
        now = now_ms()
        metrics = [Metric(f"spent/{name}", float(value), now, 0) for name, value in spent.items()]
        self._client.log_batch(run_id, metrics=metrics, tags=[RunTag("spent", json.dumps(spent))])

    @guarded
    def spent_before(self, sweep_id: str) -> tuple[dict[str, Any], frozenset[str]] | None:
        """What a sweep took before, as `save_spent` kept it, and the keys of the trials that it started.

        None if it was never begun.
        """
        runs = self._search({"role": "sweep", "sweep": sweep_id})
        if not runs:
            return None
        trials = self._search({"role": "trial", "sweep": sweep_id})
        spent: dict[str, Any] = json.loads(runs[0].data.tags.get("spent", "{}"))
        return spent, frozenset(run.data.tags.get("trial_key", "") for run in trials)

    @guarded
    def spent_on(self, params: dict[str, str]) -> list[tuple[dict[str, Any], list[TrialResult]]]:
        """What sweeps with these parameters took, as `save_spent` kept it, and their trials' records."""
        wanted = [f"params.{key} = '{value}'" for key, value in params.items()]
        found = []
        for run in self._search({"role": "sweep"}, *wanted):
            trials = self._search({"role": "trial", "sweep": run.data.tags["sweep"]})
            ended = [t for t in trials if t.info.status != "RUNNING"]
            records = (self._record(t.info.run_id) for t in ended)
            spent: dict[str, Any] = json.loads(run.data.tags.get("spent", "{}"))
            found.append((spent, [record for record in records if record is not None]))
        return found

    @guarded
    def end_sweep(self, run_id: str, status: str) -> None:
        """End the run of a sweep that did not come to a leaderboard: `FAILED` or `KILLED`."""
        self._client.set_terminated(run_id, status)

    def start_trial(
        self,
        sweep_run_id: str,
        *,
        sweep_id: str,
        key: str,
        label: str,
        params: dict[str, Any],
        dataset: DatasetVersion,
    ) -> TrialRun:
        """Find or create the run of a trial: a trial that is started again goes on in the same run.

        Args:
            sweep_run_id: The sweep's run, as `start_sweep` gave it.
            sweep_id: The sweep.
            key: What identifies the trial's work.
            label: Name of the run, for people.
            params: Settings of the trial. Those an earlier attempt has logged stay as they are.
            dataset: What it trains and is evaluated on.
        """

        def opened() -> RunAt:
            tags = {"role": "trial", "sweep": sweep_id, "trial_key": key}
            known = {"mlflow.parentRunId": sweep_run_id, "dataset": dataset.id}  # MLflow has no other parent
            run = self._resume(tags, name=label, more=known, counted="attempt")
            self._describe(run, params, dataset)
            return RunAt(self.experiment_id, str(run.info.run_id), str(run.info.artifact_uri))

        return TrialRun(self._client, uri=self.uri, opened=opened, dataset_name=dataset.name)

    @guarded
    def close_trial(
        self,
        sweep_id: str,
        key: str,
        *,
        status: TrialStatus,
        reason: str,
        result: TrialResult | None = None,
    ) -> str | None:
        """End the run of a trial that could not do so itself, such as one that the scheduler killed.

        Does nothing if the run has ended, or was never made.

        Args:
            sweep_id: The sweep.
            key: The trial.
            status: What became of it.
            reason: Why, in words.
            result: What is known of it, to be kept as its record.

        Returns:
            The id of the trial's newest run, if it has one.
        """
        newest = None
        for run in self._search({"role": "trial", "sweep": sweep_id, "trial_key": key}):
            run_id: str = run.info.run_id
            newest = newest or run_id
            if run.info.status == "RUNNING":
                self._close(run_id, status, reason, result)
        return newest

    def _close(self, run_id: str, status: TrialStatus, reason: str, result: TrialResult | None) -> None:
        if result is not None:
            record = result.model_copy(update={"run_id": run_id})
            self._client.log_text(run_id, to_json(record), RESULT_FILE)
        self._client.log_batch(run_id, tags=end_tags(status, reason))
        self._client.set_terminated(run_id, ENDS.get(status, "FINISHED"))

    @guarded
    def add_final(self, result: TrialResult) -> None:
        """Add to a trial's run, which has ended, what was measured of it afterwards."""
        metrics = _of_final(result.final, result.speed)
        self._client.log_batch(result.run_id, metrics=metrics, tags=end_tags(result.status, result.reason))
        self._client.log_text(result.run_id, to_json(result), RESULT_FILE)

    @guarded
    def close_running(self, sweep_id: str, results: Mapping[str, TrialResult]) -> None:
        """Close what still runs of an ended sweep, where it is known what became of it.

        A trial that was ended from outside while its run was being opened has left it so.
        """
        for run in self._search({"role": "trial", "sweep": sweep_id}, "attributes.status = 'RUNNING'"):
            result = results.get(run.data.tags.get("trial_key", ""))
            if result is not None:
                self._close(run.info.run_id, result.status, result.reason, result)

    @guarded
    def log_report(self, run_id: str, *, html: str, text: str) -> None:
        """Keep a sweep's report with its run, as a page and as Markdown."""
        self._client.log_text(run_id, html, "report.html")
        self._client.log_text(run_id, text, "report.md")

    def log_drift(self, report: DriftReport, html: Path | None) -> str:
        """Log a drift check: see `Ledger.log_report`."""
        return Ledger(self.uri, self.experiment).log_report(report, html)

    @guarded
    def log_evaluation(self, version: ModelVersion, report: EvalReport, speed: Speed | None) -> str:
        """Keep what a version scored, as a run of its own; the same evaluation again replaces it.

        Returns:
            The id of the run.
        """
        tags = {"role": "evaluation", "evaluated": version.served_id, "dataset": report.dataset_id}
        run = self._resume(tags | {"asked": report.asked}, name=f"evaluation {version.served_id}")
        run_id = str(run.info.run_id)
        self._client.log_batch(run_id, metrics=_of_final(report, speed))
        self._client.log_text(run_id, to_json(report), "report.json")
        self._client.set_tag(run_id, "status", "completed")
        self._client.set_terminated(run_id)
        return run_id

    @guarded
    def log_decision(self, run_id: str, decision: RetrainDecision | PromotionDecision) -> None:
        """Log a decision on the run that it is about; one about drift goes into the ledger too."""
        if isinstance(decision, RetrainDecision):
            Ledger(self.uri, self.experiment).note(decision.model_copy(update={"run_id": run_id}))
        else:
            log_decision(self._client, run_id, decision)

    @guarded
    def leaderboard_url(self, *metrics: str) -> str:
        """Save the view of this experiment's trials, and give its address. Saving again replaces it.

        Args:
            *metrics: Quality metrics to show, such as `rougeL`; the table is sorted by the first.
        """
        self._client.set_experiment_tag(self.experiment_id, VIEW_TAG, view_value(metrics or METRICS))
        return self.uri + view_path(self.experiment_id)


def _of_final(report: EvalReport | None, speed: Speed | None) -> list[Metric]:
    """What was measured alone, as metrics."""
    now = now_ms()
    values = {f"final/{k}": v for k, v in (report.means | report.whole).items()} if report else {}
    values |= {f"speed/{k}": v for k, v in speed.figures.items()} if speed else {}
    return [Metric(key, value, now, 0) for key, value in values.items()]
