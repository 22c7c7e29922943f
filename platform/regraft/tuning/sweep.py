"""The sweep on Ray Tune: inline trials in reused actors, Ray Train for those that need it.

The driver must be connected to a Ray cluster whose dashboard is on: without it an early stop of a Ray Train
trial leaks its workers' placement group.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
from ray import tune
from ray.tune.search import Searcher

from regraft.config import Experiment
from regraft.errors import InfeasibleTrialError, RegraftError
from regraft.methods import Method, parse_method
from regraft.models import resolve
from regraft.records import Cost, DatasetVersion, TrialResult, TrialStatus
from regraft.search import Rule
from regraft.tracking.runs import Tracker
from regraft.training.candidate import BaseCache
from regraft.training.checkpoints import versions_of
from regraft.training.preflight import Batching, seconds
from regraft.training.spec import TrialSpec
from regraft.training.trial import run_trial
from regraft.tuning.budget import Demand, Ledger
from regraft.tuning.conductor import Conductor
from regraft.tuning.plan import SweepPlan, by_ray_train, plan_sweep

#: Clean bases of this process: a reused trial actor finds here what its last trial gave back.
_BASES = BaseCache()

STOPPED_REASON = "stopped early: others did better at the same point"

Say = Callable[[str], None]


class NothingCompletedError(RegraftError):
    """Raised when no trial at all came through."""


class Swept(NamedTuple):
    """What a sweep came to: its plan, its run, the results as they were proposed, what was left out."""

    plan: SweepPlan
    run_id: str
    results: tuple[TrialResult, ...]
    left_out: tuple[str, ...]


def run_sweep(
    experiment: Experiment,
    dataset: DatasetVersion,
    *,
    tracking_uri: str,
    storage: str,
    say: Say,
    tags: dict[str, Any] | None = None,
) -> Swept:
    """Run all trials of an experiment that are not finished yet.

    Args:
        experiment: What to try.
        dataset: What to train and evaluate on.
        tracking_uri: The MLflow server; every node must reach it.
        storage: Where Ray keeps its state: a folder or URI all nodes can reach.
        say: Called with a line whenever something worth seeing happened.
        tags: More parameters to keep with the sweep's run.

    Raises:
        NothingCompletedError: If no trial completed; the message gives each one's reason.
        ServiceError: If a trial asks for more than the cluster has for this sweep.
    """
    base = resolve(experiment.model.source, experiment.model.revision, say)
    plan = plan_sweep(experiment, dataset, base, tracking_uri, storage=storage)
    tracker = Tracker(tracking_uri, experiment.name)
    params = {"base_model": base.source, "base_revision": base.revision, "dataset_id": dataset.id}
    params |= {"search": experiment.sweep.search.name} | (tags or {})
    run_id = tracker.start_sweep(plan.sweep_id, params=params, dataset=dataset)
    template = plan.template.model_copy(update={"sweep_run_id": run_id})
    plan = plan._replace(template=template)
    sweep = experiment.sweep
    proposer = sweep.search.proposer(sweep.arms, samples=sweep.samples, seed=sweep.seed)
    conductor = Conductor(
        experiment,
        proposer,
        plan.spec,
        tracker.finished_trials().get,
        Ledger(sweep.budget),
        _capacity(experiment),
        lambda method: _effort(method, experiment, base.path),
        say,
    )
    if sweep.search.learns:
        _learn(conductor, plan, tracker, say)
    _tune(experiment, dataset, conductor, plan, tracker, say)
    say(f"the sweep took {conductor.ledger.spent}")
    results = tuple(r for key in conductor.specs if (r := conductor.results.get(key)) is not None)
    if not any(r.status == "completed" for r in results):
        reasons = "\n".join(f"  {r.label}: {r.status}: {r.reason}" for r in results) or "  none left a record"
        raise NothingCompletedError(
            f"no trial completed:\n{reasons}", "see the runs in MLflow; mend the cause and start again"
        )
    return Swept(plan, run_id, results, tuple(conductor.left_out))


def _tune(
    experiment: Experiment,
    dataset: DatasetVersion,
    conductor: Conductor,
    plan: SweepPlan,
    tracker: Tracker,
    say: Say,
) -> None:
    """Run trials until the conductor has no more."""
    rule = experiment.sweep.stopping.rule() if experiment.sweep.stopping else None
    brackets = experiment.sweep.stopping.brackets if experiment.sweep.stopping else "sweep"
    progress = _Progress(conductor, tracker, say)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, dataset_ref=[ray.put(dataset)]),
        lambda config: _resources(config, experiment),
    )
    storage = plan.template.storage
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            search_alg=_Proposals(conductor, experiment),
            num_samples=-1,
            scheduler=_ByRule(rule, brackets) if rule else None,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"{plan.sweep_id}-{ray.get_runtime_context().get_job_id()}",
            storage_path=storage,
            verbose=0,
            callbacks=[progress],
            stop=_WithinBudget(conductor),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    try:
        tuner.fit()
    finally:
        progress.cancel("the sweep was cancelled")


def _learn(conductor: Conductor, plan: SweepPlan, tracker: Tracker, say: Say) -> None:
    """Tell a search that learns what is known: of this sweep, cut short, and of others with the same work."""
    known = 0
    for result in tracker.results_on(plan.template.dataset_id):
        method = parse_method(result.method)
        # Only what would come out the same here: same data, base, lengths of training and settings.
        if plan.spec(method).key == result.key:
            conductor.recall(plan.spec(method), result)
            known += 1
    if known:
        say(f"the search begins with what {known} earlier trials came to")


def _capacity(experiment: Experiment) -> Demand:
    """What the cluster has, less what the sweep is told to leave.

    Ray Train workers take their resources outside Tune's books, so it is the conductor's count, and not
    Tune's, that keeps inline trials from starving them.
    """
    have, leave = ray.cluster_resources(), experiment.sweep.leave
    return Demand(have.get("CPU", 0.0) - leave.cpus, have.get("GPU", 0.0) - leave.gpus)


def _effort(method: Method, experiment: Experiment, base: Path) -> float:
    """How long a method trains beside others, in any unit; nothing for a control."""
    if not method.trains:
        return 0.0
    sweep = experiment.sweep.of(method)
    workers = sweep.workers_per_trial if by_ray_train(method, experiment) else 1
    return seconds(method, base, Batching.of(sweep, experiment.evaluate), 1e6 / workers, rate=1e12)


class _Proposals(Searcher):  # type: ignore[misc]
    """Asks the conductor whenever Tune could start a trial."""

    def __init__(self, conductor: Conductor, experiment: Experiment) -> None:
        super().__init__(metric="eval_loss", mode="min")
        self._conductor, self._experiment = conductor, experiment

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
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
        raise NotImplementedError("start the sweep again: it finds its finished trials in MLflow")


class _ByRule(tune.schedulers.FIFOScheduler):  # type: ignore[misc]
    """Ends trials by one of our rules."""

    def __init__(self, rule: Rule, brackets: str) -> None:
        super().__init__()
        self._rule, self._brackets = rule, brackets

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("status") != "training":
            return str(self.CONTINUE)
        bracket = trial.config["arm"]["spec"]["method"]["name"] if self._brackets == "method" else ""
        ends = self._rule.stops(bracket, trial.trial_id, result["point"], result["eval_loss"])
        return str(self.STOP if ends else self.CONTINUE)


class _WithinBudget(tune.Stopper):  # type: ignore[misc]
    """Ends everything that runs when the budget is used up."""

    def __init__(self, conductor: Conductor) -> None:
        self._conductor = conductor

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if over := self._conductor.ledger.over:
            self._conductor.close(over)
        return bool(self._conductor.ledger.over)


def _resources(config: dict[str, Any], experiment: Experiment) -> tune.PlacementGroupFactory:
    arm = config["arm"]
    if arm["train"]:
        # A driver: its workers take the cores. Any fraction of a core here would be missing there.
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    spec = TrialSpec.model_validate(arm["spec"])
    bundle = {"CPU": spec.sweep.cpus_per_trial}
    if spec.sweep.gpus_per_trial:
        bundle["GPU"] = spec.sweep.gpus_per_trial
    return tune.PlacementGroupFactory([bundle])


def _trial(config: dict[str, Any], dataset_ref: list[Any]) -> None:
    """What runs in the trial actor."""
    arm = config["arm"]
    spec = TrialSpec.model_validate(arm["spec"])
    if arm["train"]:
        from regraft.training.ray_trainer import run_with_ray_train

        try:
            name = f"{spec.sweep_id}-{tune.get_context().get_trial_id()}"
            run_with_ray_train(spec, dataset_ref, name=name, storage=spec.storage)
        except InfeasibleTrialError as error:
            tune.report(
                {"eval_loss": math.inf, "point": spec.points, "status": "infeasible", "reason": error.problem}
            )
        return
    import torch

    torch.set_num_threads(max(1, int(spec.sweep.cpus_per_trial)))
    run_trial(spec, ray.get(dataset_ref[0]), report=lambda m: tune.report(m), bases=_BASES)


class _Progress(tune.Callback):  # type: ignore[misc]
    """Driver side: says how far each trial is, closes the runs of those that cannot, tells the conductor."""

    def __init__(self, conductor: Conductor, tracker: Tracker, say: Say) -> None:
        self._conductor, self._tracker, self._say = conductor, tracker, say
        self._open: dict[str, Any] = {}

    @staticmethod
    def _spec(trial: Any) -> TrialSpec:
        return TrialSpec.model_validate(trial.config["arm"]["spec"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._open[trial.trial_id] = trial
        self._say(f"started {self._spec(trial).named}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        spec = self._spec(trial)
        if result.get("status") == "training":
            at = f"{result['point']}/{spec.sweep.evaluations}"
            self._say(f"  {spec.named}: {at}, eval loss {result['eval_loss']:.3f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
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
