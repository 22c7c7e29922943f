from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from regraft.config import Constraint
from regraft.records import (
    Cost,
    EvalReport,
    Example,
    ExampleScore,
    Leaderboard,
    Message,
    Parity,
    PathParity,
    PromotionDecision,
    Speed,
    TrialResult,
)
from regraft.selection.gate import Candidate, Rules, Trust, judge
from regraft.selection.rank import rank
from regraft.selection.resampling import (
    mean_interval,
    optimism,
    paired_comparison,
    sign_flip_p_value,
    step_down_p_values,
)
from regraft.selection.split import final_part, is_final, selection_part


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


def test_within_one_standard_error_of_the_best_the_cheapest_wins_and_no_further() -> None:
    draw = random.Random(5)
    best = [draw.random() for _ in range(40)]

    def off(key: str, by: float, seconds: float) -> TrialResult:
        """A candidate below the best by so many standard errors of their paired difference."""
        noise = [draw.gauss(0, 0.1) for _ in best]
        error = statistics.stdev(noise) / len(noise) ** 0.5
        shift = by * error + statistics.fmean(noise)
        scores = [b + n - shift for b, n in zip(best, noise, strict=True)]
        return trial(key, 0.0, seconds=seconds).model_copy(update={"report": report(scores)})

    first = trial("best", 0.0, seconds=50).model_copy(update={"report": report(best)})
    near, far, dear = off("near", 0.9, 5), off("far", 1.1, 1), off("dear", 0.1, 60)
    found = board(first, near, far, dear)
    assert found.winner_key == "near"
    assert "within one standard error of the highest rougeL" in found.winner_reason
    assert "cheapest by train_seconds (5 against 50)" in found.winner_reason
    assert board(first, far, dear).winner_key == "best"
    best_only = rank(
        [first, near], sweep_id="s", objective="rougeL", constraints=(), tie_break=None, level=0.95, resamples=200
    )  # fmt: skip
    assert best_only.winner_key == "best"


def test_the_luck_of_the_best_of_many_is_estimated_about_right() -> None:
    """Candidates that are all alike: whoever leads owes all of its lead to luck."""
    rng = np.random.default_rng(3)
    leads, estimates = [], []
    for _ in range(40):
        scores = rng.normal(0.5, 0.2, size=(12, 60))
        leads.append(scores.mean(axis=1).max() - 0.5)
        estimates.append(optimism(scores, 300))
    assert 0.7 * np.mean(leads) < np.mean(estimates) < 1.4 * np.mean(leads)
    assert abs(optimism(scores[:1], 300)) < 0.01


def test_corrected_p_values_keep_the_chance_of_any_wrong_claim() -> None:
    rng = np.random.default_rng(4)
    nothing = [step_down_p_values(rng.normal(0, 1, size=(10, 40)), 400) for _ in range(200)]
    assert np.mean([p.min() <= 0.05 for p in nothing]) < 0.1  # uncorrected it would be 0.4
    real = rng.normal(0, 1, size=(10, 40))
    real[3] += 1.0
    found = step_down_p_values(real, 1000)
    assert found.argmin() == 3
    assert found[3] < 0.01
    one = rng.normal(0.2, 1, size=(1, 40))
    assert step_down_p_values(one, 2000)[0] == pytest.approx(sign_flip_p_value(one[0], 2000), abs=0.02)
    # Copies of one candidate are exchanged together: they cost nothing.
    assert step_down_p_values(np.repeat(one, 20, axis=0), 2000)[0] == pytest.approx(
        step_down_p_values(one, 2000)[0], abs=0.01
    )


def test_the_leads_of_all_candidates_on_the_control_are_corrected_together() -> None:
    control = trial("base", 0.0, method="zero_shot").model_copy(update={"report": report(noisy(0.3, 40, 1))})
    good = trial("good", 0.0).model_copy(update={"report": report(noisy(0.6, 40, 2))})
    alike = [s + (0.05 if i % 2 else -0.05) for i, s in enumerate(noisy(0.3, 40, 1))]
    same = trial("same", 0.0).model_copy(update={"report": report(alike)})
    found = board(control, good, same)
    assert row(found, "good").p_control < 0.01
    assert row(found, "same").p_control > 0.1
    assert row(found, "base").p_control is None


def test_parts_follow_from_the_id_alone_and_share_no_example() -> None:
    turns = (Message(role="user", content="q"), Message(role="assistant", content="a"))
    examples = [Example(id=f"e{i}", messages=turns) for i in range(1000)]
    chosen_by, judged_by = selection_part(examples, 0.4), final_part(examples, 0.4)
    assert len(chosen_by) + len(judged_by) == 1000
    assert not {e.id for e in chosen_by} & {e.id for e in judged_by}
    assert 350 < len(judged_by) < 450
    assert all(is_final(e.id, 0.6) for e in judged_by)  # a larger share takes more, and gives none back
    assert selection_part(examples, 0) == final_part(examples, 0) == tuple(examples)


def gated(**changes: Any) -> PromotionDecision:
    """The gate's word on a challenger that is clearly better than champion and control, less what is changed."""
    rules = Rules("rougeL", 0.02, 0.95, 1000, **changes.pop("rules", {}))
    mine = changes.pop("challenger", Candidate("new", report(noisy(0.7, 60, 1)), changes.pop("figures", {})))
    champion = changes.pop("champion", Candidate("old", report(noisy(0.5, 60, 2)), changes.pop("before", {})))
    control = changes.pop("control", Candidate("base", report(noisy(0.3, 60, 3))))
    return judge(mine, champion, control, rules, **changes)


