"""The calibrated detector: one exact p-value over what is asked, what is answered, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from monitoring.descriptors import describe_sides, in_words
from monitoring.detectors import permutation as perm
from monitoring.detectors.base import Detection, Detector, NovelExchange, Term
from monitoring.detectors.text import Floats, grown_terms, similarities
from monitoring.windows import Row
from regraft.records import TestResult

_WORDS = {
    "novelty": "exchanges are unlike the reference's",
    "prompt topics": "the prompts are about other things",
    "answer topics": "the answers say other things",
    "form": "prompts or answers are written in another form",
}
#: So many labellings are looked at at once.
_LABELLINGS = 256


class Omnibus(Detector):
    """A permutation test over groups of statistics: novelty, topics of prompts and of answers, form.

    The effect is the larger of two shares of the window's exchanges, each minus what chance alone gives
    (the median over the permutations): answers beyond the reference's own 95th percentile of novelty, and
    prompts that the reference cannot account for at any threshold. A percentile of prompts alone misses a
    storm that a tuned model answers in its usual words: short prompts share few words with each other, so
    few of them pass a 95th percentile even where all topics are new (measured: 0.12 of the window, against
    0.94 for answers that say new things).
    """

    effect_unit: ClassVar[str] = "share of the window's exchanges that the reference does not account for"

    name: Literal["omnibus"] = "omnibus"
    permutations: int = Field(4_999, ge=199, description="Random labellings; the smallest p is 1/(this + 1).")
    ridge: float = Field(3.0, gt=0, description="Strength of the penalty in the novelty score.")
    tail: float = Field(
        0.95, gt=0.5, lt=1, description="The reference's own percentile that answers must pass."
    )
    examples: int = Field(8, ge=1, description="Exchanges and terms to show.")
    seed: int = 0

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """See `Detector.detect`. Both sides need at least two rows."""
        rows = [*reference, *window]
        labels = perm.labellings(len(reference), len(window), self.permutations, self.seed)
        prompts = similarities([row.prompt for row in rows])
        answers = similarities([row.output for row in rows])
        score = {
            "prompts": perm.novelty(prompts, labels, self.ridge),
            "answers": perm.novelty(answers, labels, self.ridge),
            "exchanges": perm.novelty((prompts + answers) / 2, labels, self.ridge),
        }
        form = describe_sides([row.prompt for row in rows], [row.output for row in rows])
        # A column that never varies tells nothing; leaving it out depends on the pooled rows alone.
        form = form.loc[:, form.nunique() > 1]
        form_statistics = [perm.kolmogorov_smirnov(form[c].to_numpy(dtype=np.float64), labels) for c in form]
        groups = {
            "novelty": np.stack([perm.mean_difference(values, labels) for values in score.values()]),
            "prompt topics": perm.kernel_discrepancy(_kernel(prompts), labels)[None],
            "answer topics": perm.kernel_discrepancy(_kernel(answers), labels)[None],
        }
        if form_statistics:
            groups["form"] = np.stack(form_statistics)
        joint, adjusted = perm.joint_p(groups)
        effects = {
            "prompts": _above_chance(perm.excess(score["prompts"], labels)),
            "answers": _above_chance(_beyond(score["answers"], labels, self.tail)),
        }
        terms = grown_terms(
            [f"{row.prompt}\n{row.output}" for row in reference],
            [f"{row.prompt}\n{row.output}" for row in window],
            self.examples,
        )
        return Detection(
            p_value=joint,
            effect=max(effects.values()),
            tests=tuple(self._results(groups, adjusted, effects)),
            drivers=tuple(_drivers(adjusted, form, form_statistics, len(reference), terms)),
            novel=self._most_novel(window, score["exchanges"][len(reference) :, 0]),
            terms=terms,
            share=len(window) / len(reference),
        )

    def _results(
        self, groups: dict[str, Floats], adjusted: dict[str, float], effects: dict[str, float]
    ) -> list[TestResult]:
        details = {
            "novelty": f"effect: the larger of {effects['prompts']:.2f} of prompts that the reference does "
            f"not account for and {effects['answers']:.2f} of answers beyond its {self.tail:.0%} point, both "
            "above chance",
            "prompt topics": "effect: squared kernel discrepancy of the prompts",
            "answer topics": "effect: squared kernel discrepancy of the answers",
            "form": "effect: the largest Kolmogorov-Smirnov distance over the descriptors",
        }
        return [
            TestResult(
                name=name,
                p_value=adjusted[name],
                effect=max(effects.values()) if name == "novelty" else float(rows[:, 0].max()),
                detail=details[name],
            )
            for name, rows in groups.items()
        ]

    def _most_novel(self, window: Sequence[Row], scores: Floats) -> tuple[NovelExchange, ...]:
        order = np.argsort(-scores, kind="stable")[: self.examples]
        return tuple(NovelExchange(row=window[i], score=float(scores[i])) for i in order)


def _kernel(similarity: Floats) -> Floats:
    return perm.gaussian(perm.squared_distances(similarity))


def _beyond(scores: Floats, labels: perm.Labels, tail: float) -> Floats:
    """Share of the window beyond the reference's own percentile, for every labelling."""
    found = []
    # Few labellings at a time: the values of all of them would be as large again as the scores.
    for start in range(0, labels.shape[1], _LABELLINGS):
        some = slice(start, start + _LABELLINGS)
        taken, values = labels[:, some].T, scores[:, some].T
        limits = np.quantile(values[~taken].reshape(len(taken), -1), tail, axis=1)
        found.append((values[taken].reshape(len(taken), -1) > limits[:, None]).mean(axis=1))
    return np.concatenate(found)


def _above_chance(statistic: Floats) -> float:
    """The real labelling's share minus the median over the permutations, which is what chance gives."""
    return float(statistic[0] - np.median(statistic[1:]))


def _drivers(
    adjusted: dict[str, float],
    form: pd.DataFrame,
    form_statistics: list[Floats],
    reference: int,
    terms: tuple[Term, ...],
) -> list[str]:
    """What changed, strongest first; only what is significant by itself at 5 % after adjustment."""
    found = []
    for name, p in sorted(adjusted.items(), key=lambda item: item[1]):
        if p >= 0.05:
            continue
        found.append(f"{_WORDS[name]} (adjusted p {p:.3f})")
        if name == "form":
            singles = [float(perm.p_values(values)[0]) for values in form_statistics]
            # Rates of empty answers and refusals say more than the averages that they drag along.
            rate = [str(column).endswith(("_empty", "_refusal")) for column in form]
            order = sorted(
                range(len(singles)), key=lambda i: (singles[i], not rate[i], -float(form_statistics[i][0]))
            )
            for i in [i for i in order[:3] if singles[i] < 0.05]:
                before, now = form.iloc[:reference, i].mean(), form.iloc[reference:, i].mean()
                found.append(
                    f"{in_words(str(form.columns[i]))}: {before:.3g} on average before, {now:.3g} now"
                )
    if found and terms:
        grown = ", ".join(f"{t.text} ({t.reference_share:.0%} to {t.window_share:.0%})" for t in terms[:5])
        found.append(f"terms that grew: {grown}")
    return found
