"""The sweep on Ray Tune: inline trials in reused actors, Ray Train for those that need it.

The driver must be connected to a Ray cluster whose dashboard is on: without it an early stop of a Ray Train
trial leaks its workers' placement group.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import ray
from ray import tune

from regraft.cluster.sweeps import announced, remove_leftovers
from regraft.config import Experiment
from regraft.errors import RegraftError
from regraft.methods import Method, parse_method
from regraft.models import ResolvedModel, resolve
from regraft.records import DatasetVersion, TrialResult, content_hash
from regraft.tracking.runs import Tracker
from regraft.training.attempt import Attempt
from regraft.training.candidate import BaseCache
from regraft.training.preflight import Batching, seconds
from regraft.training.ray_trainer import survive_memory_kills
from regraft.training.spec import TrialSpec
from regraft.training.trial import run_trial
from regraft.tuning.adapters import ByRule, Progress, Proposals, Say, WithinBudget
from regraft.tuning.budget import Demand, Ledger, Spent
from regraft.tuning.conductor import Conductor
from regraft.tuning.plan import SweepPlan, by_ray_train, plan_sweep

#: Clean bases of this process: a reused trial actor finds here what its last trial gave back.
_BASES = BaseCache()
#: What the cluster has is looked at anew after so many seconds.
_LOOKED_EVERY = 2.0


class NothingCompletedError(RegraftError):
    """Raised when no trial at all came through."""


class NothingToResumeError(RegraftError):
    """Raised when a sweep that was to go on had never begun."""


class Swept(NamedTuple):
    """What a sweep came to: its plan, its run, the results as they were proposed, what was left out.

    `seconds` is the wall-clock of each trial that ran, by key, from when it was handed to Ray Tune.
    """

    plan: SweepPlan
    run_id: str
    results: tuple[TrialResult, ...]
    left_out: tuple[str, ...]
    seconds: dict[str, float]


def run_sweep(
    experiment: Experiment,
    dataset: DatasetVersion,
    *,
    tracking_uri: str,
    storage: str,
    say: Say,
    tags: dict[str, Any] | None = None,
    resume: bool = False,
    work: type[Attempt] | None = None,
) -> Swept:
    """Run all trials of an experiment that are not finished yet.

    Args:
        experiment: What to try.
        dataset: What to train and evaluate on.
        tracking_uri: The MLflow server; every node must reach it.
        storage: Where Ray keeps its state: a folder or URI all nodes can reach.
        say: Called with a line whenever something worth seeing happened.
        tags: More parameters to keep with the sweep's run.
        resume: Insist that the sweep was begun before. It goes on from there in any case.
        work: What inline trials do, where it is not training and scoring.

    Raises:
        NothingCompletedError: If no trial completed; the message gives each one's reason.
        NothingToResumeError: If `resume` is asked for a sweep that never began.
        ServiceError: If a trial asks for more than the cluster has for this sweep, or the same sweep runs
            already.
    """
    base = resolve(experiment.model.source, experiment.model.revision, say)
    plan = plan_sweep(experiment, dataset, base, tracking_uri, storage=storage)
    where = content_hash([tracking_uri, experiment.name], 6)
    with announced(f"{plan.sweep_id}-{where}", say) as sweeps:
        remove_leftovers(say)
        return _run(experiment, dataset, base, plan, sweeps, say, tags or {}, resume, work)


def _run(
    experiment: Experiment,
    dataset: DatasetVersion,
    base: ResolvedModel,
    plan: SweepPlan,
    sweeps: Callable[[], int],
    say: Say,
    tags: dict[str, Any],
    resume: bool,
    work: type[Attempt] | None,
) -> Swept:
    tracking_uri = plan.template.tracking_uri
    tracker = Tracker(tracking_uri, experiment.name)
    params = {"base_model": base.source, "base_revision": base.revision, "dataset_id": dataset.id}
    params |= {"search": experiment.sweep.search.name} | tags
    begun = tracker.spent_before(plan.sweep_id)
    if resume and begun is None:
        raise NothingToResumeError(
            f"{plan.sweep_id} was never begun on {tracking_uri}",
            "a sweep is told by its methods, search, data and settings: undo what was changed since, or "
            "start it without --resume; finished trials that fit are found either way",
        )
    spent, known = begun or ({}, frozenset())
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
        Ledger(sweep.budget, before=Spent(**spent), known=known),
        _Room(experiment, sweeps),
        lambda method: _effort(method, experiment, base.path),
        say,
    )
    if sweep.search.learns:
        _learn(conductor, plan, tracker, say)
    try:
        with _gently_ended(conductor):
            records = _tune(experiment, dataset, conductor, plan, tracker, say, work)
    except BaseException as error:
        tracker.end_sweep(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    if conductor.cancelled:
        tracker.end_sweep(run_id, "KILLED")
        raise KeyboardInterrupt
    say(f"the sweep took {conductor.ledger.spent}")
    found = conductor.found | records
    found |= tracker.results_in(plan.sweep_id, conductor.specs.keys() - found.keys())
    results = tuple(found[key] for key in conductor.specs if key in found)
    if not any(r.status == "completed" for r in results):
        tracker.end_sweep(run_id, "FAILED")
        reasons = "\n".join(f"  {r.label}: {r.status}: {r.reason}" for r in results) or "  none left a record"
        raise NothingCompletedError(
            f"no trial completed:\n{reasons}", "see the runs in MLflow; mend the cause and start again"
        )
    return Swept(plan, run_id, results, tuple(conductor.left_out), conductor.ledger.took)


def _tune(
    experiment: Experiment,
    dataset: DatasetVersion,
    conductor: Conductor,
    plan: SweepPlan,
    tracker: Tracker,
    say: Say,
    work: type[Attempt] | None,
) -> dict[str, TrialResult]:
    """Run trials until the conductor has no more; gives the records of those that ran."""
    survive_memory_kills()
    rule = experiment.sweep.stopping.rule() if experiment.sweep.stopping else None
    brackets = experiment.sweep.stopping.brackets if experiment.sweep.stopping else "sweep"
    progress = Progress(conductor, tracker, plan, say)
    trainable = tune.with_resources(
        tune.with_parameters(_trial, dataset_ref=[ray.put(dataset)], work=work),
        _resources,
    )
    storage = plan.template.storage
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            metric="eval_loss",
            mode="min",
            search_alg=Proposals(conductor, experiment),
            num_samples=-1,
            scheduler=ByRule(rule, brackets) if rule else None,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name=f"{plan.sweep_id}-{ray.get_runtime_context().get_job_id()}",
            storage_path=storage,
            verbose=0,
            callbacks=[progress],
            stop=WithinBudget(conductor),
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )
    try:
        tuner.fit()
    finally:
        progress.close(conductor.ledger.over or "the sweep was cancelled")
    return progress.records


@contextmanager
def _gently_ended(conductor: Conductor) -> Iterator[None]:
    """Let Ctrl-C, and SIGTERM, which ends a Ray job, end the trials before the driver; a second one at once.

    Were the driver to die first, Ray would end the actors in no order: a Ray Train controller that outlives
    its workers asks for new ones, and their placement group stays for ever (Ray 2.60).
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        if conductor.cancelled:
            raise KeyboardInterrupt
        conductor.cancelled = True

    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # its own would go on as if the sweep had come to its end
    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _learn(conductor: Conductor, plan: SweepPlan, tracker: Tracker, say: Say) -> None:
    """Tell a search that learns what is known: of this sweep, cut short, and of others with the same work."""
    known = 0
    for result in tracker.results_on(plan.template.dataset_id):
        method = parse_method(result.method)
        # Only what would come out the same here: same data, base, lengths of training and settings.
        spec = plan.spec(method)
        if spec.key == result.key:
            conductor.recall(spec, result)
            known += 1
    if known:
        say(f"the search begins with what {known} earlier trials came to")


