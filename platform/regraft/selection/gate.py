"""The gate: a challenger takes the champion's place on evidence alone. Pure functions of records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Literal, NamedTuple

from regraft.records import Comparison, EvalReport, GateCheck, Parity, PromotionDecision, content_hash
from regraft.selection.rank import Bound, holds
from regraft.selection.resampling import paired_comparison

#: How likely an effect is to be found with the number of examples that is advised.
_POWER = 0.8
#: The share of its level that the test uses: real differences are not as even as it takes them to be, and a
#: little more than its own level is promoted of candidates that are no better (`benchmarks/gate.py`).
_USED = 0.9


class Candidate(NamedTuple):
    """Who stands before the gate: a name, scores on the final examples, and all other figures."""

    name: str
    report: EvalReport
    figures: Mapping[str, float] = {}

    def figure(self, name: str) -> float | None:
        """A figure of the final examples, or else of the candidate itself."""
        return (self.report.means | self.report.whole).get(name, self.figures.get(name))


class Trust(NamedTuple):
    """What must be known before a metric may decide: a figure of the whole set, and how high it must be."""

    figure: str
    least: float


class Rules(NamedTuple):
    """What a challenger must show.

    Attributes:
        objective: The metric that decides; higher is better.
        margin: How much may be lost on any one evaluation set, in the metric's unit.
        level: Coverage of the intervals, and how sure a promotion is.
        resamples: Bootstrap samples and random exchanges.
        bounds: Bounds on the challenger's own figures.
        not_worse: By how much a figure may be worse than the incumbent's, and which way is better.
        at_most_times: How many times the champion's a figure may be.
        trust: Of metrics that have to prove themselves first.
    """

    objective: str
    margin: float
    level: float
    resamples: int
    bounds: Sequence[Bound] = ()
    not_worse: Mapping[str, tuple[float, Literal["higher", "lower"]]] = {}
    at_most_times: Mapping[str, float] = {}
    trust: Mapping[str, Trust] = {}


def judge(
    challenger: Candidate,
    champion: Candidate | None,
    control: Candidate | None,
    rules: Rules,
    *,
    parity: Parity | None = None,
) -> PromotionDecision:
    """Judge a challenger against the champion and the untuned control.

    It is promoted if its advantage over each of them, over all final examples together, is significant by a
    paired permutation test at nine tenths of 1 - `level`; on no single evaluation set it loses more than
    `margin` to the incumbent, which is the champion, or the control before there is one; every bound holds;
    and it answers alike however it is run. Both tests must pass, so that of challengers that are no better
    than either at most 1 - `level` are promoted.

    Args:
        challenger: Its scores on the final examples of all evaluation sets, tagged by set.
        champion: The champion on the same examples; None if there is none.
        control: The untuned base on the same examples; None if it is not to be beaten.
        rules: What it must show.
        parity: Whether it answers alike however it is run; None if that was not looked at.

    Raises:
        ValueError: If there is nobody to compare it with, or nothing to compare.
    """
    incumbent = champion or control
    if incumbent is None:
        raise ValueError("there is neither a champion nor a control to judge the challenger against")
    sets = sorted({e.tags["set"] for e in challenger.report.examples if "set" in e.tags})
    overall = [_compare(challenger, other, "all sets", rules) for other in (champion, control) if other]
    each = [_compare(challenger, incumbent, name, rules, of_set=name) for name in sets]
    checks = [*_own_bounds(challenger, rules), *_beside(challenger, incumbent, rules)]
    if champion is not None:  # of the bare base every adapter is slower
        checks += _times(challenger, champion, rules)
    settle = [n for c in overall if (n := _to_settle(c)) is not None]
    outcome: Literal["promote", "reject", "inconclusive"]
    if wrong := _wrong(overall, each, checks, parity, rules):
        outcome, reason = "reject", "; ".join(wrong)
    elif not_known := [*_untrusted(challenger, rules), *(_open(c) for c in overall if not _leads(c))]:
        outcome, reason = "inconclusive", "; ".join(not_known)
    else:
        outcome, reason = "promote", "; ".join(_gain(c) for c in overall)
    return PromotionDecision(
        id=content_hash([challenger.name, incumbent.name, [c.model_dump() for c in (*overall, *each)]]),
        outcome=outcome,
        reason=reason,
        challenger=challenger.name,
        incumbent=incumbent.name,
        evidence=(*overall, *each),
        checks=tuple(checks),
        parity=parity,
        examples_to_settle=max(settle, default=None) if outcome == "inconclusive" else None,
    )


def _compare(
    challenger: Candidate, other: Candidate, split: str, rules: Rules, of_set: str | None = None
) -> Comparison:
    found = paired_comparison(
        challenger.report, other.report, rules.objective,
        split=split, level=rules.level, resamples=rules.resamples, of_set=of_set,
    )  # fmt: skip
    return found.model_copy(update={"against": other.name})


def _leads(comparison: Comparison) -> bool:
    return comparison.p_value <= _USED * (1 - comparison.level)


def _wrong(
    overall: Sequence[Comparison],
    each: Sequence[Comparison],
    checks: Sequence[GateCheck],
    parity: Parity | None,
    rules: Rules,
) -> list[str]:
    """All that speaks against a promotion, in words."""
    found = [
        f"on {c.split} it loses {-c.difference:.3f} {c.metric} to {c.against}, more than the margin of "
        f"{rules.margin:g}"
        for c in each
        if c.difference < -rules.margin
    ]
    found += [
        f"it is worse than {c.against}: {c.difference:+.3f} {c.metric}, at most {c.high:+.3f}"
        for c in overall
        if c.high < 0
    ]
    found += [_say_check(check) for check in checks if not check.ok]
    if parity is not None and not parity.ok:
        ways = ", ".join(name for name, path in parity.paths.items() if not path.ok)
        found.append(f"it does not answer alike however it is run: {ways or 'it was not served'}")
    return found


def _own_bounds(challenger: Candidate, rules: Rules) -> list[GateCheck]:
    """The bounds on its own figures; what was not recorded does not hold."""
    found = []
    for bound in rules.bounds:
        value = challenger.figure(bound.metric)
        rule = f"{bound.sense} {bound.bound:g}"
        found.append(GateCheck(figure=bound.metric, challenger=value, rule=rule, ok=holds(bound, value)))
    return found


def _beside(challenger: Candidate, incumbent: Candidate, rules: Rules) -> list[GateCheck]:
    """The bounds beside the incumbent; what is not known of it binds nobody."""
    found = []
    for name, (margin, better) in rules.not_worse.items():
        mine, theirs = challenger.figure(name), incumbent.figure(name)
        if theirs is None:
            continue
        ok = mine is not None and (mine - theirs if better == "lower" else theirs - mine) <= margin + 1e-12
        rule = f"no more than {margin:g} {'above' if better == 'lower' else 'below'}"
        found.append(_check(name, mine, incumbent.name, theirs, rule, ok))
    return found


def _times(challenger: Candidate, incumbent: Candidate, rules: Rules) -> list[GateCheck]:
    """The figures that may be so many times the champion's."""
    found = []
    for name, times in rules.at_most_times.items():
        mine, theirs = challenger.figure(name), incumbent.figure(name)
        if not theirs:
            continue
        ok = mine is not None and mine <= times * theirs
        found.append(_check(name, mine, incumbent.name, theirs, f"at most {times:g} times", ok))
    return found


