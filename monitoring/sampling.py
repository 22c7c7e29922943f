"""A sample of any amount of traffic in little memory, and counts over all of it.

What is dear (embeddings, permutations, descriptors) looks at the sample; the counts beside it are exact.
Whole sessions are kept or left out, so that a sample's sessions are as long as the traffic's.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from heapq import heappush, heappushpop
from typing import NamedTuple

from monitoring.measures import TEXT_RATES, UNFINISHED, failed, unit_of
from monitoring.windows import hashed
from regraft.records import CapturedExchange

#: Exchanges kept of one session at most: one client that never ends its session fills no memory.
MOST_TURNS = 100
#: What is counted of every answer's text; repetition takes longer than reading the exchange.
COUNTED = ("empty_rate", "refusal_rate")


class Sampled(NamedTuple):
    """A sample, and what was counted over all that it was taken from.

    Attributes:
        exchanges: The sample, oldest first.
        total: Exchanges in all; those of a shadow count nowhere but in `variants`.
        counts: How many of all were bad, by the rates of `monitoring.quality`: `error_rate`, `empty_rate`,
            `refusal_rate`, `truncated_rate`.
        whole: Answers that were given to their end: what all rates but `error_rate` are shares of.
        variants: Exchanges by the role in which the version answered.
        sessions: Sessions in all; an estimate where `sessions_exact` is false (standard error: one by the
            root of how many were kept, 3 % of a thousand; Bar-Yossef et al., 2002).
    """

    exchanges: tuple[CapturedExchange, ...]
    total: int
    counts: dict[str, int]
    whole: int
    variants: dict[str, int]
    sessions: int
    sessions_exact: bool

    @property
    def rates(self) -> dict[str, float]:
        """The counts as shares; those of nothing are left out."""
        of = {name: self.total if name == "error_rate" else self.whole for name in self.counts}
        return {name: count / of[name] for name, count in self.counts.items() if of[name]}


def sampled_exchanges(
    exchanges: Iterable[CapturedExchange], most: int, *, salt: str = "", most_turns: int = MOST_TURNS
) -> Sampled:
    """Keep the sessions with the smallest hashes, and count over all.

    The same exchanges give the same sample, in whatever order they come. Memory depends on the two limits
    alone. Exchanges without a session are sampled one by one, choices of one request together.

    Args:
        exchanges: Each once, such as `CaptureStore.stream` gives.
        most: Sessions that are kept.
        salt: Another salt, another sample. With one salt for all windows, sessions that go on over several
            are looked at again and again.
        most_turns: Exchanges that are kept of one session, by the hash of their ids.

    Raises:
        ValueError: If a limit is not positive.
    """
    if min(most, most_turns) < 1:
        raise ValueError(f"most and most_turns must be positive, not {most} and {most_turns}")
    kept: dict[tuple[int, str], list[CapturedExchange]] = {}
    #: The kept sessions by their hash turned negative: the largest is on top.
    heap: list[tuple[int, str]] = []
    left_out = False
    counts = dict.fromkeys(("error_rate", *COUNTED, "truncated_rate"), 0)
    variants: Counter[str] = Counter()
    total = whole = 0
    for exchange in exchanges:
        variants[exchange.variant] += 1
        if exchange.variant == "shadow":
            continue
        total += 1
        if failed(exchange):
            counts["error_rate"] += 1
        elif exchange.finish_reason not in UNFINISHED:
            whole += 1
            for name in COUNTED:
                counts[name] += TEXT_RATES[name][0](exchange.output)
            counts["truncated_rate"] += exchange.finish_reason == "length"
        unit = unit_of(exchange)
        place = (-_hash(unit, salt), unit)
        if place in kept:
            kept[place].append(exchange)
            if len(kept[place]) >= 2 * most_turns:
                kept[place] = _first(kept[place], most_turns)
        elif len(heap) < most:
            heappush(heap, place)
            kept[place] = [exchange]
        else:
            # What was left out once has a larger hash than all that is kept, from then on for ever.
            left_out = True
            if place > heap[0]:
                kept.pop(heappushpop(heap, place))
                kept[place] = [exchange]
    found = (e for session in kept.values() for e in _first(session, most_turns))
    return Sampled(
        exchanges=tuple(sorted(found, key=lambda e: (e.created, e.id))),
        total=total,
        counts=counts,
        whole=whole,
        variants=dict(variants),
        sessions=max(most, round((most - 1) * 2**64 / (1 - heap[0][0]))) if left_out else len(heap),
        sessions_exact=not left_out,
    )


def _first(session: list[CapturedExchange], most: int) -> list[CapturedExchange]:
    if len(session) <= most:
        return session
    return sorted(session, key=lambda e: hashed(e.id))[:most]


def _hash(unit: str, salt: str) -> int:
    digest = hashlib.blake2b(f"{salt}\0{unit}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
