"""How likely the serving model itself finds its answers: a sample of them, scored by whoever can.

An answer that its own model finds unlikely was not given by that model as it is now: by other weights,
another prompt template or at a higher temperature. Nothing here loads a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from monitoring.windows import Row, hashed
from regraft.records import AnswerLogprob, CapturedExchange, Likelihood

#: Scores exchanges, in their order; None where that cannot be done.
Score = Callable[[Sequence[CapturedExchange]], Sequence[Likelihood | None]]


def scorable(exchanges: Sequence[CapturedExchange], limit: int) -> list[CapturedExchange]:
    """A sample by the hash of the ids, of answers that came to their own end.

    A failed or empty answer has no tokens, and one that was cut off did not end where its model would have
    ended it.
    """
    whole = [e for e in exchanges if e.error is None and e.finish_reason == "stop" and e.output]
    return sorted(whole, key=lambda e: hashed(e.id))[:limit]


def likelihoods(exchanges: Sequence[CapturedExchange], score: Score, limit: int) -> dict[str, float]:
    """Mean log-probability of a token, in nats, of a sample of answers.

    Args:
        exchanges: In any order.
        score: Says how likely a model finds the answers, end-of-turn token included.
        limit: Answers scored at most.

    Returns:
        By the id of the exchange, 0 or less; those left out of the sample, and those that could not be
        scored, are absent.

    Raises:
        ValueError: If the score says something of fewer or more exchanges than it was given.
    """
    asked = scorable(exchanges, limit)
    if not asked:
        return {}
    return {
        exchange.id: -found.nats / found.tokens
        for exchange, found in zip(asked, score(asked), strict=True)
        if found is not None and found.tokens
    }


def beside(
    reference: Iterable[Row], window: Iterable[Row], logprobs: Mapping[str, float]
) -> AnswerLogprob | None:
    """The mean of the window's answers beside that of the reference's; None where no answer was scored.

    Args:
        reference: Rows that were compared with.
        window: Rows compared.
        logprobs: Of some of both, by their ids.
    """
    before, now = ([logprobs[r.id] for r in rows if r.id in logprobs] for rows in (reference, window))
    if not now:
        return None
    return AnswerLogprob(
        window=sum(now) / len(now),
        count=len(now),
        reference=sum(before) / len(before) if before else None,
        reference_count=len(before),
    )
