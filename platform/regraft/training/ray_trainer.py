"""A trial of several workers (or one that asks for it) as a Ray Train run inside the Tune trial."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from regraft.errors import InfeasibleTrialError
from regraft.records import DatasetVersion
from regraft.training.candidate import BaseCache
from regraft.training.distributed import Workers, data_parallel
from regraft.training.spec import TrialSpec
from regraft.training.trial import run_trial


def run_with_ray_train(spec: TrialSpec, dataset_ref: Any, *, name: str, storage: str) -> None:
    """Run one trial on Ray Train workers; its reports reach Tune through Train's callback.

    Args:
        spec: What to do.
        dataset_ref: An object reference to the `DatasetVersion`, in a list so that Ray does not resolve it.
        name: Name of the Train run, stable over retries.
        storage: Folder or URI all nodes can reach.

    Raises:
        InfeasibleTrialError: If the cluster cannot give the workers, or they ran out of memory.
    """
    import ray.train
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = make_trainer(spec, dataset_ref, name=name, storage=storage, callbacks=[TuneReportCallback()])
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        signs = ("OutOfMemory", "OOM", "out of memory")
        if any(sign in repr(f) for f in failures.values() for sign in signs):
            raise InfeasibleTrialError(f"out of memory in a Ray Train worker: {error}") from error
        raise


def make_trainer(
    spec: TrialSpec,
    dataset_ref: Any,
    *,
    name: str,
    storage: str,
    callbacks: Sequence[Any] = (),
    work: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """The Ray Train run of a trial; `work` is what a worker does, `train_worker` if not given.

    A lost worker ends its group. A new group, of as many workers as there is room for, goes on from the
    trial's checkpoint.
    """
    import ray.train
    from ray.train.torch import TorchTrainer

    sweep = spec.sweep
    resources = {"CPU": sweep.cpus_per_trial}
    if sweep.gpus_per_trial:
        resources["GPU"] = sweep.gpus_per_trial
    fewest = sweep.min_workers or sweep.workers_per_trial
    return TorchTrainer(
        work or train_worker,
        train_loop_config={"spec": spec.model_dump(mode="json"), "dataset": dataset_ref},
        scaling_config=ray.train.ScalingConfig(
            # A pair makes it elastic.
            num_workers=(fewest, sweep.workers_per_trial)
            if fewest < sweep.workers_per_trial
            else sweep.workers_per_trial,
            use_gpu=bool(sweep.gpus_per_trial),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=list(callbacks),
            # The default waits for ever for resources that never come.
            failure_config=ray.train.FailureConfig(
                max_failures=sweep.worker_failures, controller_failure_limit=3
            ),
        ),
    )


def train_worker(config: dict[str, Any]) -> None:
    """What each Ray Train worker does: its share of the trial."""
    import ray
    import ray.train
    import torch

    spec = TrialSpec.model_validate(config["spec"])
    dataset: DatasetVersion = ray.get(config["dataset"][0])
    context = ray.train.get_context()
    count = context.get_world_size()
    if not torch.cuda.is_available():
        threads = max(1, int(spec.sweep.cpus_per_trial))
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # for what loads its own OpenMP later
    run_trial(
        spec,
        dataset,
        report=lambda metrics: ray.train.report(metrics),
        bases=BaseCache(keep=0),
        workers=Workers(
            rank=context.get_world_rank(),
            size=count,
            wrap=data_parallel if count > 1 else Workers().wrap,
            requested=spec.sweep.workers_per_trial,
            shard=spec.sweep.shard,
        ),
    )
