"""Which trial starts when: capacity, budget, repeats and what is found finished. No Ray, no MLflow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regraft.config import BudgetSection, Experiment
from regraft.errors import ServiceError
from regraft.models import ResolvedModel
from regraft.records import DatasetVersion, TrialResult, TrialStatus
from regraft.search import Outcome
from regraft.training.spec import TrialSpec
from regraft.tuning.budget import Demand, Ledger, Spent
from regraft.tuning.conductor import Conductor
from regraft.tuning.plan import plan_sweep

LORA = {"name": "lora", "rank": [1, 2, 3, 4, 5, 6]}


class Clock:
    """Time that passes when it is told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def conductor(
    clock: Clock,
    *,
    capacity: Demand = Demand(2, 0),  # noqa: B008
    room: Callable[[], tuple[Demand, int]] | None = None,
    ledger: Callable[[BudgetSection, Clock], Ledger] = Ledger,
    find: Callable[[str], TrialResult | None] = lambda _: None,
    prices: dict[str, float] | None = None,
    **sweep: Any,
) -> Conductor:
    experiment = Experiment.model_validate(
        {
            "name": "e",
            "model": {"source": "m"},
            "data": {"train": "t.jsonl", "evaluation": "e.jsonl"},
            "sweep": {"methods": [LORA]} | sweep,
            "cluster": {"prices": prices or {}},
        }
    )
    base = ResolvedModel(source="m", revision="r", path=Path("m"))
    dataset = DatasetVersion(id="d", name="d", splits={})
    plan = plan_sweep(experiment, dataset, base, "http://127.0.0.1:9")
    search = experiment.sweep.search.proposer(experiment.sweep.arms, samples=1, seed=experiment.sweep.seed)
    return Conductor(
        experiment,
        search,
        plan.spec,
        find,
        ledger(experiment.sweep.budget, clock),
        room or (lambda: (capacity, 1)),
        lambda method: float(method.trains),
        lambda _: None,
    )


def outcome(quality: float = 0.5, status: TrialStatus = "completed") -> Outcome:
    return Outcome(status, {"rougeL": quality})


def starts(order: Conductor) -> list[TrialSpec]:
    """All that can start now."""
    found = []
    while isinstance(spec := order.next(), TrialSpec):
        found.append(spec)
    return found


def play(
    order: Conductor, clock: Clock, seconds: float = 60, quality: Any = lambda _: 0.5
) -> list[TrialSpec]:
    """Run a sweep in which every trial takes as long, all that run at once ending together."""
    ran, wave = [], starts(order)
    while wave:
        ran += wave
        clock.now += seconds
        for spec in wave:
            order.finished(spec.key, outcome(quality(spec)))
        wave = starts(order)
    assert order.next() == "done"
    return ran


def test_as_many_run_at_once_as_there_is_room_for_and_no_more() -> None:
    clock = Clock()
    order = conductor(clock, capacity=Demand(3, 0))
    first = starts(order)
    assert len(first) == 3
    assert order.next() == "wait"
    order.finished(first[0].key, outcome())
    assert len(starts(order)) == 1
    assert len(starts(conductor(clock, capacity=Demand(8, 0), max_concurrent=2))) == 2


def test_fractions_of_a_gpu_are_shared_to_the_last_part() -> None:
    order = conductor(Clock(), capacity=Demand(16, 1), gpus_per_trial=0.25, cpus_per_trial=1)
    assert len(starts(order)) == 4
    third = conductor(Clock(), capacity=Demand(16, 1), gpus_per_trial=0.1, cpus_per_trial=0.1)
    assert len(starts(third)) == 6, "rounding must not cost a slot"


def test_a_wide_trial_is_not_overtaken() -> None:
    methods = [{"name": "lora", "rank": 1}, {"name": "full"}, {"name": "lora", "rank": [2, 3, 4]}]
    order = conductor(Clock(), methods=methods, devices={"full": {"workers": 2}})
    (narrow,) = starts(order)
    assert narrow.method["name"] == "lora"
    order.finished(narrow.key, outcome())
    (wide,) = starts(order)
    assert wide.method["name"] == "full"
    assert (wide.sweep.workers_per_trial, narrow.sweep.workers_per_trial) == (2, 1)
    order.finished(wide.key, outcome())
    assert len(starts(order)) == 2


