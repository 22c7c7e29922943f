"""One trial, from its specification to its record: the same function inline and under Ray Train.

It knows no Ray: what to do with progress is injected.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from regraft.errors import InfeasibleTrialError, TrialMemoryError
from regraft.records import DatasetVersion, TrialResult
from regraft.tracking.client import to_json
from regraft.tracking.runs import Tracker
from regraft.training.attempt import Attempt, Report
from regraft.training.candidate import BaseCache
from regraft.training.distributed import Workers
from regraft.training.spec import TrialSpec
from regraft.watchdog import watched


def run_trial(
    spec: TrialSpec,
    dataset: DatasetVersion,
    *,
    report: Report,
    bases: BaseCache,
    workers: Workers = Workers(),  # noqa: B008
    work: type[Attempt] | None = None,
) -> None:
    """Train, score and record one trial; a process that hangs in it ends itself.

    Whatever ends it is recorded in its run: completion, infeasibility with its reason, or a failure, which is
    raised again. A stop from outside (`SystemExit` out of `report`) is for whoever stopped it to record: here
    nobody knows why. Each report has what is known by then.

    Args:
        spec: What to do.
        dataset: Its data; the id must be `spec.dataset_id`.
        report: Called with `eval_loss`, `point` (1 to `spec.points`), `status` and `cost`; at the end with
            the `record`, as JSON.
        bases: Clean base models of this process.
        workers: This process's place among those that train this trial; rank 0 records.
        work: What is done between start and record, where it is not training and scoring.

    Raises:
        TrialMemoryError: If memory ran out. Whoever started the trial tries again with less, or records it:
            this process is not to be used for another.
    """
    note = spec.hang_note if workers.rank == 0 else None
    with watched(spec.sweep.hang_minutes * 60, note):
        _run(spec, dataset, report, (work or Attempt), bases, workers)


def _run(
    spec: TrialSpec,
    dataset: DatasetVersion,
    report: Report,
    work: type[Attempt],
    bases: BaseCache,
    workers: Workers,
) -> None:
    run = None
    if workers.rank == 0:
        params = spec.params | spec.sweep.model_dump(
            mode="json", include={"epochs", "tokens_per_batch", "seed"}
        )
        run = _tracker(spec.tracking_uri, spec.experiment).start_trial(
            spec.sweep_run_id,
            sweep_id=spec.sweep_id,
            key=spec.key,
            label=spec.named,
            params=params,
            dataset=dataset,
        )
    attempt = work(spec, dataset, run, report, bases, workers)
    try:
        result = attempt.go()
    except InfeasibleTrialError as error:
        record = attempt.record(attempt.result("infeasible", error.problem))
        report({"eval_loss": math.inf, "point": spec.points} | _ended(record))
        return
    except Exception as error:
        if _is_out_of_memory(error):
            said = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise TrialMemoryError(f"out of memory: {said}", smaller=attempt.smaller) from error
        attempt.record(attempt.result("failed", f"{type(error).__name__}: {error}"))
        raise
    record = attempt.record(result)
    metrics = {"eval_loss": record.eval_loss, "point": spec.points}
    report(metrics | _ended(record) | {"figures": record.figures})


#: Of this process: it asks for the experiment's id once, however many trials it runs.
_tracker = cache(Tracker)


def _ended(result: TrialResult) -> dict[str, Any]:
    """What the last report says beside the loss."""
    known = {"status": result.status, "reason": result.reason, "cost": result.cost.model_dump()}
    return known | {"record": to_json(result)}


def _is_out_of_memory(error: BaseException) -> bool:
    import torch

    if isinstance(error, torch.cuda.OutOfMemoryError | MemoryError):
        return True
    # On a CPU torch raises a plain RuntimeError: on Linux, and elsewhere.
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in text or "not enough memory" in text
    )
