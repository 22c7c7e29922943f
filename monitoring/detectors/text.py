"""Text as numbers without any model to download: TF-IDF similarities, and the terms that grew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import hstack
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer

from monitoring.detectors.base import Term

Floats = NDArray[np.float64]


def similarities(texts: Sequence[str]) -> Floats:
    """Cosine similarity of every pair of texts over word 1-2-grams and character 3-5-grams.

    It is fitted on all texts together and never told which side a text is on. That is what makes the
    permutation test valid: fitted on the reference alone, window rows would be out-of-sample and look
    novel for that reason only. No dimension is cut away: reducing to 32-100 by SVD lowered the power on
    prompts of new topics, whose words are rare in the pooled data by their nature.

    Args:
        texts: The texts of both sides.

    Returns:
        A symmetric matrix with 1 on its diagonal. Blank texts are like each other and like nothing else.
    """
    count = len(texts)
    blocks = []
    for settings in (
        {"ngram_range": (1, 2), "stop_words": "english"},
        {"analyzer": "char_wb", "ngram_range": (3, 5)},
    ):
        # A term of one text alone cannot make two texts alike.
        vectorizer: Any = TfidfVectorizer(sublinear_tf=True, min_df=2, **settings)
        try:
            blocks.append(vectorizer.fit_transform(texts))
        except ValueError:
            continue  # no term is in two texts: all of them empty, or all different
    gram = np.zeros((count, count))
    if blocks:
        features = hstack(blocks).tocsr()
        gram = np.asarray((features @ features.T).todense(), dtype=np.float64)
    norms = np.sqrt(np.diag(gram))
    norms[norms == 0] = 1.0
    cosine = np.asarray(gram / norms[:, None] / norms[None, :], dtype=np.float64)
    blank = np.array([not text.strip() for text in texts])
    cosine[np.ix_(blank, blank)] = 1.0
    np.fill_diagonal(cosine, 1.0)
    return cosine


def grown_terms(reference: Sequence[str], window: Sequence[str], top: int) -> tuple[Term, ...]:
    """The terms whose share of texts grew most from the reference to the window.

    Args:
        reference: Texts of the reference.
        window: Texts of the window.
        top: How many terms to give at most.

    Returns:
        Terms in order of a two-proportion z-score, at least 2, none in fewer than three window texts.
    """
    counter: Any = CountVectorizer(
        binary=True, ngram_range=(1, 2), stop_words="english", token_pattern=r"(?u)\b[^\W\d_]\w+\b"
    )
    try:
        present = counter.fit_transform([*reference, *window])
    except ValueError:
        return ()  # nothing but empty texts and stop words
    before = np.asarray(present[: len(reference)].sum(axis=0)).ravel()
    now = np.asarray(present[len(reference) :].sum(axis=0)).ravel()
    share_before, share_now = before / len(reference), now / len(window)
    # Half a text on each side keeps a term that the reference never had from an infinite score.
    pooled = (before + now + 1.0) / (len(reference) + len(window) + 2.0)
    score = (share_now - share_before) / np.sqrt(
        pooled * (1 - pooled) * (1 / len(reference) + 1 / len(window))
    )
    names = counter.get_feature_names_out()
    order = np.lexsort((names, -score))
    return tuple(
        Term(text=str(names[i]), reference_share=float(share_before[i]), window_share=float(share_now[i]))
        for i in order
        if now[i] >= 3 and score[i] >= 2
    )[:top]
