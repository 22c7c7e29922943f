"""The gate: a challenger takes the champion's place on evidence alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

from regraft.records import Comparison, EvalReport, PromotionDecision, content_hash
from regraft.selection.resampling import paired_comparison

#: How likely an effect is to be found with the number of examples that is advised.
_POWER = 0.8
#: The share of its level that the test uses: real differences are not as even as it takes them to be, and a
#: little more than its own level is promoted of candidates that are no better (`benchmarks/gate.py`).
_USED = 0.9


def judge(
    challenger: EvalReport,
    incumbent: EvalReport,
    *,
    challenger_name: str,
    incumbent_name: str,
    objective: str,
    margin: float,
    level: float,
    resamples: int,
) -> PromotionDecision:
    """Judge a challenger against who is there: the champion, or the untuned base before there is one.

    It is promoted if its advantage over all evaluation examples together is significant, by a paired
    permutation test at nine tenths of 1 - `level`, and on no single evaluation set it loses more than
    `margin`. So of challengers that are no better at most 1 - `level` are promoted.

    Args:
        challenger: Its scores on the union of the evaluation sets, tagged by set.
        incumbent: The incumbent's scores on the same examples.
        challenger_name: For the record.
        incumbent_name: For the record.
        objective: The metric that decides; higher is better.
        margin: How much may be lost on any one set, in the metric's unit.
        level: Coverage of the intervals, and how sure a promotion is.
        resamples: Bootstrap samples.
    """

    def compare(split: str, of_set: str | None) -> Comparison:
        return paired_comparison(
            challenger, incumbent, objective, split=split, level=level, resamples=resamples, of_set=of_set
        )

    sets = sorted({e.tags["set"] for e in challenger.examples if "set" in e.tags})
    overall = compare("all sets", None)
    evidence = (overall, *(compare(name, name) for name in sets))
    worse = [c for c in evidence[1:] if c.difference < -margin]
    if worse:
        outcome, reason = (
            "reject",
            "; ".join(
                f"on {c.split} it loses {-c.difference:.3f} {objective}, more than the margin of {margin:g}"
                for c in worse
            ),
        )
    elif overall.p_value <= _USED * (1 - level):
        outcome = "promote"
        reason = (
            f"{objective} {overall.incumbent_mean:.3f} → {overall.challenger_mean:.3f} "
            f"over {overall.examples} examples, by {overall.low:+.3f} to {overall.high:+.3f} at {level:.0%} "
            f"(p = {overall.p_value:.2g})"
        )
    elif overall.high < 0:
        outcome, reason = (
            "reject",
            f"it is worse: {overall.difference:+.3f} {objective}, at most {overall.high:+.3f}",
        )
    else:
        outcome = "inconclusive"
        reason = (
            f"the advantage of {overall.difference:+.3f} {objective} lies within noise "
            f"({overall.low:+.3f} to {overall.high:+.3f}, p = {overall.p_value:.2g}); "
            f"{_examples_to_settle(overall)}"
        )
    return PromotionDecision.model_validate(
        {
            "id": _decision_id(challenger_name, incumbent_name, evidence),
            "outcome": outcome,
            "reason": reason,
            "challenger": challenger_name,
            "incumbent": incumbent_name,
            "evidence": evidence,
        }
    )


def _examples_to_settle(comparison: Comparison) -> str:
    """How many examples an effect of this size would need to be found four times in five.

    Of a normal mean (Lachin, 1981): as many as make the effect as many standard errors as the one-sided level
    and the power ask for together.
    """
    if comparison.difference <= 0:
        return "more examples would hardly make it a win"
    normal = NormalDist()
    error = (comparison.high - comparison.low) / 2 / normal.inv_cdf((1 + comparison.level) / 2)
    wanted = normal.inv_cdf(1 - _USED * (1 - comparison.level)) + normal.inv_cdf(_POWER)
    needed = math.ceil(comparison.examples * (wanted * error / comparison.difference) ** 2)
    return f"about {needed} examples would settle an effect of that size four times in five"


def _decision_id(challenger: str, incumbent: str, evidence: Sequence[Comparison]) -> str:
    return content_hash([challenger, incumbent, [c.model_dump() for c in evidence]])
