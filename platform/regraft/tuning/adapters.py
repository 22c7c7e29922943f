"""What Ray Tune asks of a sweep while it runs: proposals, early stops, the budget, and news of each trial."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search import Searcher

from regraft.config import Experiment
from regraft.records import Cost, TrialResult, TrialStatus
from regraft.search import Rule
from regraft.tracking.runs import Tracker
from regraft.training.checkpoints import versions_of
from regraft.training.spec import TrialSpec
from regraft.tuning.conductor import Conductor
from regraft.tuning.plan import by_ray_train

STOPPED_REASON = "stopped early: others did better at the same point"

Say = Callable[[str], None]


class Proposals(Searcher):  # type: ignore[misc]
    """Asks the conductor whenever Tune could start a trial."""

    def __init__(self, conductor: Conductor, experiment: Experiment) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._conductor, self._experiment = conductor, experiment

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration; None while nothing can start."""
        spec = self._conductor.next()
        if spec == "done":
            finished: str = Searcher.FINISHED
            return finished
        if spec == "wait":
            return None
        assert isinstance(spec, TrialSpec)
        train = by_ray_train(spec.parsed, self._experiment)
        return {"arm": {"spec": spec.model_dump(mode="json"), "train": train}}

    def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
        """The callback below tells the conductor: it knows how the trial ended."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from MLflow, not from Tune's state."""
        Path(checkpoint_path).write_text("a sweep goes on from its trials in MLflow\n")

    def restore(self, checkpoint_path: str) -> None:
        """Not offered: nothing is saved."""
        raise NotImplementedError("start the sweep again: it finds its finished trials in MLflow")


class ByRule(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """Ends trials by one of our rules."""

    def __init__(self, rule: Rule, brackets: str) -> None:
        super().__init__()
        self._rule, self._brackets = rule, brackets

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        if result.get("status") != "training":
            return str(self.CONTINUE)
        bracket = trial.config["arm"]["spec"]["method"]["name"] if self._brackets == "method" else ""
        ends = self._rule.stops(bracket, trial.trial_id, result["point"], result["eval_loss"])
        return str(self.STOP if ends else self.CONTINUE)


class WithinBudget(tune.Stopper):  # type: ignore[misc]
    """Ends everything that runs when the budget is used up."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is ended here."""
        return False

    def stop_all(self) -> bool:
        """Whether all of them are."""
        if over := self._conductor.ledger.over:
            self._conductor.close(over)
        return bool(self._conductor.ledger.over)


class Progress(tune.Callback):  # type: ignore[misc]
    """Driver side: says how far each trial is, closes the runs of those that cannot, tells the conductor."""

    def __init__(self, conductor: Conductor, tracker: Tracker, say: Say) -> None:
        self._conductor, self._tracker, self._say = conductor, tracker, say
        self._open: dict[str, Any] = {}

    @staticmethod
    def _spec(trial: Any) -> TrialSpec:
        return TrialSpec.model_validate(trial.config["arm"]["spec"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say so."""
        self._open[trial.trial_id] = trial
        self._say(f"started {self._spec(trial).named}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say how far it is."""
        spec = self._spec(trial)
        if result.get("status") == "training":
            at = f"{result['point']}/{spec.sweep.evaluations}"
            self._say(f"  {spec.named}: {at}, eval loss {result['eval_loss']:.3f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record what the trial could not, and hand its result on."""
        last = trial.last_result or {}
        status, reason = str(last.get("status", "training")), str(last.get("reason", ""))
        if status == "completed":
            self._end(trial, self._tracker.find_trial(self._spec(trial).key), status, reason)
        elif status == "infeasible":  # for want of workers, no trial may ever have run
            self._end(trial, self._record(trial, "infeasible", reason), status, reason)
        elif over := self._conductor.ledger.over:
            self._end(trial, self._record(trial, "cancelled", over), "cancelled", over)
        else:
            self._end(trial, self._record(trial, "stopped", STOPPED_REASON), "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that it failed, with the last line of its traceback."""
        reason = (trial.error_file and _last_line(trial.error_file)) or "the trial's process died"
        self._end(trial, self._record(trial, "failed", reason), "failed", reason)

    def cancel(self, reason: str) -> None:
        """Close what is still open."""
        for trial in list(self._open.values()):
            self._end(trial, self._record(trial, "cancelled", reason), "cancelled", reason)

    def _end(self, trial: Any, result: TrialResult | None, status: str, reason: str) -> None:
        if self._open.pop(trial.trial_id, None) is None:
            return
        spec, last = self._spec(trial), trial.last_result or {}
        found = result or self._record(trial, "failed", "it left no record")
        took = self._conductor.finished(spec.key, found, point=int(last.get("point", 0)))
        words = f"{status} {spec.named} in {took:.0f} s"
        self._say(f"{words}: {reason}" if reason else words)
        self._say(f"  {self._conductor.outlook}")

    def _record(self, trial: Any, status: TrialStatus, reason: str) -> TrialResult:
        """Close the run of a trial that cannot do so itself, with what its reports said."""
        spec, last = self._spec(trial), trial.last_result or {}
        loss = last.get("eval_loss")
        record = spec.result(
            status,
            reason,
            eval_loss=loss if loss is not None and math.isfinite(loss) else None,
            cost=Cost(**last.get("cost", {})),
        )
        if status != "cancelled" and (kept := versions_of(spec.storage, spec.key)):
            kept.clear()
        run_id = self._tracker.close_trial(
            spec.sweep_id, spec.key, status=status, reason=reason, result=record
        )
        return record.model_copy(update={"run_id": run_id or ""})


def _last_line(file: str) -> str:
    lines = [line for line in Path(file).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
