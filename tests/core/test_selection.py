from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from regraft.config import Constraint
from regraft.records import Cost, EvalReport, ExampleScore, Leaderboard, PromotionDecision, Speed, TrialResult
from regraft.selection.gate import Candidate, Rules, judge
from regraft.selection.rank import rank
from regraft.selection.resampling import mean_interval, paired_comparison, sign_flip_p_value


def report(scores: Sequence[float], sets: Sequence[str] = (), version: int = 1, first: int = 0) -> EvalReport:
    examples = tuple(
        ExampleScore(
            example_id=f"e{first + i}",
            prompt="p",
            reference="r",
            output="o",
            scores={"rougeL": s},
            tags={"set": sets[i]} if sets else {},
        )
        for i, s in enumerate(scores)
    )
    return EvalReport(
        dataset_id="d", split="evaluation", metric_versions={"rouge": version}, examples=examples
    )


def trial(key: str, quality: float | None = None, **changes: Any) -> TrialResult:
    settings: dict[str, Any] = {
        "seconds": 10.0, "memory": 1.0, "latency": 100.0, "status": "completed", "reason": "", "method": "lora",
    } | changes  # fmt: skip
    return TrialResult(
        key=key,
        sweep_id="s",
        run_id=f"run-{key}",
        label=key,
        method={"name": settings["method"]},
        base_model="b",
        base_revision="v",
        dataset_id="d",
        status=settings["status"],
        reason=settings["reason"],
        cost=Cost(train_seconds=settings["seconds"], memory_peak_gib=settings["memory"]),
        speed=Speed(
            latency_p50_ms=1,
            latency_p95_ms=settings["latency"],
            first_token_p50_ms=1,
            tokens_per_second=1,
            how="",
        ),
        report=None if quality is None else report([quality, quality]),
    )


def board(*trials: TrialResult, constraints: Sequence[str] = ()) -> Leaderboard:
    bounds = []
    for text in constraints:
        metric, sense, bound = text.split()
        bounds.append(Constraint.model_validate({"metric": metric, "sense": sense, "bound": bound}))
    return rank(
        trials, sweep_id="s", objective="rougeL", constraints=bounds, tie_break="train_seconds",
        level=0.95, resamples=200,
    )  # fmt: skip


def row(found: Leaderboard, key: str) -> Any:
    return next(r for r in found.rows if r.key == key)


def test_trials_stand_in_order_of_the_objective_and_the_best_wins() -> None:
    found = board(trial("b", 0.5), trial("a", 0.7), trial("c", 0.3))
    assert [(r.rank, r.key) for r in found.rows] == [(1, "a"), (2, "b"), (3, "c")]
    assert found.winner_key == "a"
    assert "0.700" in found.winner_reason


def test_among_equals_the_one_that_trained_fastest_wins() -> None:
    assert board(trial("slow", 0.5, seconds=20), trial("fast", 0.5, seconds=5)).winner_key == "fast"


def test_control_is_ranked_first_where_it_is_best_but_never_wins() -> None:
    controls = trial("base", 0.2, method="zero_shot"), trial("prompted", 0.6, method="few_shot")
    found = board(trial("tuned", 0.4), *controls)
    assert [r.key for r in found.rows] == ["prompted", "tuned", "base"]
    assert row(found, "prompted").is_control
    assert row(found, "base").is_control
    assert found.winner_key == "tuned"
    assert "the control prompted scores 0.600" in found.winner_reason


def test_pareto_front_is_what_no_other_beats_in_everything() -> None:
    found = board(
        trial("best", 0.8, seconds=50, memory=4, latency=100),
        trial("cheap", 0.5, seconds=5, memory=1, latency=100),
        trial("twin", 0.5, seconds=5, memory=1, latency=100),
        trial("quick", 0.4, seconds=60, memory=5, latency=50),
        trial("beaten", 0.5, seconds=6, memory=1, latency=100),
        trial("failed", None, status="failed", seconds=0, memory=0, latency=0),
    )
    assert {r.key for r in found.rows if r.on_pareto_front} == {"best", "cheap", "twin", "quick"}


def test_best_that_meets_every_constraint_wins_and_the_others_say_what_they_broke() -> None:
    found = board(
        trial("heavy", 0.9, memory=8),
        trial("slow", 0.8, latency=500),
        trial("fits", 0.5),
        trial("fits-too", 0.4),
        constraints=["memory_peak_gib <= 6", "latency_p95_ms <= 200", "rougeL >= 0.1"],
    )
    assert found.winner_key == "fits"
    assert [r.key for r in found.rows if r.meets_constraints] == ["fits", "fits-too"]
    assert row(found, "heavy").reason == "memory_peak_gib is 8, not <= 6"
    assert row(found, "slow").reason == "latency_p95_ms is 500, not <= 200"