class _Room:
    """What the cluster has, less what the sweep is told to leave, and how many sweeps share it.

    Ray Train workers take their resources outside Tune's books, so it is the conductor's count, and not
    Tune's, that keeps inline trials from starving them.
    """

    def __init__(self, experiment: Experiment, sweeps: Callable[[], int]) -> None:
        self._leave, self._sweeps = experiment.sweep.leave, sweeps
        self._grows = experiment.cluster.autoscales
        self._at, self._found = -math.inf, (Demand(0.0, 0.0), 1)

    def __call__(self) -> tuple[Demand, int]:
        if self._grows:
            return Demand(math.inf, math.inf), 1
        if time.monotonic() - self._at > _LOOKED_EVERY:
            have = ray.cluster_resources()
            room = Demand(have.get("CPU", 0.0) - self._leave.cpus, have.get("GPU", 0.0) - self._leave.gpus)
            self._at, self._found = time.monotonic(), (room, self._sweeps())
        return self._found


def _effort(method: Method, experiment: Experiment, base: Path) -> float:
    """How long a method trains beside others, in any unit; nothing for a control.

    Looking closely takes a skeleton of the model with the method applied, so only a budget is worth it.
    """
    budget = experiment.sweep.budget
    if not method.trains or (budget.hours, budget.gpu_hours, budget.money) == (None, None, None):
        return float(method.trains)
    sweep = experiment.sweep.of(method)
    workers = sweep.workers_per_trial if by_ray_train(method, experiment) else 1
    return seconds(method, base, Batching.of(sweep, experiment.evaluate), 1e6 / workers, rate=1e12)


def _resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
    arm = config["arm"]
    if arm["train"]:
        # A driver: its workers take the cores. Any fraction of a core here would be missing there.
        return tune.PlacementGroupFactory([{"node:__internal_head__": 0.001}])
    spec = TrialSpec.model_validate(arm["spec"])
    bundle = {"CPU": spec.sweep.cpus_per_trial}
    if spec.sweep.gpus_per_trial:
        bundle["GPU"] = spec.sweep.gpus_per_trial
    return tune.PlacementGroupFactory([bundle])


def _trial(config: dict[str, Any], dataset_ref: list[Any], work: type[Attempt] | None) -> None:
    """What runs in the trial actor."""
    arm = config["arm"]
    spec = TrialSpec.model_validate(arm["spec"])
    if arm["train"]:
        from regraft.training.ray_trainer import run_with_ray_train

        name = f"{spec.sweep_id}-{tune.get_context().get_trial_id()}"
        run_with_ray_train(spec, dataset_ref, name=name, storage=spec.storage)
        return
    if work is None and not spec.parsed.remote:
        import torch

        torch.set_num_threads(max(1, int(spec.sweep.cpus_per_trial)))
    dataset = ray.get(dataset_ref[0])
    run_trial(spec, dataset, report=lambda m: tune.report(m), bases=_BASES, work=work)
