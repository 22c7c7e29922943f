"""From a sweep to a champion on a real cluster: measured alone, judged by unseen examples, one at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import jobs.promotion
from jobs.evaluation_sets import with_registered
from jobs.promotion import promote_winner, rules_of
from jobs.sweep import sweep
from jobs.workspace import Connection
from regraft.cluster.quiet import quiet_worker
from regraft.config import Experiment
from regraft.data.chats import write_chats
from regraft.data.dataset import evaluation_parts, load_dataset
from regraft.errors import DataError
from regraft.records import DatasetVersion, Example, Leaderboard, Message, TrialResult


class Swept(NamedTuple):
    experiment: Experiment
    dataset: DatasetVersion
    connection: Connection
    board: Leaderboard
    results: tuple[TrialResult, ...]
    lines: list[str]


@pytest.fixture(scope="module")
def swept(
    two_nodes: Any, mlflow_url: str, tiny_experiment: Path, tmp_path_factory: pytest.TempPathFactory
) -> Swept:
    """A sweep of two adapters that learn the task by heart, and the control."""
    raw = yaml.safe_load((tiny_experiment / "regraft.yaml").read_text())
    raw["name"] = "promoted"
    raw["sweep"] |= {
        "methods": [
            {"name": "zero_shot"},
            {"name": "lora", "rank": 4, "learning_rate": 0.02},
            {"name": "rslora", "rank": 4, "learning_rate": 0.02},
        ],
        "epochs": 40, "evaluations": 1, "ray_train": [],
    }  # fmt: skip
    raw["select"] = {"subject_to": ["latency_p95_ms <= 60000"], "tie_break": None}
    raw["data"] = {k: str(tiny_experiment / f"data/{k}.jsonl") for k in ("train", "evaluation")}
    folder = tmp_path_factory.mktemp("promoted")
    (folder / "regraft.yaml").write_text(yaml.safe_dump(raw))
    experiment = Experiment.load(folder)
    dataset = load_dataset(experiment.name, experiment.data)
    connection = Connection(
        tracking_uri=mlflow_url, ray_address="", jobs_url=None, workspace=folder / "workspace"
    )
    lines: list[str] = []
    board, results, _ = sweep(experiment, dataset, connection, lines.append)
    return Swept(experiment, dataset, connection, board, results, lines)


def test_the_best_of_each_method_is_measured_alone_on_examples_it_was_not_chosen_by(swept: Swept) -> None:
    parts = evaluation_parts(swept.dataset, swept.experiment.evaluate.final_share)
    chosen_by, judged_by = ({e.id for e in part} for part in parts)
    assert not chosen_by & judged_by
    assert chosen_by | judged_by == {e.id for e in swept.dataset.split("evaluation")}
    for result in swept.results:
        assert result.report is not None
        assert result.final is not None
        assert {e.example_id for e in result.report.examples} == chosen_by
        assert {e.example_id for e in result.final.examples} == judged_by
        assert result.speed is not None
        assert "nothing else on its node's 1 cores" in result.speed.how
        assert "forgetting" in result.report.whole
    store = swept.connection.tracker(swept.experiment)
    assert {r.key: r for r in store.results_on(swept.dataset.id)} == {r.key: r for r in swept.results}
    winner = next(r for r in swept.board.rows if r.key == swept.board.winner_key)
    assert winner.final is not None
    assert winner.p_control is not None
    assert swept.board.optimism is not None
    assert any("played no part in the choice" in line for line in swept.lines)


def test_a_sweep_that_is_started_again_measures_nobody_again(swept: Swept) -> None:
    lines: list[str] = []
    board, results, _ = sweep(swept.experiment, swept.dataset, swept.connection, lines.append)
    assert not any("measuring" in line or line.startswith("started") for line in lines)
    assert {r.key: r for r in results} == {r.key: r for r in swept.results}
    assert board.winner_key == swept.board.winner_key


def test_of_two_promoted_at_once_one_wins_and_the_other_is_judged_against_it(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, rslora = (next(r for r in swept.results if r.method["name"] == name) for name in ("lora", "rslora"))
    both_judged = threading.Barrier(2, timeout=120)
    judged: list[tuple[str, str]] = []
    real = jobs.promotion.judge

    def judge(challenger: Any, champion: Any, *args: Any, **kwargs: Any) -> Any:
        decision = real(challenger, champion, *args, **kwargs)
        judged.append((challenger.name, decision.incumbent))
        if champion is None:
            both_judged.wait()
        return decision

    monkeypatch.setattr(jobs.promotion, "judge", judge)
    lines: list[str] = []

    def promote(winner: TrialResult) -> Any:
        board = swept.board.model_copy(update={"winner_key": winner.key})
        return promote_winner(
            swept.experiment, swept.dataset, board, swept.results, swept.connection, lines.append
        )

    with ThreadPoolExecutor(2) as pool:
        (first, one), (second, other) = pool.map(promote, (lora, rslora))
    registry = swept.connection.registry
    champion = registry.by_alias("promoted", "champion")
    assert champion in (first, second)
    assert [d.outcome for d in (one, other)].count("promote") >= 1, (one.reason, other.reason)
    # Whoever came second has been judged twice: against the control, and against the winner of the race.
    rounds = {
        name: [against for n, against in judged if n == name] for name in (first.served_id, second.served_id)
    }
    twice = [name for name, against in rounds.items() if len(against) == 2]
    assert len(twice) == 1, (judged, one.reason, other.reason)
    won = ({first.served_id, second.served_id} - set(twice)).pop()
    assert rounds[twice[0]] == ["the untuned base (zero_shot)", won]
    assert any("judged again" in line for line in lines)
    last = one if first.served_id == twice[0] else other
    assert last.incumbent == won
    assert {c.against for c in last.evidence} == {won, "the untuned base (zero_shot)"}
    for decision in (one, other):
        assert decision.parity is not None
        assert decision.parity.ok, decision.parity
        assert all(check.ok for check in decision.checks if check.figure == "forgetting")


def test_the_evidence_is_kept_with_the_version(swept: Swept) -> None:
    from mlflow import MlflowClient

    registry = swept.connection.registry
    champion = registry.by_alias("promoted", "champion")
    assert champion is not None
    decision = registry.promotion(champion)
    assert decision is not None
    page = MlflowClient(swept.connection.tracking_uri).get_model_version("promoted", str(champion.version))
    assert page.tags["gate.outcome"] == "promote"
    assert page.tags["promotion.id"] == decision.id
    assert decision.reason in page.description


def fresh_experiment(swept: Swept, folder: Path, rows: list[Example]) -> Experiment:
    """The experiment with another evaluation set in place of its own."""
    write_chats(folder / "other.jsonl", rows)
    data = swept.experiment.data.model_copy(update={"evaluation": {"other": folder / "other.jsonl"}})
    return swept.experiment.model_copy(update={"data": data})


def asked(number: int, question: str) -> Example:
    turns = (Message(role="user", content=question), Message(role="assistant", content="Yes."))
    return Example(id=f"other-{number}", messages=turns)


def test_a_set_that_decided_once_is_looked_at_though_the_yaml_names_it_no_more(
    swept: Swept, tmp_path: Path
) -> None:
    lines: list[str] = []
    experiment = fresh_experiment(
        swept, tmp_path, [asked(i, f"Does shop {i} open on holidays?") for i in range(4)]
    )
    dataset = load_dataset(experiment.name, experiment.data)
    assert set(dataset.splits) == {"train", "other"}
    whole = with_registered(experiment, dataset, swept.connection.registry, lines.append)
    assert set(whole.splits) == {"train", "other", "evaluation"}
    assert whole.split("evaluation") == swept.dataset.split("evaluation")
    assert whole.parent_id == dataset.id
    assert "evaluated on evaluation (12) too" in lines[0]
    assert (
        with_registered(swept.experiment, swept.dataset, swept.connection.registry, lines.append)
        is swept.dataset
    )


def test_training_on_a_registered_set_is_refused(swept: Swept, tmp_path: Path) -> None:
    leaked = swept.dataset.split("evaluation")[0]
    experiment = fresh_experiment(swept, tmp_path, [asked(1, "Does the shop open on holidays?")])
    write_chats(tmp_path / "train.jsonl", [leaked.model_copy(update={"id": "leak"})])
    data = experiment.data.model_copy(update={"train": (tmp_path / "train.jsonl",)})
    experiment = experiment.model_copy(update={"data": data})
    dataset = load_dataset(experiment.name, experiment.data)
    with pytest.raises(
        DataError, match=r"leak the evaluation set 'evaluation'[\s\S]*registered with promoted/"
    ):
        with_registered(experiment, dataset, swept.connection.registry, lambda _: None)


class Named:
    def where(self) -> str:
        return "here"


def test_where_no_node_is_free_what_is_measured_says_so(two_nodes: Any) -> None:
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    # A whole core would not fit beside the first on its node.
    holders = [ray.remote(num_cpus=0.6)(Named).remote() for _ in range(2)]
    ray.get([holder.where.remote() for holder in holders])
    lines: list[str] = []
    with quiet_worker(Named, cpus=0.4, gpus=0, say=lines.append, patience=1.0) as worker:
        assert ray.get(worker.actor.where.remote()) == "here"
        assert worker.where == "beside other work on its node"
    assert "shares one" in lines[0]
    for holder in holders:
        ray.kill(holder)


@pytest.mark.parametrize(
    ("change", "bounds", "not_worse"),
    [
        (lambda e: e, {"latency_p95_ms", "forgetting"}, {"refusal", "pii", "repetition"}),
        (
            lambda e: e.model_copy(
                update={
                    "select": e.select.model_copy(
                        update={
                            "gate": e.select.gate.model_copy(
                                update={"subject_to": (), "not_worse": {"rouge1": 0.1}}
                            )
                        }
                    )
                }
            ),
            set(),
            {"rouge1"},
        ),
    ],
)
def test_the_rules_are_those_of_the_yaml_or_safe_ones(
    swept: Swept, change: Callable[[Experiment], Experiment], bounds: set[str], not_worse: set[str]
) -> None:
    rules = rules_of(change(swept.experiment))
    assert {b.metric for b in rules.bounds} == bounds
    assert set(rules.not_worse) == not_worse
