"""How likely the candidate finds the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from regraft.evals.base import Answer, Metric, Output, Scores
from regraft.records import Likelihood


def likelihood_of(answer: Answer) -> Likelihood:
    """What is known of the reference's likelihood.

    Raises:
        ValueError: If nothing is.
    """
    if answer.likelihood is None or not answer.likelihood.tokens:
        raise ValueError("the candidate says no probabilities, or its chat template does not tell the turn's")
    return answer.likelihood


class Perplexity(Metric):
    """The negative log-probability of the reference, by token and by byte.

    `reference_nats` is its mean over the reference's tokens, `bits_per_byte` its sum in bits over the
    reference's UTF-8 bytes: that one compares models with different tokenizers. Over a whole set `perplexity`
    is e to the mean over all tokens. Asked of a loaded model; an endpoint does not tell.
    """

    outputs: ClassVar[tuple[Output, ...]] = (
        Output("reference_nats", "nats a token", "lower"),
        Output("bits_per_byte", "bits", "lower"),
    )
    wholes: ClassVar[tuple[Output, ...]] = (Output("perplexity", "ratio", "lower"),)
    asks_likelihood: ClassVar[bool] = True

    name: Literal["perplexity"] = "perplexity"

    def score(self, answer: Answer) -> Scores:
        """Divide.

        Raises:
            ValueError: If the likelihood is not known.
        """
        found = likelihood_of(answer)
        bits = found.nats / math.log(2)
        return {
            "reference_nats": found.nats / found.tokens,
            "bits_per_byte": bits / max(1, found.utf8_bytes),
        }

    def whole(self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]) -> Scores:
        """The perplexity over all tokens; nothing where no likelihood is known."""
        known = [a.likelihood for a in answers if a.likelihood is not None]
        tokens = sum(k.tokens for k in known)
        return {"perplexity": math.exp(sum(k.nats for k in known) / tokens)} if tokens else {}
