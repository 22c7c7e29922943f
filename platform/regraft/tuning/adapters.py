"""What Ray Tune asks of a sweep while it runs: proposals, early stops, the budget, and news of each trial."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.search import Searcher

from regraft.config import Experiment
from regraft.records import Cost, LossPoint, TrialResult, TrialStatus
from regraft.search import Outcome, Rule
from regraft.tracking.background import InOrder, patiently
from regraft.tracking.runs import Tracker
from regraft.training.checkpoints import versions_of
from regraft.training.ray_trainer import memory_error, was_lost
from regraft.training.spec import TrialSpec
from regraft.tuning.conductor import Conductor
from regraft.tuning.plan import SweepPlan, by_ray_train
from regraft.watchdog import why_it_hung

#: What was spent is kept with the sweep's run not more often than so many seconds.
_SAVED_EVERY = 10.0
STOPPED_REASON = "stopped early: others did better at the same point"

Say = Callable[[str], None]


class _OfThisProcess:
    """Stays out of the state that Tune keeps on disk: a sweep goes on from its trials in MLflow."""

    def __getstate__(self) -> dict[str, Any]:
        return {}

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfThisProcess:
        return self


class Proposals(_OfThisProcess, Searcher):  # type: ignore[misc]
    """Asks the conductor whenever Tune could start a trial."""

    def __init__(self, conductor: Conductor, experiment: Experiment) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._conductor, self._experiment = conductor, experiment

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        """The next trial's configuration; None while nothing can start."""
        spec = "done" if self._conductor.cancelled else self._conductor.next()
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


class ByRule(_OfThisProcess, tune.schedulers.FIFOScheduler):  # type: ignore[misc]
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


