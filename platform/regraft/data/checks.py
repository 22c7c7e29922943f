"""Checks of a dataset: near-duplicates of evaluation prompts among the training prompts are leakage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from regraft.records import Example

_PERMUTATIONS = 128


class Leak(NamedTuple):
    """A training example whose prompt is all but that of an evaluation example."""

    train_id: str
    evaluation_id: str
    jaccard: float


def prompt_words(example: Example) -> frozenset[str]:
    """The lower-case words of all user turns: what two prompts are compared by."""
    text = " ".join(m.content for m in example.messages if m.role == "user")
    return frozenset(re.findall(r"\w+", text.lower()))


def find_leaks(train: Sequence[Example], evaluation: Sequence[Example], threshold: float) -> tuple[Leak, ...]:
    """Find training prompts at least `threshold` alike to an evaluation prompt.

    Candidates come from MinHash buckets (Broder, 1997) and are confirmed by the exact Jaccard similarity of
    their word sets, so that a reported leak is never a hash artefact.

    Args:
        train: Training examples.
        evaluation: Evaluation examples.
        threshold: Jaccard similarity, above 0 and at most 1.
    """
    from datasketch import MinHash, MinHashLSH

    def sketch(words: frozenset[str]) -> MinHash:
        minhash = MinHash(num_perm=_PERMUTATIONS)
        minhash.update_batch([w.encode() for w in words])
        return minhash

    # The buckets are set somewhat below the threshold: they miss pairs near their own bound.
    buckets = MinHashLSH(threshold=max(0.1, 0.8 * threshold), num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
    held = {e.id: prompt_words(e) for e in evaluation}
    for key, words in held.items():
        buckets.insert(key, sketch(words))
    leaks = []
    for example in train:
        words = prompt_words(example)
        for key in buckets.query(sketch(words)):
            jaccard = len(words & held[key]) / max(1, len(words | held[key]))
            if jaccard >= threshold:
                leaks.append(Leak(example.id, key, jaccard))
    return tuple(sorted(leaks, key=lambda leak: (-leak.jaccard, leak.train_id)))


def without_repeats(examples: Sequence[Example]) -> tuple[tuple[Example, ...], int]:
    """The examples without exact duplicates, first ones kept, and how many were dropped."""
    first: dict[tuple[tuple[str, str], ...], Example] = {}
    for example in examples:
        first.setdefault(tuple((m.role, m.content) for m in example.messages), example)
    return tuple(first.values()), len(examples) - len(first)
