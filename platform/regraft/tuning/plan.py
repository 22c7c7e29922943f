"""What a sweep will do, before it does it. Knows no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from regraft.config import Experiment
from regraft.methods import Method
from regraft.models import ResolvedModel, pick_device
from regraft.records import DatasetVersion, TrialResult, content_hash
from regraft.tracking.runs import Tracker
from regraft.training.memory import least_gib
from regraft.training.preflight import (
    Batching,
    matmul_rate,
    mend,
    micro_tokens,
    predict,
    seconds,
)
from regraft.training.spec import TrialSpec


class SweepPlan(NamedTuple):
    """The trials of a sweep, in the order they start, and which of them are already finished."""

    sweep_id: str
    specs: tuple[TrialSpec, ...]
    finished: dict[str, TrialResult]

    @property
    def remaining(self) -> tuple[TrialSpec, ...]:
        """Trials that have to run."""
        return tuple(s for s in self.specs if s.key not in self.finished)


def plan_sweep(
    experiment: Experiment, dataset: DatasetVersion, base: ResolvedModel, tracking_uri: str
) -> SweepPlan:
    """Expand the methods into trials and find those that are finished already.

    The sweep's id is the hash of its trials: starting the same sweep again continues it.
    """
    specs = [
        TrialSpec(
            sweep_id="",
            sweep_run_id="",
            experiment=experiment.name,
            tracking_uri=tracking_uri,
            method=method.model_dump(mode="json"),
            model=experiment.model,
            base_revision=base.revision,
            dataset_id=dataset.id,
            sweep=experiment.sweep,
            evaluate=experiment.evaluate,
        )
        for method in experiment.sweep.expanded()
    ]
    sweep_id = f"sweep-{content_hash(sorted(s.key for s in specs), 10)}"
    tracker = Tracker(tracking_uri, experiment.name)
    finished = {s.key: found for s in specs if (found := tracker.find_trial(s.key)) is not None}
    return SweepPlan(sweep_id, tuple(s.model_copy(update={"sweep_id": sweep_id}) for s in specs), finished)


def by_ray_train(method: Method, experiment: Experiment) -> bool:
    """Whether a trial runs as Ray Train instead of inline in its Tune actor."""
    return method.trains and (
        experiment.sweep.workers_per_trial > 1 or method.name in experiment.sweep.ray_train
    )


class Forecast(NamedTuple):
    """What is expected of one trial, in words."""

    label: str
    runs: str
    memory: str
    time: str
    note: str


def describe(experiment: Experiment, base: Path, train_tokens: int = 0) -> list[Forecast]:
    """What each trial will need.

    Args:
        experiment: With its sweep.
        base: Folder of the base model.
        train_tokens: Of the training set, for the time of an epoch; unknown if 0.
    """
    sweep, dtype, device = experiment.sweep, experiment.model.dtype, pick_device(experiment.model.device)
    threads = max(1, int(sweep.cpus_per_trial))
    rate = matmul_rate(threads, device) if train_tokens else 0.0
    rows = []
    for method in sweep.expanded():
        workers = sweep.workers_per_trial if by_ray_train(method, experiment) else 1
        batching = Batching.of(sweep, experiment.evaluate, sharded=sweep.shard and workers > 1)
        memory = predict(method, base, dtype, device, batching)
        limit, note = sweep.trial_memory_gib, ""
        if limit is not None and memory.gib > limit:
            tokens = micro_tokens(method, base, dtype, device, batching, limit)
            smaller = batching._replace(tokens_per_batch=tokens)
            infeasible = least_gib(method, base, dtype, device, smaller) > limit
            note = f"over the limit of {limit:g} GiB{', infeasible' if infeasible else ''}: "
            note += mend(method, base, dtype, device, batching, limit)
        time = "–"
        if rate and method.trains:
            mine = train_tokens * sweep.epochs / workers
            time = f"{seconds(method, base, batching, mine, rate, device) / 60:.1f} min"
        where = f"Ray Train, {workers} worker(s)" if by_ray_train(method, experiment) else "inline"
        rows.append(Forecast(method.label, where, f"{memory.gib:.1f} GiB ({memory.parts})", time, note))
    return rows
