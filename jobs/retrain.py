"""Carry a retraining decision out: train a challenger on old and fresh data, and put it before the gate.

Runs as a Ray job whose id is derived from the decision: `python -m jobs.retrain EXPERIMENT.yaml DECISION`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jobs.console import Say, say, show_decision, show_leaderboard
from jobs.evaluation_sets import with_registered
from jobs.promotion import promote_winner
from jobs.sweep import sweep
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset, make_dataset
from regraft.errors import DataError, RegraftError
from regraft.records import DatasetVersion, ModelVersion, PromotionDecision, RetrainDecision
from regraft.search import Grid


def fresh_dataset(experiment: Experiment) -> DatasetVersion:
    """The experiment's data with the reviewed fresh examples and their evaluation sets added.

    Raises:
        DataError: If there are no reviewed examples, or they leak an evaluation set, old or new.
    """
    old = load_dataset(experiment.name, experiment.data)
    if experiment.retrain.reviewed is None:
        raise DataError(
            "retrain.reviewed names no file of reviewed examples", "review fresh exchanges and name the file"
        )
    splits = dict(old.splits)
    splits["train"] = (*old.split("train"), *read_chats(experiment.retrain.reviewed))
    splits |= {name: read_chats(path) for name, path in experiment.retrain.evaluation.items()}
    return make_dataset(
        experiment.name,
        splits,
        sources=old.sources | {"train": f"{old.sources['train']}, {experiment.retrain.reviewed}"},
        leakage_jaccard=experiment.data.leakage_jaccard,
        parent_id=old.id,
    )


def retrain_experiment(experiment: Experiment, champion: ModelVersion) -> Experiment:
    """The experiment narrowed to the champion's configuration, beside the control."""
    section = experiment.retrain
    update: dict[str, object] = {
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

    Raises:
        RegraftError: If there is no champion, or the challenger did not complete.
    """
    champion = connection.registry.by_alias(experiment.name, "champion")
    if champion is None:
        raise RegraftError(f"{experiment.name} has no champion to retrain from", "run `regraft sweep` first")
    dataset = with_registered(experiment, fresh_dataset(experiment), connection.registry, say)
    say(f"dataset {dataset.id}: {len(dataset.split('train'))} to train on, evaluated on " + ", ".join(
        f"{len(rows)} of {name}" for name, rows in dataset.splits.items() if name != "train"))  # fmt: skip
    narrowed = retrain_experiment(experiment, champion)
    board, results, _ = sweep(narrowed, dataset, connection, say, {"retrain_decision": decision.id})
    show_leaderboard(board)
    return promote_winner(experiment, dataset, board, results, connection, say)


def outcome_file(connection: Connection, decision_id: str) -> Path:
    """Where a retraining writes what became of it."""
    return connection.workspace / "decisions" / f"{decision_id}.outcome"


def run(path: Path, decision_id: str) -> None:
    """The whole job. Run again, it finds what is finished."""
    experiment = Experiment.load(path)
    workspace = Workspace()
    file = workspace.root / "decisions" / f"{decision_id}.json"
    if not file.exists():
        raise DataError(
            f"{file}: no such decision", "give the id of a decision that `regraft drift` recorded"
        )
    decision = RetrainDecision.model_validate_json(file.read_text())
    with connected(experiment, workspace, say) as connection:
        outcome = outcome_file(connection, decision.id)
        if outcome.exists():
            say(f"decision {decision.id} was carried out already: see {outcome}")
            return
        version, verdict = retrain(experiment, decision, connection)
        show_decision(verdict)
        outcome.write_text(
            json.dumps({"version": version.model_dump(), "decision": verdict.model_dump()}, indent=1)
        )


if __name__ == "__main__":
    from jobs.cli import run_script

    run_script(
        lambda: run(Path(sys.argv[1]), sys.argv[2]),
        "python jobs/retrain.py EXPERIMENT.yaml DECISION",
        arguments=2,
    )
