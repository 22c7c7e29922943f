"""A reference split into three parts by session: one to measure by, one to set the threshold, one to compare.

Rows that a distance is measured from look nearer than any others: judged in sample, 5 % "beyond the 95th
percentile" would be none at all, and every ordinary window would look strange beside them. So the map and
its index come from one part, the threshold from a second, and the window is compared with a third.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitoring.windows import Row, hashed, session_of

Floats = NDArray[np.float64]
Groups = NDArray[np.intp]

#: Shares of the reference's sessions that make the index and set the threshold; the rest is compared.
INDEX_SHARE, THRESHOLD_SHARE = 0.4, 0.2
#: The distance of a text is the mean over this many nearest ones of the index. Measured on requests of topics
#: never seen (CLINC150, 600 of the index): 3 put 73 % of them beyond the threshold, 5 put 69 %, 10 put 46 %;
#: all 384 dimensions in place of 64 put 48 %.
NEIGHBOURS = 3
#: From this percentile of the threshold part on it counts how far beyond it an answer is.
NEAR = 0.85
#: Distances of unit vectors are at most 2; what differs by less than this is the same text.
_DIGITS = 5
_LLOYD_STEPS = 50


class Split(NamedTuple):
    """The reference's rows by what they are for, each part in hash order."""

    mapped: list[Row]
    threshold: list[Row]
    compared: list[Row]


class Features(NamedTuple):
    """What the statistics are computed from, a row for each text."""

    places: Floats
    distances: Floats
    topics: Groups


def split(rows: Sequence[Row]) -> Split:
    """Split rows by the hash of their session: whole sessions, whatever the order given."""
    sessions = by_session(rows)
    first = round(INDEX_SHARE * len(sessions))
    second = first + round(THRESHOLD_SHARE * len(sessions))
    return Split(flat(sessions[:first]), flat(sessions[first:second]), flat(sessions[second:]))


def by_session(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each session, both by hash: the same whatever the order given."""
    return [list(group) for _, group in groupby(in_order(rows), key=session_of)]


def flat(sessions: Iterable[Sequence[Row]]) -> list[Row]:
    """The rows of sessions."""
    return list(chain.from_iterable(sessions))


def in_order(rows: Sequence[Row]) -> list[Row]:
    """Rows by the hash of their session, then of their id."""
    return sorted(rows, key=lambda row: (hashed(session_of(row)), hashed(row.id)))


class Frozen:
    """The map of a reference's answers: principal directions, an index of places, topics and the threshold.

    `threshold` is the distance beyond which an answer is novel, `near` the one up to which it is like others.

    Args:
        index: Embeddings of the index part, of unit length, at least one.
        threshold: Embeddings of the threshold part, at least one.
        dimensions: Principal directions to keep at most.
        topics: Topics at most (k-means over the index).
        tail: The percentile of the threshold part's distances beyond which an answer is novel.
        seed: For the first centres of the topics.
    """

    def __init__(
        self,
        index: NDArray[np.float32],
        threshold: NDArray[np.float32],
        *,
        dimensions: int,
        topics: int,
        tail: float,
        seed: int,
    ) -> None:
        whole = index.astype(np.float64)
        self._centre = whole.mean(axis=0)
        directions = np.linalg.svd(whole - self._centre, full_matrices=False)[2]
        self._directions = directions[:dimensions].T
        self._index = self._places(index)
        self._topics = _centres(self._index, topics, seed)
        held_out = self._distances(self._places(threshold))
        self.threshold = float(np.quantile(held_out, tail))
        self.near = float(np.quantile(held_out, NEAR))

    def features(self, embeddings: NDArray[np.float32]) -> Features:
        """Where texts lie on the map, how far they are from the index, and which topic is nearest."""
        places = self._places(embeddings)
        return Features(places, self._distances(places), _nearest(places, self._topics))

    def _places(self, embeddings: NDArray[np.float32]) -> Floats:
        return np.asarray((embeddings.astype(np.float64) - self._centre) @ self._directions)

    def _distances(self, places: Floats) -> Floats:
        neighbours = min(NEIGHBOURS, len(self._index))
        squared = _squared(places, self._index)
        near = np.partition(squared, neighbours - 1, axis=1)[:, :neighbours]
        return np.asarray(np.round(np.sqrt(near).mean(axis=1), _DIGITS))


def _centres(places: Floats, count: int, seed: int) -> Floats:
    """k-means (Lloyd), first centres by k-means++ (Arthur and Vassilvitskii, 2007).

    Written out because scikit-learn's adds up in the order in which its threads end, and the same rows
    shall give the same topics.
    """
    generator = np.random.default_rng(seed)
    centres = places[[int(generator.integers(len(places)))]]
    while len(centres) < min(count, len(places)):
        far = _squared(places, centres).min(axis=1)
        if far.sum() < 1e-9:
            break  # fewer distinct places than topics
        centres = np.vstack([centres, places[int(generator.choice(len(places), p=far / far.sum()))]])
    for _ in range(_LLOYD_STEPS):
        nearest = _nearest(places, centres)
        moved = np.stack(
            [places[nearest == i].mean(axis=0) if (nearest == i).any() else c for i, c in enumerate(centres)]
        )
        if np.allclose(moved, centres):
            break
        centres = moved
    return centres


def _nearest(places: Floats, centres: Floats) -> Groups:
    return np.asarray(_squared(places, centres).argmin(axis=1))


def _squared(places: Floats, others: Floats) -> Floats:
    """Squared distance of every place to every other."""
    own, their = (places**2).sum(axis=1), (others**2).sum(axis=1)
    return np.asarray(np.maximum(own[:, None] + their[None, :] - 2 * places @ others.T, 0.0))
