"""A sample of any amount of traffic in little memory, and counts over all of it.

What is dear (embeddings, permutations, descriptors) looks at the sample; the counts beside it are exact.
Whole sessions are kept or left out, so that a sample's sessions are as long as the traffic's. Records are
made of the sample alone: the rest is counted column by column, as it lies in the archive.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from monitoring.measures import TEXT_RATES, UNFINISHED, unit
from monitoring.windows import hashed
from regraft.data.capture_archive import from_arrow
from regraft.evals.refusal import DECLINES, SEEN_CHARACTERS
from regraft.records import CapturedExchange

#: Sessions of a window that quality is measured on at most; drift looks at `monitor.max_rows` of them.
MOST_SESSIONS = 20_000
#: Exchanges kept of one session at most: one client that never ends its session fills no memory.
MOST_TURNS = 100
#: What every phrase that declines has in it for RE2, whose \b knows ASCII alone; \u0130 is two letters in
#: lower case, and the second one ends a word.
_DECLINES = "|".join(
    ["\u0130", *(phrase.replace(r"\b", "").replace("'", "['\u2019]") for phrase in DECLINES)]
)


def _maybe_empty(texts: Any) -> Any:
    return pc.invert(pc.match_substring_regex(texts, "[!-~]"))


def _maybe_refusing(texts: Any) -> Any:
    start = pc.utf8_slice_codeunits(texts, 0, SEEN_CHARACTERS)
    return pc.match_substring_regex(start, _DECLINES, ignore_case=True)


#: What is counted of every answer's text, with a quick look at a column that leaves none out; what it lets
#: through is judged one by one. Repetition takes longer than reading the exchange.
COUNTED: dict[str, Callable[[Any], Any]] = {"empty_rate": _maybe_empty, "refusal_rate": _maybe_refusing}


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
    parts: Iterable[pa.Table], most: int = MOST_SESSIONS, *, salt: str = "", most_turns: int = MOST_TURNS
) -> Sampled:
    """Keep the sessions with the smallest hashes, and count over all.

    The same exchanges give the same sample, in whatever order they come. Memory depends on the two limits and
    the size of a part alone. Exchanges without a session are sampled one by one, choices of one request
    together.

    Args:
        parts: Tables of exchanges, each exchange once, such as `CaptureStore.parts` gives.
        most: Sessions that are kept.
        salt: Another salt, another sample. With one salt for all windows, sessions that go on over several
            are looked at again and again.
        most_turns: Exchanges that are kept of one session, by the hash of their ids.

    Raises:
        ValueError: If a limit is not positive.
    """
    if min(most, most_turns) < 1:
        raise ValueError(f"most and most_turns must be positive, not {most} and {most_turns}")
    kept = _Kept(most, most_turns, salt)
    counts = Counter(dict.fromkeys(("error_rate", *COUNTED, "truncated_rate"), 0))
    variants: Counter[str] = Counter()
    total = whole = 0
    for part in parts:
        variants.update({one["values"]: one["counts"] for one in part["variant"].value_counts().to_pylist()})
        seen = part.filter(pc.not_equal(part["variant"], "shadow"))
        failed = pc.or_(pc.is_valid(seen["error"]), pc.equal(seen["finish_reason"], "error"))
        ended = seen.filter(pc.invert(failed)).select(["finish_reason", "output"])
        ended = ended.filter(pc.invert(pc.is_in(ended["finish_reason"], pa.array(sorted(UNFINISHED)))))
        total += len(seen)
        whole += len(ended)
        counts["error_rate"] += pc.sum(failed).as_py() or 0
        counts["truncated_rate"] += pc.sum(pc.equal(ended["finish_reason"], "length")).as_py() or 0
        for name, maybe in COUNTED.items():
            bad, _ = TEXT_RATES[name]
            texts = ended["output"]
            counts[name] += sum(map(bad, texts.filter(maybe(texts)).to_pylist()))
        kept.add(seen)
    found = kept.table().sort_by([("created", "ascending"), ("id", "ascending")]) if total else None
    return Sampled(
        exchanges=tuple(from_arrow(found)) if found is not None else (),
        total=total,
        counts=dict(counts),
        whole=whole,
        variants=dict(variants),
        sessions=kept.sessions,
        sessions_exact=not kept.left_out,
    )


class _Kept:
    """The exchanges of the sessions with the smallest hashes, of all that were shown so far."""

    def __init__(self, most: int, most_turns: int, salt: str) -> None:
        self._most, self._most_turns, self._salt = most, most_turns, salt
        self._parts: list[pa.Table] = []
        self._hashes: list[NDArray[np.uint64]] = []
        #: Rows at which what is not kept is thrown away.
        self._full = 2 * most
        #: The largest hash that may be kept: what was above it once stays so for ever.
        self._limit: np.uint64 | None = None
        self.left_out = False
        self.sessions = 0

    def add(self, part: pa.Table) -> None:
        """Show some exchanges."""
        hashes = _hashes(part, self._salt)
        if self._limit is not None:
            near = hashes <= self._limit
            self.left_out |= not near.all()
            part, hashes = part.filter(pa.array(near)), hashes[near]
        if len(part):
            self._parts.append(part)
            self._hashes.append(hashes)
        if sum(map(len, self._hashes)) >= self._full:
            self._tidy()

    def table(self) -> pa.Table:
        """All that is kept; something must have been shown."""
        self._tidy()
        return self._parts[0]

    def _tidy(self) -> None:
        table = pa.concat_tables(self._parts).combine_chunks()
        hashes = np.concatenate(self._hashes)
        distinct, which, turns = np.unique(hashes, return_inverse=True, return_counts=True)
        near = which < self._most
        self.left_out |= len(distinct) > self._most
        if len(distinct) >= self._most:
            self._limit = distinct[self._most - 1]
        for session in np.flatnonzero(turns[: self._most] > self._most_turns).tolist():
            inside = np.flatnonzero(which == session)
            names = table["id"].take(pa.array(inside)).to_pylist()
            order = sorted(range(len(names)), key=lambda i: hashed(names[i]))
            near[inside[order[self._most_turns :]]] = False
        self._parts, self._hashes = [table.filter(pa.array(near))], [hashes[near]]
        self._full = max(2 * int(near.sum()), self._full)
        self.sessions = (
            max(self._most, round((self._most - 1) * 2**64 / (1 + int(distinct[self._most - 1]))))
            if self.left_out
            else len(distinct)
        )


def _hashes(part: pa.Table, salt: str) -> NDArray[np.uint64]:
    """The hash of each exchange's unit."""
    columns = [part[name].to_pylist() for name in ("session", "id", "choice")]
    units = [unit(*row) for row in zip(*columns, strict=True)]
    found = {name: _hash(name, salt) for name in dict.fromkeys(units)}
    return np.fromiter(map(found.__getitem__, units), dtype=np.uint64, count=len(units))


def _hash(name: str, salt: str) -> int:
    digest = hashlib.blake2b(f"{salt}\0{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")
