"""Sweeps, trials, drift checks and decisions as MLflow runs.

Everything goes through `MlflowClient`: the fluent API keeps an active run in the process, which a Ray actor
that is used for one trial after another would carry over.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException

from regraft.errors import ServiceError
from regraft.records import (
    DatasetVersion,
    DriftReport,
    Leaderboard,
    PromotionDecision,
    RetrainDecision,
    TrialResult,
    TrialStatus,
)
from regraft.tracking.client import guarded, has_code, log_decision, now_ms, to_json
from regraft.tracking.leaderboard import markdown
from regraft.tracking.trials import RESULT_FILE, TAG_CHARACTERS, RunAt, TrialRun, dataset_split_name, end_tags
from regraft.tracking.view import METRICS, VIEW_TAG, view_path, view_value

#: What MLflow calls a run that ended so; FINISHED all others.
ENDS = {"failed": "FAILED", "cancelled": "KILLED"}
#: Trials with one of these need not be run again.
SETTLED = frozenset({"completed", "stopped", "infeasible"})


class Tracker:
    """One MLflow experiment: the sweeps, trials, drift checks and decisions about one model.

    Args:
        uri: URL of the MLflow server.
        experiment: Name of the experiment; made on first use if there is none.
    """

    def __init__(self, uri: str, experiment: str) -> None:
        self.uri = uri.rstrip("/")
        self.experiment = experiment
        self._client = MlflowClient(self.uri)

    @cached_property
    def experiment_id(self) -> str:
        """The id of the experiment."""
        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                # Without the kind, MLflow opens the experiment on its pages for traces.
                kind = {"mlflow.experimentKind": "custom_model_development"}
                return str(self._client.create_experiment(self.experiment, tags=kind))
            except MlflowException as error:
                if not has_code(error, "RESOURCE_ALREADY_EXISTS"):
                    raise
                found = self._client.get_experiment_by_name(self.experiment)  # another trial was first
        if found.lifecycle_stage == "deleted":
            raise ServiceError(
                f"the MLflow experiment {self.experiment!r} is deleted",
                f"restore it: mlflow experiments restore --experiment-id {found.experiment_id}",
            )
        return str(found.experiment_id)

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
    def spent_before(self, sweep_id: str) -> tuple[dict[str, float], frozenset[str]]:
        """What a sweep took before, as `save_spent` kept it, and the keys of the trials that it started."""
        runs = self._search({"role": "sweep", "sweep": sweep_id})
        if not runs:
            return {}, frozenset()
        trials = self._search({"role": "trial", "sweep": sweep_id})
        spent: dict[str, float] = json.loads(runs[0].data.tags.get("spent", "{}"))
        return spent, frozenset(run.data.tags.get("trial_key", "") for run in trials)

    @guarded
    def has_sweep(self, sweep_id: str) -> bool:
        """Whether a sweep was begun before."""
        return bool(self._search({"role": "sweep", "sweep": sweep_id}))

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
                if result is not None:
                    record = result.model_copy(update={"run_id": run_id})
                    self._client.log_text(run_id, to_json(record), RESULT_FILE)
                self._client.log_batch(run_id, tags=end_tags(status, reason))
                self._client.set_terminated(run_id, ENDS.get(status, "FINISHED"))
        return newest

    @guarded
    def close_running(self, sweep_id: str, results: Mapping[str, TrialResult]) -> None:
        """Close what still runs of an ended sweep, where it is known what became of it.

        A trial that was ended from outside while its run was being opened has left it so.
        """
        for run in self._search({"role": "trial", "sweep": sweep_id}, "attributes.status = 'RUNNING'"):
            result = results.get(run.data.tags.get("trial_key", ""))
            if result is not None:
                self.close_trial(
                    sweep_id, result.key, status=result.status, reason=result.reason, result=result
                )

    @guarded
    def find_trial(self, key: str) -> TrialResult | None:
        """The newest settled result of the same work in any sweep of this experiment, if there is one."""
        for run in self._search({"role": "trial", "trial_key": key}):
            if (result := self._settled(run)) is not None:
                return result
        return None

    @guarded
    def finished_trials(self) -> FinishedTrials:
        """All settled trials of this experiment by key: asked for once, however many a sweep has."""
        runs: dict[str, list[Run]] = {}
        for run in self._search({"role": "trial"}):
            if _is_settled(run):
                runs.setdefault(run.data.tags.get("trial_key", ""), []).append(run)
        return FinishedTrials(self, runs)

    @guarded
    def results_on(self, dataset_id: str) -> list[TrialResult]:
        """Settled results on a dataset version, of all sweeps, oldest first; of the same work the newest."""
        found: dict[str, TrialResult] = {}
        for run in self._search({"role": "trial", "dataset": dataset_id}):
            result = self._settled(run)
            if result is not None:
                found.setdefault(result.key, result)
        return list(found.values())[::-1]

    @guarded
    def results_in(self, sweep_id: str, keys: Collection[str]) -> dict[str, TrialResult]:
        """Records of a sweep's own trials by key, whatever became of them; those without one are left out."""
        found: dict[str, TrialResult] = {}
        for run in self._search({"role": "trial", "sweep": sweep_id}) if keys else ():
            if run.data.tags.get("trial_key") not in keys:
                continue
            result = self._record(run.info.run_id) if run.info.status != "RUNNING" else None
            if result is not None:
                found.setdefault(result.key, result)
        return found

    def _settled(self, run: Run) -> TrialResult | None:
        """The record of a run that came to an end for good."""
        # One that was killed from outside may be tagged as stopped and have no record of its own.
        result = self._record(run.info.run_id) if _is_settled(run) else None
        return result if result is not None and result.status in SETTLED else None

    def _record(self, run_id: str) -> TrialResult | None:
        """The record that a trial's run holds, if it holds one."""
        if RESULT_FILE not in {f.path for f in self._client.list_artifacts(run_id)}:
            return None
        return TrialResult.model_validate(self._read_json(run_id, RESULT_FILE))

    @guarded
    def result_of(self, run_id: str) -> TrialResult:
        """The record of one trial's run.

        Raises:
            ServiceError: If there is no such run, or it has no record: it runs still, or is no trial's.
        """
        result = self._record(run_id)
        if result is None:
            raise ServiceError(
                f"the run {run_id} has no record of a trial", "name a trial's run that has ended, by its id"
            )
        return result

    @guarded
    def log_report(self, run_id: str, *, html: str, text: str) -> None:
        """Keep a sweep's report with its run, as a page and as Markdown."""
        self._client.log_text(run_id, html, "report.html")
        self._client.log_text(run_id, text, "report.md")

    @guarded
    def log_drift(self, report: DriftReport, html: Path | None) -> str:
        """Log a drift check, whatever it found, as a run of its own; the same report twice is one run.

        Returns:
            The id of the run.
        """
        served = f"{report.model}/{report.model_version}"
        run = self._resume(
            {"role": "drift", "drift_report": report.id}, name=f"drift {served} {report.window_end}"
        )
        run_id = str(run.info.run_id)
        values = {
            "drift/p_value": report.p_value,
            "drift/effect": report.effect,
            "drift/alpha": report.alpha,
            "drift/rows": report.rows,
        }
        now = now_ms()
        self._client.log_batch(
            run_id, metrics=[Metric(key, value, now, 0) for key, value in values.items() if value is not None]
        )
        tags = {"status": report.status, "model": report.model, "model_version": str(report.model_version)}
        tags |= {"reference": report.reference_id, "summary": report.summary[:TAG_CHARACTERS]}
        for key, value in tags.items():
            self._client.set_tag(run_id, key, value)
        if html is not None:
            self._client.log_text(run_id, html.read_text(encoding="utf-8"), "report.html")
        self._client.log_text(run_id, to_json(report.model_copy(update={"run_id": run_id})), "report.json")
        self._client.set_terminated(run_id)
        return run_id

    @guarded
    def log_decision(self, run_id: str, decision: RetrainDecision | PromotionDecision) -> None:
        """Log a decision on the run that it is about, as a JSON artifact and as tags."""
        log_decision(self._client, run_id, decision)

    @guarded
    def leaderboard_url(self, *metrics: str) -> str:
        """Save the view of this experiment's trials, and give its address. Saving again replaces it.

        Args:
            *metrics: Quality metrics to show, such as `rougeL`; the table is sorted by the first.
        """
        self._client.set_experiment_tag(self.experiment_id, VIEW_TAG, view_value(metrics or METRICS))
        return self.uri + view_path(self.experiment_id)

    def _search(self, tags: dict[str, str], *more: str) -> list[Run]:
        """Runs with all of these tags, and for which more holds, the newest first."""
        wanted = " AND ".join([*(f"tags.{key} = '{value}'" for key, value in tags.items()), *more])
        found, token = [], None
        while True:
            page = self._client.search_runs(
                [self.experiment_id], wanted, order_by=["attributes.start_time DESC"], page_token=token
            )
            found += list(page)
            if not (token := page.token):
                return found

    def _resume(
        self, tags: dict[str, str], *, name: str, more: dict[str, str] | None = None, counted: str = ""
    ) -> Run:
        """The run with these tags, set running; made if there is none.

        Args:
            tags: What it is found by.
            name: Its name, if it is made.
            more: Tags that it gets in any case.
            counted: A tag that counts how often this was done.
        """
        found = self._search(tags)
        more = (more or {}) | {"status": "running"}
        if counted:
            before = found[0].data.tags.get(counted, "0") if found else "0"
            more[counted] = str(int(before) + 1)
        if not found:
            return self._client.create_run(self.experiment_id, run_name=name, tags=tags | more)
        run = found[0]
        self._client.update_run(run.info.run_id, status="RUNNING")
        self._client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in more.items()])
        return run

    def _describe(self, run: Run, params: dict[str, Any], dataset: DatasetVersion) -> None:
        """Log parameters and datasets, less what an earlier attempt has logged: MLflow refuses changes."""
        new = [Param(key, str(value)) for key, value in params.items() if key not in run.data.params]
        self._client.log_batch(run.info.run_id, params=new)
        if not run.inputs.dataset_inputs:
            inputs = [_dataset_input(dataset, split) for split in dataset.splits]
            self._client.log_inputs(run.info.run_id, inputs)

    def _read_json(self, run_id: str, name: str) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(self._client.download_artifacts(run_id, name, folder))
            return json.loads(path.read_text(encoding="utf-8"))


class FinishedTrials:
    """Settled trials by key, as they stood when asked for; records are read when they are wanted."""

    def __init__(self, tracker: Tracker, runs: dict[str, list[Run]]) -> None:
        self._tracker, self._runs = tracker, runs

    def get(self, key: str) -> TrialResult | None:
        """The newest result of the work, if there is one."""
        for run in self._runs.get(key, ()):
            if (result := self._tracker._settled(run)) is not None:
                return result
        return None


def _is_settled(run: Run) -> bool:
    return run.info.status != "RUNNING" and run.data.tags.get("status") in SETTLED


def _dataset_input(dataset: DatasetVersion, split: str) -> DatasetInput:
    examples = dataset.splits[split]
    return DatasetInput(
        Dataset(
            name=dataset_split_name(dataset.name, split),
            digest=dataset.id,
            source_type="local",
            source=json.dumps({"uri": dataset.sources.get(split, "")}),
            profile=json.dumps({"num_rows": len(examples)}),
        ),
        [InputTag("mlflow.data.context", "training" if split == "train" else "eval")],
    )
