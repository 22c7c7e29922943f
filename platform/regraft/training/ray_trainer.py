"""A trial of several workers (or one that asks for it) as a Ray Train run inside the Tune trial."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ray.exceptions import OutOfMemoryError, RayActorError

from regraft.errors import TrialMemoryError
from regraft.records import DatasetVersion
from regraft.training.candidate import BaseCache
from regraft.training.distributed import Workers, data_parallel
from regraft.training.spec import TrialSpec
from regraft.training.trial import run_trial

#: How often workers are asked for that do not come, a minute each: others may hold what they need. Ray's
#: default is for ever.
_GROUPS_TRIED = 60


def run_with_ray_train(spec: TrialSpec, dataset_ref: Any, *, name: str, storage: str) -> None:
    """Run one trial on Ray Train workers; its reports reach Tune through Train's callback.

    Args:
        spec: What to do.
        dataset_ref: An object reference to the `DatasetVersion`, in a list so that Ray does not resolve it.
        name: Name of the Train run, stable over retries.
        storage: Folder or URI all nodes can reach.

    Raises:
        TrialMemoryError: If the memory of a worker ran out.
    """
    import ray.train
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = make_trainer(spec, dataset_ref, name=name, storage=storage, callbacks=[TuneReportCallback()])
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for failure in (getattr(error, "worker_failures", None) or {}).values():
            if ran_out := memory_error(failure):
                raise ran_out from error
        raise


def memory_error(error: BaseException | None) -> TrialMemoryError | None:
    """What an error says of memory, if anything: a trial's own, or Ray's, which ended a process."""
    for cause in _causes(error):
        if isinstance(cause, TrialMemoryError):
            return cause
        if isinstance(cause, OutOfMemoryError | KilledForMemoryError):
            return TrialMemoryError("out of memory: Ray ended a process of this trial", smaller=None)
    return None


def was_lost(error: BaseException | None) -> bool:
    """Whether an error says that a process or its node is gone, and nothing of the work itself."""
    return any(isinstance(cause, RayActorError) for cause in _causes(error))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = getattr(error, "cause", None) or error.__cause__


class KilledForMemoryError(RayActorError):  # type: ignore[misc]
    """An actor that Ray's memory monitor ended, in terms that Ray Tune understands."""


def survive_memory_kills() -> None:
    """Let Ray Tune take an actor that the memory monitor ended for any other that died.

    Ray 2.60 raises `OutOfMemoryError` for it, which Tune's actor manager does not know: `Tuner.fit()` itself
    would end with it, and all trials with that.
    """
    from ray.air.execution._internal.actor_manager import RayActorManager

    plain = RayActorManager._actor_task_failed
    if getattr(plain, "regraft", False):
        return

    def failed(self: Any, tracked_actor_task: Any, exception: Exception) -> None:
        if isinstance(exception, OutOfMemoryError):
            exception = KilledForMemoryError(error_msg=str(exception))
        plain(self, tracked_actor_task, exception)

    failed.regraft = True  # type: ignore[attr-defined]
    RayActorManager._actor_task_failed = failed


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
            failure_config=ray.train.FailureConfig(
                max_failures=sweep.worker_failures, controller_failure_limit=_GROUPS_TRIED
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
