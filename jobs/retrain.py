"""Carry a retraining decision out: train a challenger on old and fresh data, and put it before the gate.

Runs as a Ray job whose id is derived from the alarm: `python -m jobs.retrain EXPERIMENT.yaml DECISION`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jobs.console import Say, say, show_decision, show_leaderboard
from jobs.decisions import present
from jobs.evaluation_sets import with_registered
from jobs.promotion import promote_winner
from jobs.review import reviewed, text_hash
from jobs.sweep import sweep
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset, make_dataset
from regraft.errors import DataError
from regraft.records import (
    DatasetVersion,
    DecisionOutcome,
    Example,
    ModelVersion,
    PromotionDecision,
    RetrainDecision,
    content_hash,
)
from regraft.search import Grid
from regraft.tracking.ledger import Ledger


class Hours(NamedTuple):
    """What a retraining took."""

    gpu: float = 0.0
    cpu: float = 0.0


def fresh_dataset(experiment: Experiment) -> DatasetVersion:
    """The experiment's data with the reviewed fresh examples and their evaluation sets added.

    Of the old examples `retrain.old_per_fresh` for each fresh one are kept, drawn by hash; of the evaluation
    sets all.

    Raises:
        DataError: If there are no reviewed examples, or they leak an evaluation set, old or new.
    """
    old = load_dataset(experiment.name, experiment.data)
    if experiment.retrain.reviewed is None:
        raise DataError(
            "retrain.reviewed names no file of reviewed examples", "review fresh exchanges and name the file"
        )
    fresh = reviewed(experiment)
    if not fresh:
        raise DataError(
            f"retrain.reviewed: {experiment.retrain.reviewed} has no example that is reviewed",
            "mend the answers there, and drop the tag `review` of those that are right",
        )
    splits = dict(old.splits)
    splits["train"] = (*drawn(old.split("train"), experiment.retrain.old_per_fresh, len(fresh)), *fresh)
    splits |= {name: read_chats(path) for name, path in experiment.retrain.evaluation.items()}
    return make_dataset(
        experiment.name,
        splits,
        sources=old.sources | {"train": f"{old.sources['train']}, {experiment.retrain.reviewed}"},
        leakage_jaccard=experiment.data.leakage_jaccard,
        parent_id=old.id,
    )


def drawn(old: Sequence[Example], per_fresh: float | None, fresh: int) -> tuple[Example, ...]:
    """The old examples that are trained on again, in the order given: those of the lowest hashes.

    Args:
        old: All of them.
        per_fresh: Old ones for each fresh one; None for all.
        fresh: How many fresh ones there are. With more of them no old one is left out that was not before.
    """
    if per_fresh is None:
        return tuple(old)
    order = sorted(range(len(old)), key=lambda i: content_hash([text_hash(old[i]), old[i].id], 64))
    kept = set(order[: round(per_fresh * fresh)])
    return tuple(example for i, example in enumerate(old) if i in kept)


def retrain_experiment(experiment: Experiment, champion: ModelVersion) -> Experiment:
    """The experiment as it is swept again: the champion's method beside the control, or all of it.

    `retrain.sweep` says which.
    """
    section = experiment.retrain
    update: dict[str, object] = {}
    if section.sweep == "narrow":
        update = {
            "methods": ({"name": "zero_shot"}, champion.method),
            "stopping": None,
            "search": Grid(),
            "finalists": None,
            "ray_train": tuple(n for n in experiment.sweep.ray_train if n == champion.method["name"]),
        }
    if section.epochs is not None:
        update["epochs"] = section.epochs
    if section.cpus_per_trial is not None:
        update["cpus_per_trial"] = section.cpus_per_trial
    return experiment.model_copy(update={"sweep": experiment.sweep.model_copy(update=update)})


def retrain(
    experiment: Experiment, decision: RetrainDecision, connection: Connection, say: Say = say
) -> tuple[ModelVersion, PromotionDecision]:
    """Train a challenger and judge it against the champion on all evaluation sets, old and fresh.

    What is trained follows from the version that drifted, not from the present champion: run again after the
    challenger was promoted, it finds what is finished.

    Raises:
        RegraftError: If there is no such version, or the challenger did not complete.
    """
    dataset = with_registered(experiment, fresh_dataset(experiment), connection.registry, say)
    say(f"dataset {dataset.id}: {len(dataset.split('train'))} to train on, evaluated on " + ", ".join(
        f"{len(rows)} of {name}" for name, rows in dataset.splits.items() if name != "train"))  # fmt: skip
    swept = _swept(experiment, decision, connection)
    board, results, _ = sweep(swept, dataset, connection, say, {"retrain_decision": decision.id})
    show_leaderboard(board)
    return promote_winner(experiment, dataset, board, results, connection, say)


def hours(experiment: Experiment, decision: RetrainDecision, connection: Connection) -> Hours:
    """What the sweeps of a retraining took so far, whatever became of them.

    Of GPUs what its trials held; of cores the seconds of their training times what they held.
    """
    from regraft.methods import parse_method
    from regraft.tuning.plan import demand_of

    swept = _swept(experiment, decision, connection)
    gpu = cpu = 0.0
    for spent, results in connection.tracker(experiment).spent_on({"retrain_decision": decision.id}):
        gpu += float(spent.get("gpu_hours", 0.0))
        cpu += sum(
            r.cost.train_seconds / 3600 * demand_of(parse_method(r.method), swept).cpus for r in results
        )
    return Hours(gpu, cpu)


def _swept(experiment: Experiment, decision: RetrainDecision, connection: Connection) -> Experiment:
    version = connection.registry.version(experiment.name, decision.model_version)
    return retrain_experiment(experiment, version)


def outcome_file(connection: Connection, decision_id: str) -> Path:
    """Where a retraining writes the gate's word, for who waits in the same workspace."""
    return connection.workspace / "decisions" / f"{decision_id}.outcome"