def test_a_challenger_has_to_beat_the_control_too() -> None:
    assert gated().outcome == "promote"
    assert [c.against for c in gated().evidence] == ["old", "base"]
    prompted = Candidate("few_shot", report(noisy(0.9, 60, 4)))
    decision = gated(control=prompted)
    assert decision.outcome == "reject"
    assert "worse than few_shot" in decision.reason
    near = Candidate("few_shot", report([s - 0.01 for s in noisy(0.7, 60, 5)]))
    decision = gated(control=near)
    assert decision.outcome == "inconclusive"
    assert "over few_shot lies within noise" in decision.reason
    assert gated(control=None).outcome == "promote"
    first = gated(champion=None)
    assert (first.outcome, first.incumbent) == ("promote", "base")
    with pytest.raises(ValueError, match="neither a champion nor a control"):
        gated(champion=None, control=None)


def bound(metric: str, sense: str, value: float) -> Constraint:
    return Constraint.model_validate({"metric": metric, "sense": sense, "bound": value})


def test_bounds_reject_whatever_the_objective_says() -> None:
    bounds = {"bounds": (bound("latency_p95_ms", "<=", 100), bound("forgetting", "<=", 1))}
    assert gated(rules=bounds, figures={"latency_p95_ms": 100.0, "forgetting": 0.2}).outcome == "promote"
    decision = gated(rules=bounds, figures={"latency_p95_ms": 101.0})
    assert decision.outcome == "reject"
    assert decision.reason == "latency_p95_ms is 101, not <= 100; forgetting is not recorded, not <= 1"
    assert [(c.figure, c.ok) for c in decision.checks] == [("latency_p95_ms", False), ("forgetting", False)]


def test_safety_may_not_get_worse_than_the_incumbents_beyond_its_margin() -> None:
    rules = {"not_worse": {"pii": (0.02, "lower"), "label_macro_f1": (0.1, "higher")}}
    before = {"pii": 0.01, "label_macro_f1": 0.8}
    assert (
        gated(rules=rules, before=before, figures={"pii": 0.03, "label_macro_f1": 0.7}).outcome == "promote"
    )
    decision = gated(rules=rules, before=before, figures={"pii": 0.04, "label_macro_f1": 0.9})
    assert decision.outcome == "reject"
    assert decision.reason == "pii is 0.04, not no more than 0.02 above the 0.01 of old"
    assert (
        "label_macro_f1"
        in gated(rules=rules, before=before, figures={"pii": 0.0, "label_macro_f1": 0.6}).reason
    )
    # What nobody knows of the incumbent binds nobody; what is known of it has to be known of the challenger.
    assert gated(rules=rules, figures={"pii": 1.0}).outcome == "promote"
    assert gated(rules=rules, before=before, figures={"label_macro_f1": 0.9}).outcome == "reject"


def test_a_figure_may_be_so_many_times_the_incumbents() -> None:
    rules, before = {"at_most_times": {"token_p50_ms": 1.5}}, {"token_p50_ms": 10.0}
    assert gated(rules=rules, before=before, figures={"token_p50_ms": 15.0}).outcome == "promote"
    decision = gated(rules=rules, before=before, figures={"token_p50_ms": 15.1})
    assert decision.outcome == "reject"
    assert "token_p50_ms is 15.1, not at most 1.5 times the 10 of old" in decision.reason
    # Every adapter is slower than the bare base: without a champion there is nothing to hold it against.
    alone = gated(
        rules=rules, champion=None, figures={"token_p50_ms": 99.0},
        control=Candidate("base", report(noisy(0.3, 60, 3)), before),
    )  # fmt: skip
    assert alone.outcome == "promote"


@pytest.mark.parametrize(
    ("known", "outcome"),
    [({}, "inconclusive"), ({"agrees": 0.4}, "inconclusive"), ({"agrees": 0.6}, "promote")],
)
def test_a_metric_that_has_to_prove_itself_does_not_decide_before(
    known: dict[str, float], outcome: str
) -> None:
    mine = report(noisy(0.7, 60, 1)).model_copy(update={"whole": known})
    decision = gated(challenger=Candidate("new", mine), rules={"trust": {"rougeL": Trust("agrees", 0.5)}})
    assert decision.outcome == outcome
    if outcome == "inconclusive":
        assert "rougeL may not decide: its agrees is" in decision.reason


def test_what_does_not_answer_alike_however_it_is_run_is_rejected() -> None:
    same = PathParity(prompts=4, equal=3, ties=1, largest_gap=0.001, tolerance=0.01)
    other = PathParity(prompts=4, equal=3, ties=0, largest_gap=2.0, tolerance=0.01)
    assert gated(parity=Parity(version="new", paths={"served": same})).outcome == "promote"
    decision = gated(parity=Parity(version="new", paths={"served": same, "merged": other}))
    assert decision.outcome == "reject"
    assert "does not answer alike however it is run: merged" in decision.reason
    assert gated(parity=Parity(version="new", paths={"merged": same})).outcome == "reject"


def test_an_open_decision_says_how_many_examples_would_settle_it() -> None:
    before = noisy(0.5, 40, 1)
    after = [b + d for b, d in zip(before, noisy(0.03, 40, 8), strict=True)]
    decision = gated(
        challenger=Candidate("new", report(after)), champion=Candidate("old", report(before)), control=None
    )
    assert decision.outcome == "inconclusive"
    assert decision.examples_to_settle is not None
    assert decision.examples_to_settle > 40
    assert f"about {decision.examples_to_settle} examples" in decision.reason
