"""Searching the space, and ending what is not worth finishing. No Ray, no model."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.config import Experiment
from regraft.errors import ConfigError
from regraft.methods import Method, parse_method
from regraft.search import TPE, Arm, Asha, Draws, Grid, Median, Outcome, Proposer, arms
from regraft.search.base import key

SPACE = [
    {"name": "zero_shot"},
    {"name": "lora", "rank": [4, 8, 16, 64], "learning_rate": {"loguniform": [1e-4, 1e-1]}},
    {"name": "prompt_tuning", "virtual_tokens": {"uniform": [4, 64]}, "initial_text": None},
    {"name": ["ia3", "full"], "learning_rate": [1e-3, 1e-2]},
]


def space() -> tuple[Arm, ...]:
    return tuple(arm for entry in SPACE for arm in arms(entry))


def drain(proposer: Proposer, outcome: Callable[[Method], Outcome] | None = None) -> list[Method]:
    found = []
    while (method := proposer.ask()) is not None:
        found.append(method)
        if outcome:
            proposer.tell(method, outcome(method))
    return found


def test_a_field_exists_only_where_its_method_has_it() -> None:
    assert [(arm.method, sorted(arm.choices), sorted(arm.ranges)) for arm in space()] == [
        ("zero_shot", [], []),
        ("lora", ["rank"], ["learning_rate"]),
        ("prompt_tuning", [], ["virtual_tokens"]),
        ("ia3", ["learning_rate"], []),
        ("full", ["learning_rate"], []),
    ]


def test_a_grid_tries_every_combination_and_draws_each_range() -> None:
    found = drain(Grid().proposer(space(), samples=3, seed=0))
    count = {
        name: sum(m.name == name for m in found) for name in ("zero_shot", "lora", "prompt_tuning", "ia3")
    }
    assert count == {"zero_shot": 1, "lora": 12, "prompt_tuning": 3, "ia3": 2}


@pytest.mark.parametrize("search", [Draws(trials=30), TPE(trials=30, startup=5)], ids=lambda s: s.name)
def test_as_many_are_tried_as_were_asked_for_none_twice_and_the_same_for_the_same_seed(search: Any) -> None:
    def outcome(method: Method) -> Outcome:
        return Outcome("completed", {"eval_loss": method.learning_rate})

    def run(seed: int) -> list[str]:
        return [key(m) for m in drain(search.proposer(space(), samples=1, seed=seed), outcome)]

    first = run(0)
    assert len(first) == len(set(first)) == 30
    assert first == run(0)
    assert first != run(1)
    assert parse_method({"name": "zero_shot"}) == search.preview(space(), samples=1, seed=0)[0]


@pytest.mark.parametrize("search", [Draws(trials=30), TPE(trials=30)], ids=lambda s: s.name)
def test_a_space_smaller_than_the_trials_is_tried_whole_and_ends(search: Any) -> None:
    few = arms({"name": "lora", "rank": [4, 8], "learning_rate": [1e-3, 1e-2]})
    found = drain(search.proposer(few, samples=1, seed=0), lambda _: Outcome("completed", {"eval_loss": 1.0}))
    assert len(found) == len({key(m) for m in found}) == 4


def test_rounded_values_at_the_bounds_of_a_range_are_still_of_it() -> None:
    narrow = arms({"name": "lora", "learning_rate": {"loguniform": [1.23456e-3, 1.23999e-3]}})
    proposer = TPE(trials=20, startup=1).proposer(narrow, samples=1, seed=0)
    found = drain(proposer, lambda _: Outcome("completed", {"eval_loss": 1.0}))
    assert {m.learning_rate for m in found} <= {0.00123, 0.00124}
    again = TPE(trials=20, startup=1).proposer(narrow, samples=1, seed=0)
    for method in found:
        again.recall(method, Outcome("completed", {"eval_loss": 1.0}), counts=True)
    assert drain(again) == []


def loss(method: Method) -> float:
    """Best for LoRA of high rank near 3e-3; the others are far behind."""
    import math

    if method.name != "lora":
        return 3.0
    return 1.0 + abs(math.log10(method.learning_rate / 3e-3)) + 4 / method.rank  # type: ignore[attr-defined]


def test_tpe_finds_more_of_the_good_region_than_draws_do() -> None:
    def good(search: Any, seed: int) -> int:
        found = drain(
            search.proposer(space(), samples=1, seed=seed),
            lambda m: Outcome("completed", {"eval_loss": loss(m)}),
        )
        return sum(loss(m) < 1.6 for m in found)

    learned = sum(good(TPE(trials=40), seed) for seed in range(3))
    drawn = sum(good(Draws(trials=40), seed) for seed in range(3))
    assert learned > 2 * drawn


def test_tpe_begins_where_earlier_trials_ended() -> None:
    rng, first = random.Random(1), TPE(trials=10, startup=5)
    (arm,) = arms(SPACE[1])
    proposer = first.proposer([arm], samples=1, seed=0)
    for _ in range(40):
        method = parse_method(arm.draw(rng))
        proposer.recall(method, Outcome("completed", {"eval_loss": loss(method)}), counts=False)
    proposer.recall(parse_method({"name": "full"}), Outcome("completed", {"eval_loss": 0.0}), counts=False)
    found = drain(proposer, lambda m: Outcome("completed", {"eval_loss": loss(m)}))
    assert len(found) == 10
    assert sum(loss(m) < 1.6 for m in found) >= 5


def test_trials_of_the_sweep_that_was_cut_short_count() -> None:
    whole = TPE(trials=8, startup=3)
    outcome = lambda m: Outcome("completed", {"eval_loss": loss(m)})  # noqa: E731
    proposer = whole.proposer(space(), samples=1, seed=0)
    before = [m for _ in range(5) if (m := proposer.ask())]
    again = whole.proposer(space(), samples=1, seed=0)
    for method in before:
        again.recall(method, outcome(method), counts=True)
    assert again.left == 3
    rest = drain(again, outcome)
    assert len(rest) == 3
    assert not {key(m) for m in rest} & {key(m) for m in before}


def test_tpe_takes_several_objectives_and_survives_every_way_a_trial_ends() -> None:
    search = TPE(trials=24, startup=4, minimise=("memory_peak_gib",), maximise=("rougeL",))
    endings = ["completed", "stopped", "infeasible", "failed", "cancelled"]
    count = iter(range(100))

    def outcome(method: Method) -> Outcome:
        ending: Any = endings[next(count) % len(endings)]
        return Outcome(ending, {"memory_peak_gib": method.learning_rate, "rougeL": 1 - method.learning_rate})

    assert len(drain(search.proposer(space(), samples=1, seed=0), outcome)) == 24
    single = TPE(trials=24, startup=4)
    count = iter(range(100))
    nan = lambda m: Outcome(outcome(m).status, {"eval_loss": float("nan")})  # noqa: E731
    assert len(drain(single.proposer(space(), samples=1, seed=0), nan)) == 24


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ("search: {name: tpe}", r"sweep.search.tpe.trials.*required"),
        (
            "search: {name: tpe, trials: 4, minimise: [eval_los]}",
            "sweep.search.minimise.0.*eval_los.*eval_loss",
        ),
        ("search: {name: tpe, trials: 4, minimise: []}", "nothing to search for"),
        ("search: {name: bayes}", "sweep.search"),
        ("stopping: {name: asha, reduction: 1}", "sweep.stopping.asha.reduction"),
        ("devices: {qlora: {gpus: 1}}", "sweep.devices: 'qlora' is not swept"),
        ("budget: {money: 10}", "sweep.budget.money: needs cluster.prices"),
        ("budget: {hours: 0}", "sweep.budget.hours"),
        ("seed: 0\ncluster: {autoscales: true}", r"yaml:7: cluster.autoscales: needs sweep.max_concurrent"),
    ],
)
def test_a_wrong_search_is_named(tmp_path: Path, lines: str, problem: str) -> None:
    path = tmp_path / "regraft.yaml"
    path.write_text(
        "name: e\nmodel: {source: m}\ndata: {train: t.jsonl, evaluation: e.jsonl}\n"
        f"sweep:\n  methods: [{{name: lora}}]\n  {lines}\n"
    )
    with pytest.raises(ConfigError, match=problem):
        Experiment.load(path)


def run_rule(rule: Any, curves: dict[str, list[float]], bracket: Callable[[str], str]) -> dict[str, int]:
    """Trials step by step, side by side; gives the point at which each was ended."""
    ended: dict[str, int] = {}
    for point in range(1, 1 + max(map(len, curves.values()))):
        for trial, curve in curves.items():
            if trial not in ended and rule.stops(bracket(trial), trial, point, curve[point - 1]):
                ended[trial] = point
    return ended


SLOW = {f"slow{i}": [5.0 - i / 10, 4.9, 2.0, 0.5 + i / 10] for i in range(4)}
FAST = {f"fast{i}": [1.0 + i / 10] * 4 for i in range(4)}


@pytest.mark.parametrize("settings", [Asha(grace=1, reduction=2), Median(grace=1)], ids=lambda s: s.name)
def test_slow_starters_are_held_against_their_like_alone(settings: Any) -> None:
    of_method = run_rule(settings.rule(), SLOW | FAST, lambda trial: trial[:4])
    across = run_rule(settings.rule(), FAST | SLOW, lambda _: "")
    survivors = {name for name in SLOW if name not in of_method}
    assert survivors, "no slow starter came to its end"
    assert {name for name in FAST if name not in of_method}
    assert set(SLOW) <= set(across), "across methods the slow ones should all have been ended"


def test_asha_lets_one_in_reduction_go_on_at_each_rung_and_spares_the_first() -> None:
    curves = {f"t{i}": [float(i)] * 9 for i in range(9)}
    ended = run_rule(Asha(grace=1, reduction=3, peers=3).rule(), curves, lambda _: "")
    assert "t0" not in ended
    assert set(ended.values()) <= {1, 3, 9}, "trials end at rungs alone"
    worst_first = {f"t{i}": [9.0 - i] * 9 for i in range(9)}
    ended = run_rule(Asha(grace=1, reduction=3, peers=3).rule(), worst_first, lambda _: "")
    assert ended.get("t0") != 1, "the first at a rung has nobody to be held against"


def test_median_ends_nobody_within_its_grace() -> None:
    curves = {f"t{i}": [float(i)] * 4 for i in range(6)}
    ended = run_rule(Median(grace=3).rule(), curves, lambda _: "")
    assert set(ended.values()) == {3}
    assert not {"t0", "t1"} & set(ended)
