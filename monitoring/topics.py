"""Texts sorted into topics: those of a frozen map, and new ones made of what the map has nothing like.

A topic is named by its most telling terms. The new ones are made of unlike texts of both sides together,
never told which side a text is on: so a test of a topic's shares is exact although the topics come from the
texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from monitoring.detectors.frozen import Frozen

Floats = NDArray[np.float64]
Groups = NDArray[np.intp]

#: Mean cosine that texts of one new topic have at least (average linkage).
LIKE = 0.3
#: Fewer unlike texts than this are no topic.
MIN_TEXTS = 3
#: Terms of a name.
TERMS = 3
#: The group of texts that are unlike the reference's and like too few others.
SCATTERED = -1
#: What that group is called.
SCATTERED_NAME = "unlike any topic"
_WORD = re.compile(r"[^\W\d_]{2,}")
#: Written without spaces between words.
_UNSPACED = re.compile(r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")


class Topics(NamedTuple):
    """Texts by topic.

    Attributes:
        group: The topic of each text: below `known` one of the map's, from there on a new one; or
            `SCATTERED`.
        names: Of the topics.
        known: Topics of the map.
    """

    group: Groups
    names: tuple[str, ...]
    known: int

    def name(self, group: int) -> str:
        """What a group is called."""
        return SCATTERED_NAME if group == SCATTERED else self.names[group]


def sort_texts(
    frozen: Frozen, mapped: tuple[Sequence[str], NDArray[np.float32]], texts: Sequence[str],
    embeddings: NDArray[np.float32],
) -> Topics:  # fmt: skip
    """Sort texts into the topics of a map and new ones.

    Args:
        frozen: The map.
        mapped: Texts and embeddings of the part of the reference that it was made of, which name its topics.
        texts: Texts of both sides, in an order that does not tell the side.
        embeddings: Theirs, of unit length.
    """
    features = frozen.features(embeddings)
    of_map = frozen.features(mapped[1]).topics
    group = np.asarray(features.topics, dtype=np.intp).copy()
    known = int(max(of_map.max(initial=0), group.max(initial=0))) + 1
    unlike = np.flatnonzero(features.distances > frozen.threshold)
    group[unlike] = SCATTERED
    clusters = new_topics(embeddings[unlike])
    for number, members in enumerate(clusters):
        group[unlike[members]] = known + number
    classes = [
        [text for text, topic in zip(mapped[0], of_map, strict=True) if topic == i] for i in range(known)
    ]
    classes += [[texts[unlike[j]] for j in members] for members in clusters]
    return Topics(group, topic_names(classes), known)


def new_topics(embeddings: NDArray[np.float32]) -> list[list[int]]:
    """Clusters of texts whose mean cosine is at least `LIKE`, largest first; the same texts give the same.

    Average linkage rather than k-means: no number of clusters to choose, and texts like no others stay alone.
    """
    if len(embeddings) < MIN_TEXTS:
        return []
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    whole = embeddings.astype(np.float64)
    # Rounded, so that equal texts tie whatever the order of additions was.
    distance = np.round(np.clip(1.0 - whole @ whole.T, 0.0, 2.0), 5)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    numbers = fcluster(tree, t=1.0 - LIKE, criterion="distance")
    found = [np.flatnonzero(numbers == n).tolist() for n in np.unique(numbers)]
    return sorted((f for f in found if len(f) >= MIN_TEXTS), key=lambda f: (-len(f), f[0]))


def topic_names(classes: Sequence[Sequence[str]]) -> tuple[str, ...]:
    """Name classes of texts by the terms that tell each from the others, all names different.

    Class-based TF-IDF (Grootendorst, 2022) over shares of texts: a term counts by the share of the class's
    texts that have it, times the square of the logarithm of how rare it is over all classes alike: not
    squared, small classes were named "how" and "my". What every class says, in whatever language, falls out
    without a list of stop words.
    """
    shares = [_shares(texts) for texts in classes]
    total: Counter[str] = Counter()
    for share in shares:
        total.update(share)
    names: list[str] = []
    for texts, share in zip(classes, shares, strict=True):
        # A term of one text alone says nothing of a class of many.
        least = 1.5 / len(texts) if len(texts) >= MIN_TEXTS else 0.0
        score = {
            term: value * float(np.log((1 + len(classes)) / total[term])) ** 2
            for term, value in share.items()
            if value >= least
        }
        best = sorted(score, key=lambda term: (-round(score[term], 9), term))
        words = ", ".join(best[:TERMS]) or "without words"
        name, number = words, 2
        while name in names:
            name, number = f"{words} ({number})", number + 1
        names.append(name)
    return tuple(names)


def _shares(texts: Sequence[str]) -> dict[str, float]:
    """Share of the texts that have each term."""
    found = Counter(term for text in texts for term in set(_terms(text)))
    return {term: count / len(texts) for term, count in found.items()}


def _terms(text: str) -> list[str]:
    """Words in lower case; where no spaces part the words, pairs of characters."""
    terms = []
    for word in _WORD.findall(text.lower()):
        if _UNSPACED.search(word):
            terms += [word[i : i + 2] for i in range(len(word) - 1)]
        else:
            terms.append(word)
    return terms