def _check(figure: str, mine: float | None, against: str, theirs: float, rule: str, ok: bool) -> GateCheck:
    return GateCheck(figure=figure, challenger=mine, against=against, incumbent=theirs, rule=rule, ok=ok)


def _say_check(check: GateCheck) -> str:
    value = "not recorded" if check.challenger is None else f"{check.challenger:.4g}"
    if check.incumbent is None:
        return f"{check.figure} is {value}, not {check.rule}"
    return f"{check.figure} is {value}, not {check.rule} the {check.incumbent:.4g} of {check.against}"


def _untrusted(challenger: Candidate, rules: Rules) -> list[str]:
    """Why the objective may not decide yet, if it may not."""
    trust = rules.trust.get(rules.objective)
    if trust is None:
        return []
    known = challenger.report.whole.get(trust.figure)
    if known is not None and known >= trust.least:
        return []
    had = "not known" if known is None else f"{known:.2f}"
    return [
        f"{rules.objective} may not decide: its {trust.figure} is {had}, and must be at least {trust.least:g}"
    ]


def _gain(c: Comparison) -> str:
    return (
        f"{c.metric} {c.incumbent_mean:.3f} → {c.challenger_mean:.3f} against {c.against} over {c.examples} "
        f"examples, by {c.low:+.3f} to {c.high:+.3f} at {c.level:.0%} (p = {c.p_value:.2g})"
    )


def _open(c: Comparison) -> str:
    count = _to_settle(c)
    settle = (
        "more examples would hardly make it a win"
        if count is None
        else f"about {count} examples would settle an effect of that size four times in five"
    )
    return (
        f"the advantage of {c.difference:+.3f} {c.metric} over {c.against} lies within noise "
        f"({c.low:+.3f} to {c.high:+.3f}, p = {c.p_value:.2g}); {settle}"
    )


def _to_settle(comparison: Comparison) -> int | None:
    """How many examples an effect of this size would need to be found four times in five; None if it is none.

    Of a normal mean (Lachin, 1981): as many as make the effect as many standard errors as the one-sided level
    and the power ask for together.
    """
    if comparison.difference <= 0 or _leads(comparison):
        return None
    normal = NormalDist()
    error = (comparison.high - comparison.low) / 2 / normal.inv_cdf((1 + comparison.level) / 2)
    wanted = normal.inv_cdf(1 - _USED * (1 - comparison.level)) + normal.inv_cdf(_POWER)
    return math.ceil(comparison.examples * (wanted * error / comparison.difference) ** 2)
