"""Carry a retraining decision out: train a challenger on old and fresh data, and put it before the gate.

Runs as a Ray job whose id is derived from the decision: `python -m jobs.retrain EXPERIMENT.yaml DECISION`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from jobs.console import Say, say, show_decision, show_leaderboard
from jobs.sweep import gate, result_of, settle, sweep
from jobs.workspace import Connection, Workspace, connected
from regraft.config import Experiment
from regraft.data.chats import read_chats
from regraft.data.dataset import load_dataset, make_dataset, union_of_evaluations
from regraft.errors import DataError, RegraftError
from regraft.records import DatasetVersion, EvalReport, ModelVersion, PromotionDecision, RetrainDecision
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


def score_champion(
    experiment: Experiment, champion: ModelVersion, dataset: DatasetVersion, connection: Connection
) -> EvalReport:
    """The champion's scores on all evaluation sets; what was scored before is not asked again."""
    import ray

    known = result_of(champion, connection).report
    folder = connection.registry.fetch(champion.logged_model_id)
    arguments = (experiment, champion, dataset, known, folder)
    task = ray.remote(num_cpus=experiment.sweep.cpus_per_trial, num_gpus=experiment.sweep.gpus_per_trial)(
        _score
    )
    report: EvalReport = ray.get(task.remote(*arguments))
    return report


def _score(
    experiment: Experiment,
    version: ModelVersion,
    dataset: DatasetVersion,
    known: EvalReport | None,
    folder: Path,
) -> EvalReport:
    from regraft.methods import parse_method
    from regraft.models import load_tokenizer, pick_device, resolve
    from regraft.training.candidate import score

    base = resolve(version.base_model, None)
    device = pick_device(experiment.model.device)
    model = parse_method(version.method).load(base.path, folder, experiment.model.dtype, device)
    return score(
        model,
        load_tokenizer(base.path),
        union_of_evaluations(dataset),
        experiment.evaluate,
        dataset_id=dataset.id,
        split="evaluation",
        known=known.examples if known else (),
    )


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
    dataset = fresh_dataset(experiment)
    say(f"dataset {dataset.id}: {len(dataset.split('train'))} to train on, evaluated on " + ", ".join(
        f"{len(rows)} of {name}" for name, rows in dataset.splits.items() if name != "train"))  # fmt: skip
    narrowed = retrain_experiment(experiment, champion)
    board, results, _ = sweep(narrowed, dataset, connection, say, {"retrain_decision": decision.id})
    show_leaderboard(board)
    winner = next((r for r in results if r.key == board.winner_key), None)
    if winner is None or winner.report is None:
        raise RegraftError(
            f"the retraining gave no challenger: {board.winner_reason}", "see its runs in MLflow"
        )
    version = connection.registry.register(experiment.name, winner)
    settled = connection.registry.promotion(version)
    if champion == version and settled is not None:
        return version, settled  # an earlier attempt of this job went this far
    say(f"scoring {champion.served_id} on the fresh evaluation set")
    incumbent = score_champion(experiment, champion, dataset, connection)
    verdict = gate(experiment, version, winner.report, incumbent, champion.served_id)
    settle(experiment, version, winner.report, verdict, champion, connection)
    return version, verdict


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
