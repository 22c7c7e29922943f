"""The end of a sweep: the best of each method measured once more, one at a time on a quiet worker.

While trials run beside one another their latency is nobody's; and who was chosen by some examples looks
better on them than it is. Here each answers examples that played no part in the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray

from regraft.cluster.quiet import QuietWorker, quiet_worker
from regraft.config import Experiment
from regraft.data.dataset import evaluation_parts
from regraft.models import home
from regraft.records import (
    DatasetVersion,
    Example,
    ExampleScore,
    Leaderboard,
    ModelVersion,
    Parity,
    TrialResult,
)
from regraft.selection.rank import rank
from regraft.tracking.registry import Registry
from regraft.tracking.runs import Tracker
from regraft.training.candidate import BaseCache
from regraft.training.final import Entry, Measured, measure

Say = Callable[[str], None]


class Measuring:
    """The actor. It keeps its imports and its base from one candidate to the next.

    Args:
        tracking_uri: The MLflow server that has the candidates' files.
        threads: Of torch.
    """

    def __init__(self, tracking_uri: str, threads: int) -> None:
        import torch

        torch.set_num_threads(threads)
        self._registry = Registry(tracking_uri, home() / "adapters")
        self._bases = BaseCache()

    def measure(self, entry: Entry, examples: Sequence[Example], *args: Any, **kwargs: Any) -> Measured:
        """See `regraft.training.final.measure`."""
        folder: Path | None = None
        if entry.logged_model_id is not None:
            folder = self._registry.fetch(entry.logged_model_id)
        return measure(entry, examples, *args, folder=folder, bases=self._bases, **kwargs)

    def parity(
        self, check: Callable[..., Parity], version: ModelVersion, *args: Any, **kwargs: Any
    ) -> Parity:
        """Check, by a function of the stages above, that a version answers alike however it is run."""
        self._bases = BaseCache()  # it loads its own, one at a time
        return check(version, self._registry.fetch(version.logged_model_id), *args, **kwargs)


class Quiet:
    """Has candidates of an experiment measured, one at a time.

    Args:
        experiment: How to answer and score.
        dataset: With its evaluation sets.
        worker: Where.
    """

    def __init__(self, experiment: Experiment, dataset: DatasetVersion, worker: QuietWorker) -> None:
        self._experiment, self._dataset, self._worker = experiment, dataset, worker
        self._final = evaluation_parts(dataset, experiment.evaluate.final_share).final

    def __call__(self, entry: Entry, known: Sequence[ExampleScore] = ()) -> Measured:
        """Measure one.

        Raises:
            ray.exceptions.RayError: If it failed, or its process died.
        """
        found: Measured = ray.get(
            self._worker.actor.measure.remote(
                entry, self._final, self._dataset.split("train"), self._experiment.evaluate,
                self._experiment.model, dataset_id=self._dataset.id, known=known, where=self._worker.where,
            )
        )  # fmt: skip
        return found


def quietly(experiment: Experiment, tracking_uri: str, say: Say) -> Any:
    """A context with the quiet worker of an experiment."""
    sweep = experiment.sweep
    return quiet_worker(
        Measuring, tracking_uri, max(1, int(sweep.cpus_per_trial)),
        cpus=sweep.cpus_per_trial, gpus=sweep.gpus_per_trial, say=say,
    )  # fmt: skip


def ranked(experiment: Experiment, sweep_id: str, results: Sequence[TrialResult]) -> Leaderboard:
    """The leaderboard by the experiment's settings."""
    select = experiment.select
    return rank(
        results,
        sweep_id=sweep_id,
        objective=select.maximise,
        constraints=select.subject_to,
        tie_break=select.tie_break,
        level=select.confidence,
        resamples=select.resamples,
    )


def run_finals(
    experiment: Experiment,
    dataset: DatasetVersion,
    sweep_id: str,
    results: Sequence[TrialResult],
    *,
    tracking_uri: str,
    say: Say,
) -> tuple[Leaderboard, tuple[TrialResult, ...]]:
    """Measure the best of each method and the controls, and whoever wins by what was found.

    A candidate that cannot be measured has failed: it is not served, and the next time it is tried again.

    Args:
        experiment: Its settings.
        dataset: With its evaluation sets.
        sweep_id: The sweep.
        results: Of its trials; those measured before are not measured again.
        tracking_uri: The MLflow server.
        say: Called with a line for each.

    Returns:
        The leaderboard, and the results with what was found.
    """
    tracker = Tracker(tracking_uri, experiment.name)
    found = {r.key: r for r in results}

    def board() -> Leaderboard:
        return ranked(experiment, sweep_id, tuple(found.values()))

    current = board()
    first = [key for key in contenders(current, experiment.evaluate.finals) if found[key].final is None]
    waiting = first or _next(current, found)
    if not waiting:
        return current, tuple(found.values())
    with quietly(experiment, tracking_uri, say) as worker:
        quiet = Quiet(experiment, dataset, worker)
        while waiting:
            result = found[waiting.pop(0)]
            say(f"measuring {result.label} alone")
            entry = Entry(**result.model_dump(include=set(Entry.model_fields)))
            try:
                measured = quiet(entry)
            except ray.exceptions.RayError as error:
                reason = f"could not be measured: {_last_line(error)}"
                say(f"failed {result.label}: {reason}")
                result = result.model_copy(update={"status": "failed", "reason": reason})
            else:
                update = {"final": measured.report, "speed": measured.speed}
                result = result.model_copy(update=update)
            found[result.key] = result
            tracker.add_final(result)
            if not waiting:
                current = board()
                waiting = _next(current, found)
    return current, tuple(found.values())


def contenders(board: Leaderboard, most: int) -> list[str]:
    """Keys of the best of each method and of every control, the best first, `most` of the former."""
    best: dict[str, str] = {}
    controls = []
    for row in board.rows:
        if row.rank is not None and row.is_control:
            controls.append(row.key)
        elif row.rank is not None:
            best.setdefault(str(row.method["name"]), row.key)
    return [*list(best.values())[:most], *controls]


def _next(board: Leaderboard, found: dict[str, TrialResult]) -> list[str]:
    """Who is to be measured next: the winner; without one, the best that may yet meet the bounds."""
    if board.winner_key is not None:
        return [board.winner_key] if found[board.winner_key].final is None else []
    for row in board.rows:
        if row.rank is not None and not row.is_control and found[row.key].final is None:
            return [row.key]
    return []


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1][:300]
