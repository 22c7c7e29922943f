"""What a sweep will do, before it does it. Knows no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from regraft.config import Experiment
from regraft.methods import Method
from regraft.models import ResolvedModel
from regraft.records import DatasetVersion, TrialResult, content_hash
from regraft.tracking.runs import Tracker
from regraft.training.memory import least_gib
from regraft.training.trial import TrialSpec


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


def describe(experiment: Experiment, base: Path) -> list[tuple[str, str, str]]:
    """For each trial: its label, where it runs, and what memory it needs at least."""
    rows = []
    for method in experiment.sweep.expanded():
        sweep = experiment.sweep
        shards = sweep.workers_per_trial if sweep.shard and by_ray_train(method, experiment) else 1
        need = least_gib(method, base, experiment.model.dtype, shards)
        limit = experiment.sweep.trial_memory_gib
        where = (
            f"Ray Train, {experiment.sweep.workers_per_trial} worker(s)"
            if by_ray_train(method, experiment)
            else "inline"
        )
        fits = "" if limit is None or need <= limit else f", over the limit of {limit:g}: infeasible"
        rows.append((method.label, where, f"≥ {need:.1f} GiB{fits}"))
    return rows
