"""The classifier two-sample test: can a classifier tell the window's exchanges from the reference's?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from monitoring.detectors import permutation as perm
from monitoring.detectors.base import Detection
from monitoring.detectors.embedded import Embedded, fresh
from monitoring.detectors.frozen import by_session, flat, in_order
from monitoring.detectors.text import grown_terms
from monitoring.windows import Row, sessions_in
from regraft.records import TestResult

Floats = perm.Floats
#: Scores that differ by less than this are the same: vectors of a text are equal only up to rounding.
_DIGITS = 3


class Halves(NamedTuple):
    """The rows of one side by what they are for, no session in both, each half in hash order."""

    fitted: list[Row]
    held_out: list[Row]


class DomainClassifier(Embedded):
    """A logistic regression told from chance: fitted on half of the sessions, scored on the other half.

    Lopez-Paz and Oquab (2017), with the area under the ROC curve (AUC) in place of the accuracy. The held-out
    sessions of both sides are exchangeable if nothing changed, whatever was fitted on the others, and they
    are permuted whole, so the p-value is exact given the fit; the smallest is 1/(permutations + 1).

    The effect is 2 (AUC - 0.5), at least 0. Where a share of the window is unlike the reference and the rest
    is not, it is expected to be at most that share.

    It finds any shift of meaning that a plane through the embeddings can show, remixed topics included, and
    it needs more data than `calibrated`, of which it spends half on the fit. It is blind to form. Measured on
    CLINC150 (a reference of 1,000 sessions, new topics from two domains left out, 80 windows each): of
    windows with 10 % new topics p <= 0.05 found 39 % at 200 sessions (`calibrated` 71 %) and 49 % at 500
    (85 %); with 20 % it found 60 % at 100 and 85 % at 200. A penalty of 0.1 or 10 made no clear difference.
    Of 1,778 ordinary windows 6.2 % had p <= 0.05.
    """

    effect_unit: ClassVar[str] = "share of the window that a classifier tells from the reference"

    name: Literal["domain_classifier"] = "domain_classifier"
    penalty: float = Field(1.0, gt=0, description="Strength of the squared penalty on the weights.")
    min_window: int = Field(200, ge=10, description="Sessions of the window below which nothing is told.")

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """See `Detector.detect`; the order of the rows is of no account.

        `novel` are held-out exchanges of the window: those of the fit look like the window by having made it.

        Raises:
            DataError: If there are fewer sessions than `min_reference` or `min_window`.
            ModelError: If the embedding model cannot be had.
        """
        self._refuse_little(reference, window)
        now = fresh(reference, window)
        before_half, now_half = halves(reference), halves(now)
        fitted = [*before_half.fitted, *now_half.fitted]
        held_out = [*before_half.held_out, *now_half.held_out]
        places = self.embed([self.text(row) for row in (*fitted, *held_out)]).astype(np.float64)
        of_window = np.arange(len(fitted)) >= len(before_half.fitted)
        scores = _scores(places[: len(fitted)], of_window, places[len(fitted) :], self.penalty)
        parts = self._labels(before_half.held_out, now_half.held_out, self.permutations)
        areas = np.concatenate([areas_under_curve(scores, labels) for labels in parts])
        area, p_value = float(areas[0]), float(perm.p_values(areas)[0])
        effect = max(0.0, 2 * (area - 0.5))
        told = f"AUC {area:.3f} on {len(held_out)} held-out exchanges"
        texts = [[self.text(row) for row in rows] for rows in (in_order(reference), in_order(now))]
        return Detection(
            p_value=p_value,
            effect=effect,
            tests=(
                TestResult(
                    name="classifier", p_value=p_value, effect=effect, detail=f"effect: 2 (AUC - 0.5); {told}"
                ),
            ),
            drivers=(f"a classifier tells {self.side} from the reference's ({told}, p {p_value:.3f})",)
            if p_value < 0.05
            else (),
            novel=self._most_novel(now_half.held_out, scores[len(before_half.held_out) :]),
            terms=grown_terms(texts[0], texts[1], self.examples),
            share=sessions_in(now_half.held_out) / sessions_in(before_half.held_out),
        )


def halves(rows: Sequence[Row]) -> Halves:
    """Split one side's rows by the hash of their session: whole sessions, whatever the order given."""
    sessions = by_session(rows)
    half = len(sessions) // 2
    return Halves(flat(sessions[:half]), flat(sessions[half:]))


def areas_under_curve(scores: Floats, labels: perm.Labels) -> Floats:
    """Area under the ROC curve for every labelling: how often the window's rows outscore others, ties half.

    Args:
        scores: A score for each row.
        labels: From `permutation`.
    """
    from scipy.stats import rankdata

    taken = labels.astype(np.float64)
    window = taken.sum(axis=0)
    wins = rankdata(scores) @ taken - window * (window + 1) / 2
    return np.asarray(wins / (window * (len(labels) - window)))


def _scores(fitted: Floats, of_window: NDArray[np.bool_], held_out: Floats, penalty: float) -> Floats:
    """Log odds of being the window's, by a logistic regression in which both sides weigh the same.

    One thread, and a solver that draws nothing: the same rows give the same scores.
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    model: Any = LogisticRegression(
        C=1 / penalty, class_weight="balanced", solver="newton-cholesky", max_iter=100
    )
    with threadpool_limits(limits=1):
        model.fit(fitted, of_window)
        return np.asarray(np.round(model.decision_function(held_out), _DIGITS), dtype=np.float64)