def conclude(
    experiment: Experiment,
    decision: RetrainDecision,
    connection: Connection,
    ledger: Ledger,
    say: Say = say,
) -> DecisionOutcome:
    """Retrain, and write down what became of it; run again, it goes on from what is finished.

    Raises:
        Exception: What the retraining raised, once it stands in the ledger as failed. What ends the process
            from outside is left to `jobs.decisions.reconcile`.
    """
    if (known := ledger.outcome(decision.id)) is not None:
        say(f"decision {decision.id} was carried out already: {known.status}: {known.detail}")
        return known
    try:
        hashes = [text_hash(e) for e in reviewed(experiment)]
        version, verdict = retrain(experiment, decision, connection, say)
        took = hours(experiment, decision, connection)
    except Exception as error:
        took = hours(experiment, decision, connection)
        words = str(error) or type(error).__name__
        ledger.note_outcome(
            DecisionOutcome(
                decision_id=decision.id, status="failed", detail=words,
                gpu_hours=took.gpu, cpu_hours=took.cpu, ended=present(),
            )
        )  # fmt: skip
        raise
    show_decision(verdict)
    file = outcome_file(connection, decision.id)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"version": version.model_dump(), "decision": verdict.model_dump()}, indent=1))
    ledger.note_seen(decision.id, hashes)
    return ledger.note_outcome(
        DecisionOutcome(
            decision_id=decision.id,
            status="promoted" if verdict.outcome == "promote" else "rejected",
            detail=f"{verdict.outcome}, against {verdict.incumbent}: {verdict.reason}",
            version=version.version,
            gpu_hours=took.gpu,
            cpu_hours=took.cpu,
            ended=present(),
        )
    )


def run(path: Path, decision_id: str) -> None:
    """The whole job.

    Raises:
        DataError: If the ledger has no such decision, or it is not one to retrain.
    """
    experiment = Experiment.load(path)
    with connected(experiment, Workspace(), say) as connection:
        ledger = Ledger(connection.tracker(experiment))
        decision = ledger.decision(decision_id)
        if decision is None or decision.action != "retrain":
            what = "no such decision" if decision is None else f"the decision is {decision.action!r}"
            raise DataError(
                f"{decision_id}: {what} in MLflow at {connection.tracking_uri}",
                "give the id of a decision to retrain that `regraft drift` recorded",
            )
        conclude(experiment, decision, connection, ledger)


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(
        lambda: run(Path(sys.argv[1]), sys.argv[2]),
        "python jobs/retrain.py EXPERIMENT.yaml DECISION",
        arguments=2,
    )
