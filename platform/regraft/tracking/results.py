"""What trials came to, as their runs keep it."""

from __future__ import annotations

from collections.abc import Collection

from mlflow.entities import Run

from regraft.errors import ServiceError
from regraft.records import TrialResult
from regraft.tracking.client import guarded
from regraft.tracking.experiment import TrackedExperiment
from regraft.tracking.trials import RESULT_FILE

#: Trials with one of these need not be run again.
SETTLED = frozenset({"completed", "stopped", "infeasible"})


class Results(TrackedExperiment):
    """The records of an experiment's trials."""

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


class FinishedTrials:
    """Settled trials by key, as they stood when asked for; records are read when they are wanted."""

    def __init__(self, tracker: Results, runs: dict[str, list[Run]]) -> None:
        self._tracker, self._runs = tracker, runs

    def get(self, key: str) -> TrialResult | None:
        """The newest result of the work, if there is one."""
        for run in self._runs.get(key, ()):
            if (result := self._tracker._settled(run)) is not None:
                return result
        return None


def _is_settled(run: Run) -> bool:
    return run.info.status != "RUNNING" and run.data.tags.get("status") in SETTLED