def test_an_elastic_trial_takes_what_there_is() -> None:
    sweep = {"workers_per_trial": 4, "min_workers": 2}
    assert len(starts(conductor(Clock(), capacity=Demand(3, 0), **sweep))) == 1
    with pytest.raises(ServiceError, match=r"takes 2 CPUs.*there are 1"):
        conductor(Clock(), capacity=Demand(1, 0), **sweep).next()


def test_what_can_never_fit_is_an_error_that_names_both_sides() -> None:
    with pytest.raises(ServiceError, match=r"takes 4 CPUs and 0 GPUs; .* there are 2 and 0") as caught:
        conductor(Clock(), cpus_per_trial=4).next()
    assert "sweep.cpus_per_trial" in caught.value.mend


def test_finished_work_is_found_and_not_run_again() -> None:
    clock, known = Clock(), {}
    for spec in play(conductor(clock), clock)[:4]:
        known[spec.key] = spec.result("completed")
    again = conductor(clock, find=known.get)
    ran = play(again, clock)
    assert len(ran) == 2
    assert len(again.outcomes) == 6
    assert again.ledger.spent.trials == 2


def test_a_number_of_trials_is_kept_and_the_rest_is_named() -> None:
    clock = Clock()
    order = conductor(clock, budget={"trials": 4})
    assert len(play(order, clock)) == 4
    assert [line.partition(" lr")[0] for line in order.left_out] == ["lora rank=5", "lora rank=6"]


def test_no_trial_starts_that_would_end_after_the_time_is_up() -> None:
    clock = Clock()
    order = conductor(clock, budget={"hours": 0.06})  # 216 s: three waves of 60 s, not four
    ran = play(order, clock)
    assert len(ran) == 6
    clock = Clock()
    order = conductor(clock, budget={"hours": 0.03})  # 108 s: one wave
    ran = play(order, clock)
    assert len(ran) == 2
    assert len(order.left_out) == 4
    assert "over the budget of 0.03" in order.left_out[0]
    assert order.ledger.over is None


def test_money_and_gpu_hours_count_what_runs_now_as_well() -> None:
    clock = Clock()
    sweep = {"gpus_per_trial": 1, "capacity": Demand(8, 2), "prices": {"CPU": 0.5, "GPU": 3.5}}
    order = conductor(clock, budget={"money": 0.41}, **sweep)  # 0.0667 a trial of a minute
    assert len(play(order, clock)) == 6
    assert order.ledger.spent.money == pytest.approx(6 / 60 * 4)
    clock = Clock()
    order = conductor(clock, budget={"gpu_hours": 0.07}, **sweep)  # 4 minutes
    assert len(play(order, clock)) == 4
    assert order.ledger.spent.gpu_hours == pytest.approx(4 / 60)


def test_the_bound_ends_even_what_nobody_could_foresee() -> None:
    clock = Clock()
    order = conductor(clock, budget={"hours": 1})
    starts(order)
    assert order.ledger.over is None
    clock.now = 3600
    assert order.ledger.over == "the sweep's budget of 1 hours is used up"


def test_the_best_are_repeated_with_other_seeds_when_all_are_in() -> None:
    clock = Clock()
    methods = [{"name": "zero_shot"}, LORA]
    order = conductor(clock, methods=methods, finalists={"count": 2, "seeds": 3}, seed=7)
    ran = play(order, clock, quality=lambda spec: spec.method.get("rank", 9) / 10)
    repeats = [(spec.method["rank"], spec.sweep.seed) for spec in ran[7:]]
    assert repeats == [(6, 8), (5, 8), (6, 9), (5, 9)]
    assert len(order.outcomes) == 11
    assert len({spec.key for spec in ran}) == 11


