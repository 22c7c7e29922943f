"""What a sweep will do, before it does it. Knows no Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from regraft.config import Experiment
from regraft.methods import Method
from regraft.methods.endpoint import Endpoint
from regraft.models import ResolvedModel, pick_device
from regraft.records import DatasetVersion, Speed, content_hash
from regraft.search import Grid
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
from regraft.tuning.budget import Demand


class SweepPlan(NamedTuple):
    """A sweep by its id, and how it makes trials of methods.

    The id is the hash of the space, the search and all that decides a trial's result: starting the same sweep
    again continues it.
    """

    sweep_id: str
    template: TrialSpec
    prices: Callable[[Method], float] = lambda method: 0.0

    def spec(self, method: Method, seed: int | None = None) -> TrialSpec:
        """The trial of a method; with another seed, its repeat."""
        own = method.model_dump(mode="json")
        # A trial carries itself, not the whole space.
        sweep = self.template.sweep.of(method).model_copy(update={"methods": (own,), "search": Grid()})
        update: dict[str, Any] = {"method": own, "sweep": sweep, "price_per_hour": self.prices(method)}
        if seed is not None and seed != sweep.seed:
            update |= {"sweep": sweep.model_copy(update={"seed": seed}), "repeat_of": self.spec(method).key}
        return self.template.model_copy(update=update)

    @property
    def specs(self) -> tuple[TrialSpec, ...]:
        """The trials known beforehand."""
        return tuple(self.spec(method) for method in self.template.sweep.expanded())


def plan_sweep(
    experiment: Experiment,
    dataset: DatasetVersion,
    base: ResolvedModel,
    tracking_uri: str,
    *,
    storage: str = "",
) -> SweepPlan:
    """What a sweep is, before anything runs."""
    sweep = experiment.sweep
    template = TrialSpec(
        sweep_id="",
        sweep_run_id="",
        experiment=experiment.name,
        tracking_uri=tracking_uri,
        method={"name": "zero_shot"},
        model=experiment.model,
        base_revision=base.revision,
        dataset_id=dataset.id,
        sweep=sweep,
        evaluate=experiment.evaluate,
        storage=storage,
        timed=any(
            name in Speed.model_fields
            for aims in ("minimise", "maximise")
            for name in getattr(sweep.search, aims, ())
        ),
    )
    space = sweep.model_dump(mode="json", include={"methods", "search", "samples", "finalists", "devices"})
    sweep_id = f"sweep-{content_hash([template.key, space], 10)}"
    template = template.model_copy(update={"sweep_id": sweep_id})
    return SweepPlan(sweep_id, template, lambda method: demand_of(method, experiment).price)


def by_ray_train(method: Method, experiment: Experiment) -> bool:
    """Whether a trial runs as Ray Train instead of inline in its Tune actor."""
    sweep = experiment.sweep.of(method)
    return method.trains and (sweep.workers_per_trial > 1 or method.name in sweep.ray_train)


def demand_of(method: Method, experiment: Experiment, capacity: Demand | None = None) -> Demand:
    """What a trial holds while it runs; of an elastic one as many workers as there is room for."""
    sweep = experiment.sweep.of(method)
    workers = sweep.workers_per_trial if by_ray_train(method, experiment) else 1
    cpus, gpus = sweep.cpus_per_trial, sweep.gpus_per_trial
    fewest = min(workers, sweep.min_workers or workers)
    if capacity:
        while workers > fewest and (workers * cpus > capacity.cpus or workers * gpus > capacity.gpus):
            workers -= 1
    prices = experiment.cluster.prices
    gpu = prices.get("GPU", max((v for k, v in prices.items() if k != "CPU"), default=0.0))
    return Demand(workers * cpus, workers * gpus, workers * (cpus * prices.get("CPU", 0.0) + gpus * gpu))


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
    dtype, device = experiment.model.dtype, pick_device(experiment.model.device)
    rates: dict[int, float] = {}
    rows = []
    for method in experiment.sweep.expanded():
        if isinstance(method, Endpoint):
            note = f"{method.missing_key} here" if method.missing_key else ""
            rows.append(Forecast(method.label, "at its endpoint", "–", "–", note))
            continue
        sweep = experiment.sweep.of(method)
        threads = max(1, int(sweep.cpus_per_trial))
        if train_tokens and threads not in rates:
            rates[threads] = matmul_rate(threads, device)
        rate = rates.get(threads, 0.0)
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