class WithinBudget(_OfThisProcess, tune.Stopper):  # type: ignore[misc]
    """Ends everything that runs when the budget is used up, or the sweep is cancelled."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """No single trial is ended here."""
        return False

    def stop_all(self) -> bool:
        """Whether all of them are."""
        if over := self._conductor.ledger.over:
            self._conductor.close(over)
        return bool(over) or self._conductor.cancelled


class Progress(_OfThisProcess, tune.Callback):  # type: ignore[misc]
    """Driver side: says how far each trial is, closes the runs of those that cannot, tells the conductor.

    It waits for nobody: what goes to MLflow is queued, so that trials go on while the server is away.
    """

    def __init__(self, conductor: Conductor, tracker: Tracker, plan: SweepPlan, say: Say) -> None:
        self._conductor, self._tracker, self._plan, self._say = conductor, tracker, plan, say
        self._open: dict[str, Any] = {}
        self._curves: dict[str, list[LossPoint]] = {}
        self._later = InOrder()
        self._told: dict[str, TrialResult] = {}
        self._losses: Counter[str] = Counter()
        self._saved = -math.inf
        #: The records of the trials that ended here, by key.
        self.records: dict[str, TrialResult] = {}

    @staticmethod
    def _spec(trial: Any) -> TrialSpec:
        return TrialSpec.model_validate(trial.config["arm"]["spec"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Say so."""
        self._open[trial.trial_id] = trial
        spec = self._spec(trial)
        self._conductor.ledger.runs(spec.key)
        self._say(f"started {spec.named}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Say how far it is."""
        if told := result.pop("record", None):  # it need not lie in Tune's state too
            self._told[trial.trial_id] = TrialResult.model_validate_json(told)
        if result.get("status") == "training":
            spec = self._spec(trial)
            point = LossPoint.model_validate(result["curve"])
            self._curves.setdefault(trial.trial_id, []).append(point)
            at = f"{result['point']}/{spec.sweep.evaluations}"
            self._say(f"  {spec.named}: {at}, eval loss {result['eval_loss']:.3f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record what the trial could not, and hand its outcome on."""
        last = trial.last_result or {}
        status = str(last.get("status", "training"))
        if status in {"completed", "infeasible"}:
            self._end(trial, status, str(last.get("reason", "")))  # type: ignore[arg-type]
        elif over := self._conductor.ledger.over:
            self._end(trial, "cancelled", over)
        else:
            self._end(trial, "stopped", STOPPED_REASON)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Have it run again if its process was lost, or with less if memory ran out; or record why not."""
        spec, error = self._spec(trial), _error_of(trial)
        if ran_out := memory_error(error):
            tried = f", in micro-batches of {spec.micro_tokens} tokens too" if spec.micro_tokens else ""
            status, reason = "infeasible", ran_out.problem + tried
            less = spec.with_less(ran_out.smaller)
            how = f"again in micro-batches of {less.micro_tokens} tokens" if less else ""
        else:
            hung = why_it_hung(spec.hang_note) if spec.hang_note else None
            lost = hung or was_lost(error)
            status, reason = "failed", hung or (trial.error_file and _last_line(trial.error_file)) or ""
            reason = reason or "the trial's process died"
            self._losses[spec.key] += bool(lost)
            less = spec if lost and self._losses[spec.key] <= spec.sweep.worker_failures else None
            how = "again, from its last checkpoint"
        if less is not None and self._conductor.again(less):
            self._open.pop(trial.trial_id, None)
            self._curves.pop(trial.trial_id, None)
            self._say(f"lost {spec.named}: {reason}; {how}")
            return
        self._end(trial, status, reason)  # type: ignore[arg-type]

    def close(self, reason: str) -> None:
        """Cancel what is still open, and wait until MLflow knows it all."""
        for trial in list(self._open.values()):
            self._end(trial, "cancelled", reason)
        for spec in self._conductor.lost:
            self._keep(spec, spec.result("cancelled", reason))
        self._save_spent()
        self._later.wait()
        patiently(lambda: self._tracker.close_running(self._plan.sweep_id, self.records))

    def _end(self, trial: Any, status: TrialStatus, reason: str) -> None:
        if self._open.pop(trial.trial_id, None) is None:
            return
        spec, last = self._spec(trial), trial.last_result or {}
        curve = tuple(self._curves.pop(trial.trial_id, ()))
        record = self._told.pop(trial.trial_id, None)
        if record is not None:  # it has closed its run itself
            self.records[spec.key] = record
        else:
            loss = last.get("eval_loss")
            record = spec.result(
                status,
                reason,
                eval_loss=loss if loss is not None and math.isfinite(loss) else None,
                cost=Cost(**last.get("cost", {})),
                curve=curve,
            )
            self._keep(spec, record)
        outcome = Outcome(status, record.figures | last.get("figures", {}), int(last.get("point", 0)))
        took = self._conductor.finished(spec.key, outcome)
        words = f"{status} {spec.named} in {took:.0f} s"
        shown = reason if status != "stopped" else ""
        self._say(f"{words}: {shown}" if shown else words)
        self._say(f"  {self._conductor.outlook}")
        if time.monotonic() - self._saved > _SAVED_EVERY:
            self._save_spent()

    def _save_spent(self) -> None:
        """Keep with the sweep's run what it took so far: it counts when the sweep goes on another day."""
        run_id, spent = self._plan.template.sweep_run_id, self._conductor.ledger.spent
        self._saved = time.monotonic()
        self._later.put(lambda: self._tracker.save_spent(run_id, spent._asdict()))

    def _keep(self, spec: TrialSpec, record: TrialResult) -> None:
        """Record what the trial could not."""
        self.records[spec.key] = record
        self._later.put(lambda: self._close(spec, record))

    def _close(self, spec: TrialSpec, record: TrialResult) -> None:
        run_id = self._tracker.close_trial(
            spec.sweep_id, spec.key, status=record.status, reason=record.reason, result=record
        )
        self.records[spec.key] = record.model_copy(update={"run_id": run_id or ""})
        if record.status != "cancelled" and (kept := versions_of(spec.storage, spec.key)):
            kept.clear()


def _error_of(trial: Any) -> BaseException | None:
    """What Tune kept of a trial's error on this machine."""
    file = trial.pickled_error_file
    if not file or not Path(file).exists():
        return None
    error: BaseException = ray.cloudpickle.loads(Path(file).read_bytes())
    return error


def _last_line(file: str) -> str:
    lines = [line for line in Path(file).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