def test_devices_of_a_method_are_part_of_what_a_sweep_is() -> None:
    one = conductor(Clock(), devices={})
    two = conductor(Clock(), devices={"lora": {"workers": 2}})
    first, second = one.next(), two.next()
    assert isinstance(first, TrialSpec)
    assert isinstance(second, TrialSpec)
    assert first.sweep_id != second.sweep_id
    assert first.key != second.key


def test_a_lost_trial_runs_again_before_any_other_and_keeps_its_place_in_the_budget() -> None:
    clock = Clock()
    order = conductor(clock, budget={"trials": 3})
    first, second = starts(order)
    clock.now += 30
    assert order.again(first.model_copy(update={"micro_tokens": 64}))
    again = order.next()
    assert isinstance(again, TrialSpec)
    assert (again.key, again.micro_tokens) == (first.key, 64)
    for spec in (again, second):
        order.finished(spec.key, outcome())
    (third,) = starts(order)
    order.finished(third.key, outcome())
    assert order.next() == "done"
    assert order.ledger.spent.trials == 3
    assert len(order.left_out) == 3


def test_a_lost_trial_is_not_run_again_when_the_sweep_ends() -> None:
    clock = Clock()
    order = conductor(clock, budget={"hours": 1})
    first, second = starts(order)
    clock.now = 3601
    assert not order.again(first)
    order.finished(first.key, outcome(status="failed"))
    order.finished(second.key, outcome())
    assert order.next() == "done"


def test_sweeps_on_one_cluster_share_it_and_each_has_room_for_one_trial() -> None:
    shared = 1
    order = conductor(Clock(), room=lambda: (Demand(4, 0), shared))
    first = starts(order)
    assert len(first) == 4
    shared = 2  # another sweep comes: no trial is ended, but none is started before two are
    order.finished(first[0].key, outcome())
    order.finished(first[1].key, outcome())
    assert order.next() == "wait"
    order.finished(first[2].key, outcome())
    assert len(starts(order)) == 1
    wide = conductor(Clock(), cpus_per_trial=3, room=lambda: (Demand(4, 0), 2))
    assert len(starts(wide)) == 1, "its share is less than one trial takes"


def test_a_sweep_waits_for_a_node_that_is_gone_and_takes_one_that_comes() -> None:
    room = Demand(2, 0)
    order = conductor(Clock(), cpus_per_trial=2, room=lambda: (room, 1))
    (first,) = starts(order)
    room = Demand(1, 0)
    order.finished(first.key, outcome())
    assert order.next() == "wait", "it fitted before, so it may fit again"
    room = Demand(4, 0)
    assert len(starts(order)) == 2


def test_a_budget_counts_over_what_was_spent_before_it_was_cut_short() -> None:
    clock = Clock()
    every = [spec.key for spec in play(conductor(clock), clock)]

    def resumed(budget: BudgetSection, clock: Clock) -> Ledger:
        return Ledger(budget, clock, Spent(2, hours=0.5, gpu_hours=0.0, money=3.0), known=every[:2])

    order = conductor(Clock(), budget={"trials": 3}, ledger=resumed)
    assert len(starts(order)) == 2, "both were started before and count once"
    order.finished(every[0], outcome())
    order.finished(every[1], outcome())
    assert len(starts(order)) == 1
    assert order.ledger.spent.hours == 0.5
    assert order.ledger.spent.money == 3.0
    over = conductor(Clock(), budget={"hours": 0.5}, ledger=resumed)
    assert over.next() == "done"
    assert len(over.left_out) == 6


def test_waiting_for_a_busy_cluster_costs_nothing() -> None:
    clock = Clock()
    order = conductor(clock, prices={"CPU": 60.0}, capacity=Demand(1, 0))
    spec = order.next()
    assert isinstance(spec, TrialSpec)
    clock.now += 600  # others hold what it needs
    order.ledger.runs(spec.key)
    clock.now += 60
    assert order.finished(spec.key, outcome()) == 60
    assert order.ledger.spent.money == pytest.approx(1.0)
    assert order.ledger.took[spec.key] == 660
