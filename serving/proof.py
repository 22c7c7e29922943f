"""Whether a version that was just loaded says what it said when the gate looked at it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from regraft.methods.base import DTypeName
from regraft.records import Probe
from regraft.training.parity import tolerance_of
from serving.engines.base import Engine, GenerationRequest, TextDelta, TokenLogprob

#: Tokens looked at for the one that was expected: what ties with the likeliest is among them.
_LIKELIEST = 20


class ProofError(Exception):
    """A loaded version does not answer as it should."""


async def prove(engine: Engine, probes: Sequence[Probe], dtype: DTypeName) -> None:
    """Ask a version what the adapter on its base was asked.

    Answers may part where both continuations are equally likely, within what rounding makes of them
    (`regraft.training.parity`): other processors add up in another order.

    Args:
        engine: Of the version.
        probes: What to ask, and what was answered.
        dtype: Type of the frozen weights.

    Raises:
        ProofError: If an answer is another.
    """
    answers = await asyncio.gather(*(_asked(engine, probe) for probe in probes))
    for number, (probe, tokens) in enumerate(zip(probes, answers, strict=True)):
        gap = _gap(probe.answer_ids, tokens)
        if gap > tolerance_of(dtype):
            raise ProofError(
                f"it does not answer as it did when the gate looked at it: probe {number} parts by {gap:.3f} "
                f"nats, where {tolerance_of(dtype):g} pass for a tie"
            )


async def _asked(engine: Engine, probe: Probe) -> list[TokenLogprob]:
    request = GenerationRequest(probe.prompt_ids, len(probe.answer_ids), logprobs=_LIKELIEST)
    async with aclosing(engine.submit(request)) as events:
        return [token async for event in events if isinstance(event, TextDelta) for token in event.tokens]


def _gap(expected: Sequence[int], said: Sequence[TokenLogprob]) -> float:
    """How much likelier what was said is than what was expected where they part; 0 if they do not.

    An answer that ends early says nothing of the token that ended it, which none can then be compared with.
    """
    for wanted, token in zip(expected, said, strict=False):
        if token.id != wanted:
            likely = {other.id: other.logprob for other in token.top}
            return token.logprob - likely.get(wanted, -float("inf"))
    return 0.0
