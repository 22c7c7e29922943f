"""What an alarm is about, and where the change shows: asked only once a window looks changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from monitoring.attribution import attribute
from monitoring.detectors import Calibrated
from monitoring.matching import Kind, MatchedTest, classify, matched_test
from monitoring.windows import Row, Window, rows_of
from regraft.errors import DataError, ModelError
from regraft.records import Attribution, CapturedExchange

#: Rows that are matched; pairs are sought among all of them.
_MOST = 2000
#: What one window is enough to tell; another mix of known prompts is what remains.
_TELLING = ("behaviour", "new_content")


class Explained(NamedTuple):
    """What was found; `unclear` says in words why nothing could be."""

    kind: Kind | None = None
    matched: MatchedTest | None = None
    attribution: Attribution | None = None
    unclear: str = ""


def explain(
    reference: Sequence[Row],
    window: Window,
    since_growth: Sequence[CapturedExchange],
    detector: Calibrated,
    *,
    since: str,
    inputs_p: float | None = None,
    logprobs: Mapping[str, float] | None = None,
) -> Explained:
    """Match prompts of the windows that look changed with the reference's, and say what changed.

    The present window is asked first: a fault that is over would explain the attack that came after it. Where
    it shows neither a changed behaviour nor new content, all since the evidence began to grow are asked, who
    are more.

    Args:
        reference: Rows that were compared with.
        window: The present one.
        since_growth: Exchanges since the evidence began to grow.
        detector: Whose map and embeddings are used.
        since: When the evidence began to grow; "" if it has not.
        inputs_p: What this detector found of the window's prompts, if it was asked already.
        logprobs: Mean log-probability of a token of answers, by the ids of rows, where it is known.
    """
    own = {row.id for row in window.rows}
    answered = [e for e in since_growth if e.error is None]
    rows = [row for row in rows_of(answered) if row.id not in own]
    longer = [*window.rows, *rows][:_MOST]
    try:
        matched = matched_test(reference, window.rows, detector)
        if len(longer) > len(window.rows) and classify(matched) not in _TELLING:
            matched = matched_test(reference, longer, detector)
        attribution = attribute(
            reference,
            window.rows,
            detector,
            matched,
            created={e.id: e.created for e in answered},
            since=since,
            logprobs=logprobs,
            inputs_p=inputs_p,
        )
    except (DataError, ModelError) as error:
        return Explained(unclear=f"What changed cannot be told: {error.problem}")
    return Explained(classify(matched), matched, attribution)