def test_value_at_the_bound_meets_the_constraint() -> None:
    assert board(trial("a", 0.5, memory=6), constraints=["memory_peak_gib <= 6"]).winner_key == "a"
    assert board(trial("a", 0.5), constraints=["rougeL >= 0.5"]).winner_key == "a"


def test_figure_that_was_not_recorded_meets_no_constraint() -> None:
    found = board(trial("a", 0.5), constraints=["judge >= 0"])
    assert found.winner_key is None
    assert "judge was not measured" in row(found, "a").reason


def test_trials_without_a_result_are_kept_with_their_reason_below_the_ranked() -> None:
    found = board(
        trial("failed", None, status="failed", reason="ValueError: x"),
        trial("infeasible", None, status="infeasible", reason="memory"),
        trial("stopped", 0.99, status="stopped", reason="stopped early"),
        trial("done", 0.1),
    )
    assert [(r.rank, r.key, r.reason) for r in found.rows] == [
        (1, "done", ""),
        (None, "failed", "ValueError: x"),
        (None, "infeasible", "memory"),
        (None, "stopped", "stopped early"),
    ]
    assert found.winner_key == "done"


@pytest.mark.parametrize(
    "trials", [(), (trial("f", None, status="failed"),), (trial("c", 0.5, method="zero_shot"),)]
)
def test_no_winner_where_nothing_was_trained_to_the_end(trials: tuple[TrialResult, ...]) -> None:
    found = board(*trials)
    assert found.winner_key is None
    assert found.winner_reason == "no trained candidate completed and met every constraint"


def noisy(mean: float, count: int, seed: int, spread: float = 0.3) -> list[float]:
    draw = random.Random(seed)
    return [mean + draw.uniform(-spread, spread) for _ in range(count)]


def verdict(challenger: EvalReport, incumbent: EvalReport, margin: float = 0.02) -> PromotionDecision:
    rules = Rules("rougeL", margin, 0.95, 1000)
    return judge(Candidate("support/2", challenger), Candidate("support/1", incumbent), None, rules)


def test_challenger_that_is_clearly_better_is_promoted() -> None:
    decision = verdict(report(noisy(0.6, 80, 1)), report(noisy(0.4, 80, 2)))
    assert decision.outcome == "promote"
    overall = decision.evidence[0]
    assert 0 < overall.low < overall.difference < overall.high
    assert overall.p_value < 0.05
    assert (decision.challenger, decision.incumbent) == ("support/2", "support/1")


def test_champion_stays_when_challenger_is_clearly_worse() -> None:
    decision = verdict(report(noisy(0.4, 80, 1)), report(noisy(0.6, 80, 2)))
    assert decision.outcome == "reject"
    assert "worse" in decision.reason


def test_champion_stays_when_challenger_is_within_noise() -> None:
    before = noisy(0.5, 40, 1)
    decision = verdict(
        report([b + d for b, d in zip(before, noisy(0.02, 40, 2), strict=True)]), report(before)
    )
    assert decision.outcome == "inconclusive"
    assert decision.evidence[0].low < 0 < decision.evidence[0].high
    assert "examples would settle" in decision.reason


def test_champion_stays_when_challenger_is_the_same() -> None:
    same = report(noisy(0.5, 30, 1))
    assert verdict(same, same).outcome == "inconclusive"


def test_loss_beyond_the_margin_on_one_set_rejects_though_all_together_is_better() -> None:
    sets = ["evaluation"] * 40 + ["storm"] * 40
    before = noisy(0.5, 80, 1, spread=0.05)
    after = [b + (-0.05 if s == "evaluation" else 0.3) for b, s in zip(before, sets, strict=True)]
    decision = verdict(report(after, sets), report(before, sets))
    assert decision.evidence[0].low > 0
    assert decision.outcome == "reject"
    assert decision.reason.startswith("on evaluation it loses 0.050")
    assert [(c.split, c.examples) for c in decision.evidence] == [
        ("all sets", 80),
        ("evaluation", 40),
        ("storm", 40),
    ]
    assert verdict(report(after, sets), report(before, sets), margin=0.1).outcome == "promote"


def test_scores_of_different_metric_versions_are_refused() -> None:
    with pytest.raises(ValueError, match="metric versions differ"):
        verdict(report([0.5], version=2), report([0.5], version=1))


def test_only_examples_that_both_answered_are_compared() -> None:
    challenger = report([1.0, 1.0, 0.2, 0.4], first=0)
    incumbent = report([0.1, 0.1, 9.0], first=2)
    shared = paired_comparison(challenger, incumbent, "rougeL", split="all", level=0.95, resamples=200)
    assert shared.examples == 2
    assert shared.challenger_mean == pytest.approx(0.3)
    assert shared.incumbent_mean == pytest.approx(0.1)
    failed = challenger.examples[2].model_copy(update={"scores": {}, "failures": {"rougeL": "x"}})
    without = challenger.model_copy(
        update={"examples": (*challenger.examples[:2], failed, challenger.examples[3])}
    )
    one = paired_comparison(without, incumbent, "rougeL", split="all", level=0.95, resamples=200)
    assert one.examples == 1
    with pytest.raises(ValueError, match="no example"):
        paired_comparison(
            challenger, report([1.0], first=9), "rougeL", split="all", level=0.95, resamples=200
        )


