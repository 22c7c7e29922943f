"""The sweep on Ray Tune: inline trials in reused actors, Ray Train for those that need it.

The driver must be connected to a Ray cluster whose dashboard is on: without it an early stop of a Ray Train
trial leaks its workers' placement group.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ray
from ray import tune

from regraft.config import Experiment
from regraft.errors import InfeasibleTrialError, RegraftError, ServiceError
from regraft.models import resolve
from regraft.records import Cost, DatasetVersion, TrialResult
from regraft.tracking.runs import Tracker
from regraft.training.candidate import BaseCache
from regraft.training.spec import TrialSpec
from regraft.training.trial import STOPPED_REASON, run_trial
from regraft.tuning.plan import SweepPlan, by_ray_train, plan_sweep

#: Clean bases of this process: a reused trial actor finds here what its last trial gave back.
_BASES = BaseCache()

Say = Callable[[str], None]


class NothingCompletedError(RegraftError):
    """Raised when no trial at all came through."""


def run_sweep(
    experiment: Experiment,
    dataset: DatasetVersion,
    *,
    tracking_uri: str,
    storage: str,
    say: Say,
    tags: dict[str, Any] | None = None,
) -> tuple[SweepPlan, str, tuple[TrialResult, ...]]:
    """Run all trials of an experiment that are not finished yet.

    Args:
        experiment: What to try.
        dataset: What to train and evaluate on.
        tracking_uri: The MLflow server; every node must reach it.
        storage: Where Ray keeps its state: a folder or URI all nodes can reach.
        say: Called with a line whenever something worth seeing happened.
        tags: More parameters to keep with the sweep's run.

    Returns:
        The plan, the run id of the sweep, and the trials' results in the order of the plan.

    Raises:
        RegraftError: If no trial completed; the message gives each one's reason.
    """
    base = resolve(experiment.model.source, experiment.model.revision, say)
    plan = plan_sweep(experiment, dataset, base, tracking_uri)
    tracker = Tracker(tracking_uri, experiment.name)
    run_id = tracker.start_sweep(
        plan.sweep_id,
        params={
            "trials": len(plan.specs),
            "base_model": base.source,
            "base_revision": base.revision,
            "dataset_id": dataset.id,
            **(tags or {}),
        },
        dataset=dataset,
    )
    for result in plan.finished.values():
        say(f"found {result.label}: {result.status}, not run again")
    remaining = [s.model_copy(update={"sweep_run_id": run_id, "storage": storage}) for s in plan.remaining]
    killed: dict[str, TrialResult] = {}
    if remaining:
        say(f"running {len(remaining)} trials of {len(plan.specs)}")
        killed = _tune(experiment, dataset, remaining, storage, tracker, say)
    results = tuple(
        r
        for s in plan.specs
        if (r := plan.finished.get(s.key) or tracker.find_trial(s.key) or killed.get(s.key))
    )
    if not any(r.status == "completed" for r in results):
        reasons = "\n".join(f"  {r.label}: {r.status}: {r.reason}" for r in results) or "  none left a record"
        raise NothingCompletedError(
            f"no trial completed:\n{reasons}", "see the runs in MLflow; mend the cause and start again"
        )
    return plan, run_id, results


def _tune(
    experiment: Experiment,
    dataset: DatasetVersion,
    specs: list[TrialSpec],
    storage: str,
    tracker: Tracker,
    say: Say,
) -> dict[str, TrialResult]:
    """Run trials; gives the records of those that could not write their own."""
    sweep = experiment.sweep
    progress = _Progress(tracker, specs, say)
    concurrent = _concurrency(experiment)
    scheduler = None
    if sweep.asha is not None:
        scheduler = _PatientASHA(
            sweep.asha.peers,
            time_attr="point",
            max_t=specs[0].points + 1,  # reaching it would end a trial before its last report is written
            grace_period=sweep.asha.grace,
            reduction_factor=sweep.asha.reduction,
        )
    arms = [
        {"spec": s.model_dump(mode="json"), "train": by_ray_train(s.parsed, experiment), "storage": storage}
        for s in _in_order(specs, experiment)
    ]
    trainable = tune.with_resources(
        tune.with_parameters(_trial, dataset_ref=[ray.put(dataset)]),
        lambda config: _resources(config, experiment),
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"arm": tune.grid_search(arms)},
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            scheduler=scheduler,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"{specs[0].sweep_id}-{ray.get_runtime_context().get_job_id()}",
            storage_path=storage,
            verbose=0,
            callbacks=[progress],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    tuner.fit()
    return progress.records


def _in_order(specs: list[TrialSpec], experiment: Experiment) -> list[TrialSpec]:
    """Ray Train trials first: they take longest to start, and the others fill in beside them."""
    return sorted(specs, key=lambda s: not by_ray_train(s.parsed, experiment))


def _concurrency(experiment: Experiment) -> int:
    """How many trials the cluster can hold at once.

    Ray Train workers take their resources outside Tune's books, so this bound, and not Tune's accounting, is
    what keeps inline trials from starving them.
    """
    sweep, have = experiment.sweep, ray.cluster_resources()
    widest = max(1, sweep.workers_per_trial)
    fits = have.get("CPU", 0) / (sweep.cpus_per_trial * widest)
    if sweep.gpus_per_trial:
        fits = min(fits, have.get("GPU", 0) / (sweep.gpus_per_trial * widest))
    fewest = sweep.min_workers or widest
    if fits * widest < fewest:
        raise ServiceError(
            f"the cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; a trial takes "
            f"{sweep.cpus_per_trial * fewest:g} CPUs and {sweep.gpus_per_trial * fewest:g} GPUs",
            "lower sweep.cpus_per_trial, sweep.gpus_per_trial or sweep.workers_per_trial, or add nodes",
        )
    bound: int = max(1, math.floor(fits))
    return min(bound, sweep.max_concurrent or bound)


def _resources(config: dict[str, Any], experiment: Experiment) -> tune.PlacementGroupFactory:
    if config["arm"]["train"]:
        # A driver: its workers take the cores. Any fraction of a core here would be missing there.
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    bundle = {"CPU": experiment.sweep.cpus_per_trial}
    if experiment.sweep.gpus_per_trial:
        bundle["GPU"] = experiment.sweep.gpus_per_trial
    return tune.PlacementGroupFactory([bundle])


def _trial(config: dict[str, Any], dataset_ref: list[Any]) -> None:
    """What runs in the trial actor."""
    arm = config["arm"]
    spec = TrialSpec.model_validate(arm["spec"])
    if arm["train"]:
        from regraft.training.ray_trainer import run_with_ray_train

        try:
            name = f"{spec.sweep_id}-{tune.get_context().get_trial_id()}"
            run_with_ray_train(spec, dataset_ref, name=name, storage=arm["storage"])
        except InfeasibleTrialError as error:
            tune.report(
                {"eval_loss": math.inf, "point": spec.points, "status": "infeasible", "reason": error.problem}
            )
        return
    import torch

    torch.set_num_threads(max(1, int(spec.sweep.cpus_per_trial)))
    run_trial(spec, ray.get(dataset_ref[0]), report=lambda m: tune.report(m), bases=_BASES)


class _PatientASHA(tune.schedulers.ASHAScheduler):  # type: ignore[misc]
    """ASHA that stops nobody at a point before enough trials have reached it.

    Plain ASHA holds the second trial that reaches a rung against the first alone: with few trials it would
    stop whatever is not the best so far.
    """

    def __init__(self, peers: int, **settings: Any) -> None:
        super().__init__(**settings)
        self._peers = peers
        self._reached: dict[int, set[str]] = {}

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        reached = self._reached.setdefault(int(result["point"]), set())
        reached.add(trial.trial_id)
        return self.CONTINUE if decision == self.STOP and len(reached) < self._peers else decision


class _Progress(tune.Callback):  # type: ignore[misc]
    """Driver side: says how far each trial is, and records one that was killed before it could do so."""

    def __init__(self, tracker: Tracker, specs: list[TrialSpec], say: Say) -> None:
        self._tracker, self._say = tracker, say
        self._total, self._done = len(specs), 0
        self._started: dict[str, float] = {}
        self.records: dict[str, TrialResult] = {}

    @staticmethod
    def _spec(trial: Any) -> TrialSpec:
        return TrialSpec.model_validate(trial.config["arm"]["spec"])

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._started[trial.trial_id] = time.monotonic()
        self._say(f"started {self._spec(trial).parsed.label}")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        spec = self._spec(trial)
        if result.get("status") == "training":
            self._say(
                f"  {spec.parsed.label}: {result['point']}/{spec.sweep.evaluations}, "
                f"eval loss {result['eval_loss']:.3f}"
            )

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        last = trial.last_result or {}
        status = str(last.get("status", "training"))
        if status == "training":
            status = "stopped"
            self._record(trial, "stopped", STOPPED_REASON)
        elif status == "infeasible":  # for want of workers, no trial may ever have run
            self._record(trial, "infeasible", str(last.get("reason", "")))
        self._end(trial, status, str(last.get("reason", "")))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = (trial.error_file and _last_line(trial.error_file)) or "the trial's process died"
        self._record(trial, "failed", reason)
        self._end(trial, "failed", reason)

    def _end(self, trial: Any, status: str, reason: str) -> None:
        self._done += 1
        took = time.monotonic() - self._started.get(trial.trial_id, time.monotonic())
        words = f"{status} {self._spec(trial).parsed.label} in {took:.0f} s ({self._done}/{self._total})"
        self._say(f"{words}: {reason}" if reason else words)

    def _record(self, trial: Any, status: Literal["stopped", "failed", "infeasible"], reason: str) -> None:
        """Close the run of a trial whose process is gone; an inline trial has done so itself."""
        spec, last = self._spec(trial), trial.last_result or {}
        record = spec.result(
            status,
            reason,
            eval_loss=last.get("eval_loss"),
            cost=Cost(train_seconds=float(last.get("time_total_s", 0.0))),
        )
        run_id = self._tracker.close_trial(
            spec.sweep_id, spec.key, status=status, reason=reason, result=record
        )
        self.records[spec.key] = record.model_copy(update={"run_id": run_id or ""})


def _last_line(file: str) -> str:
    lines = [line for line in Path(file).read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
