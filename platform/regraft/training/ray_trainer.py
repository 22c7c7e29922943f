"""A trial of several workers (or one that asks for it) as a Ray Train run inside the Tune trial."""

from __future__ import annotations

from typing import Any

from regraft.errors import InfeasibleTrialError
from regraft.records import DatasetVersion
from regraft.training.candidate import BaseCache
from regraft.training.distributed import Workers, data_parallel
from regraft.training.trial import TrialSpec, run_trial


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
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    sweep = spec.sweep
    resources = {"CPU": sweep.cpus_per_trial}
    if sweep.gpus_per_trial:
        resources["GPU"] = sweep.gpus_per_trial
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"spec": spec.model_dump(mode="json"), "dataset": dataset_ref},
        scaling_config=ray.train.ScalingConfig(
            num_workers=sweep.workers_per_trial,
            use_gpu=bool(sweep.gpus_per_trial),
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=[TuneReportCallback()],
            # The default waits for ever for resources that never come.
            failure_config=ray.train.FailureConfig(max_failures=1, controller_failure_limit=3),
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {}
        if any("OutOfMemory" in repr(f) or "OOM" in repr(f) for f in failures.values()):
            raise InfeasibleTrialError(f"out of memory in a Ray Train worker: {error}") from error
        raise


def _worker(config: dict[str, Any]) -> None:
    import ray
    import ray.train
    import torch

    spec = TrialSpec.model_validate(config["spec"])
    dataset: DatasetVersion = ray.get(config["dataset"][0])
    context = ray.train.get_context()
    count = context.get_world_size()
    if not torch.cuda.is_available():
        torch.set_num_threads(max(1, int(spec.sweep.cpus_per_trial)))
    run_trial(
        spec,
        dataset,
        report=lambda metrics: ray.train.report(metrics),
        bases=BaseCache(keep=0),
        workers=Workers(
            rank=context.get_world_rank(), size=count, wrap=_wrap if count > 1 else Workers().wrap
        ),
    )


def _wrap(model: Any) -> Any:
    from ray.train.torch import prepare_model

    return prepare_model(model, move_to_device=False)