def test_comparison_is_paired_and_finds_a_small_steady_advantage_under_large_spread() -> None:
    before = noisy(0.5, 40, 1, spread=0.5)
    after = [b + d for b, d in zip(before, noisy(0.03, 40, 2, spread=0.01), strict=True)]
    assert verdict(report(after), report(before)).outcome == "promote"
    assert mean_interval(after, level=0.95, resamples=1000).low < sum(before) / 40  # unpaired, it could not


def test_same_records_give_the_same_decision() -> None:
    challenger, incumbent = report(noisy(0.5, 30, 1)), report(noisy(0.45, 30, 2))
    assert verdict(challenger, incumbent) == verdict(challenger, incumbent)
    assert verdict(challenger, incumbent).id != verdict(incumbent, challenger).id


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        found = mean_interval(noisy(0.5, 60, seed), level=0.9, resamples=400)
        covered += found.low <= 0.5 <= found.high
    assert 165 <= covered <= 195  # 180 expected, ± 3.5 standard deviations


def test_a_method_repeated_over_seeds_is_one_row_judged_by_their_mean() -> None:
    lucky, steady = trial("lucky", 0.9), trial("steady", 0.7)
    repeats = [
        trial(f"lucky-{seed}", 0.3).model_copy(update={"repeat_of": "lucky", "seed": seed}) for seed in (1, 2)
    ]
    found = board(lucky, steady, *repeats)
    assert [(row.key, row.rank) for row in found.rows] == [("steady", 1), ("lucky", 2)]
    assert found.winner_key == "steady"
    row = found.rows[1]
    assert row.seeds == pytest.approx((0.9, 0.3, 0.3))
    assert row.quality is not None
    assert row.quality.mean == pytest.approx(0.5)
    assert row.run_id == "run-lucky"


def test_a_repeat_that_failed_is_shown_and_does_not_count() -> None:
    failed = trial("again", status="failed", reason="died").model_copy(
        update={"repeat_of": "first", "seed": 1}
    )
    found = board(trial("first", 0.9), failed)
    assert [(row.key, row.rank, row.reason) for row in found.rows] == [
        ("first", 1, ""),
        ("again", None, "died"),
    ]
    assert found.rows[0].seeds == ()


def test_the_p_value_of_few_examples_is_counted_out() -> None:
    # Of the eight ways to turn three signs, one has a sum as high as all three ahead, and four of them a sum
    # of at least that of two ahead and one behind.
    all_ahead = sign_flip_p_value(np.array([0.2, 0.2, 0.2]), 20000)
    assert all_ahead == pytest.approx(1 / 8, abs=0.01)
    assert sign_flip_p_value(np.array([0.2, 0.2, -0.2]), 20000) == pytest.approx(4 / 8, abs=0.01)
    assert sign_flip_p_value(np.zeros(5), 100) == 1.0


def test_hardly_more_are_promoted_without_a_difference_than_the_level_allows_even_of_few_examples() -> None:
    rng = random.Random(3)
    promoted = 0
    for _ in range(200):
        # Mostly no difference, now and then a large one: what a bootstrap of few examples takes for evidence.
        before = [0.5] * 12
        after = [b + (rng.choice((-0.4, 0.4)) if rng.random() < 0.4 else 0.0) for b in before]
        promoted += verdict(report(after), report(before)).outcome == "promote"
    assert promoted <= 200 * 0.05 + 3.5 * (200 * 0.05 * 0.95) ** 0.5


def test_the_advised_number_of_examples_finds_the_effect_most_of_the_time() -> None:
    rng = random.Random(5)
    # Differences of 0.03 on average, with a standard deviation of 0.2: (1.695 + 0.842) * 0.2 / 0.03, squared.
    few = [0.03 + 0.2 * z for z in (-1.0, 1.0) * 30]
    decision = verdict(report([0.5 + d for d in few]), report([0.5] * 60))
    assert decision.outcome == "inconclusive"
    needed = int(decision.reason.split("about ")[1].split()[0])
    assert 286 * 0.9 < needed < 286 * 1.1
    found = 0
    for _ in range(60):
        challenger = report([0.5 + rng.gauss(0.03, 0.2) for _ in range(needed)])
        found += verdict(challenger, report([0.5] * needed)).outcome == "promote"
    assert 36 <= found <= 58  # 48 expected, with an error of 3.1
