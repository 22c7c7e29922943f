"""How texts are written, whatever they say: one row of numbers a text. Empty and missing texts are fine.

Evidently has descriptors of its own; some of them fail on an empty string or on None, and one empty answer
must not cost a report.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

from monitoring.languages import LANGUAGES, languages

#: Column name to what it is called in a sentence.
DESCRIPTORS: dict[str, str] = {
    "length": "length in characters",
    "words": "number of words",
    "sentences": "number of sentences",
    "non_letters": "share of characters that are not letters",
    "digits": "share of digits",
    "unique_words": "share of words not repeated",
    "compression": "compression ratio",
    "refusal": "share of refusals",
    "question": "share with a question mark",
    "empty": "share of empty texts",
}
#: What `describe_more` has beside them.
MORE: dict[str, str] = {
    "repetition": "share of three-word runs said before",
    **{f"language_{code}": f"share in {name}" for code, name in LANGUAGES.items()},
    "language_unknown": "share in no language that was recognised",
}
_REFUSAL = (
    r"(?i)\b(?:i(?:['\u2019]m| am) (?:sorry|unable|not able)|i apologi[sz]e|as an ai\b"
    r"|i (?:can(?:not|['\u2019]t)|could not|couldn['\u2019]t) (?:help|assist|answer|provide|comply|do that))"
)


def describe(texts: Sequence[str | None]) -> pd.DataFrame:
    """Describe the form of texts.

    Args:
        texts: Any texts; None counts as an empty one.

    Returns:
        One row a text in the order given, the columns of `DESCRIPTORS`, all of them finite floats.
    """
    # As Python objects: pandas' Arrow strings would read the patterns with RE2, whose \w knows ASCII alone.
    text = pd.Series([t or "" for t in texts], dtype="object")
    length = text.str.len().astype(float)
    # Nothing to share out in an empty text: its shares are 0, not undefined.
    safe = length.where(length > 0, 1.0)
    split = text.str.lower().str.split()
    words = split.map(len).astype(float)
    ends = text.str.count(r"[.!?]+(?:\s|$)").astype(float)
    data = [t.encode() for t in text]
    frame = pd.DataFrame(
        {
            "length": length,
            "words": words,
            # Words without a full stop are one sentence; nothing at all is none.
            "sentences": np.where(words > 0, np.maximum(ends, 1.0), 0.0),
            "non_letters": text.str.count(r"[^\w\s]|[\d_]") / safe,
            "digits": text.str.count(r"\d") / safe,
            "unique_words": split.map(lambda w: float(len(set(w)))) / words.where(words > 0, 1.0),
            "compression": [len(zlib.compress(d)) / len(d) if d else 0.0 for d in data],
            "refusal": text.str.contains(_REFUSAL, regex=True),
            "question": text.str.contains("?", regex=False),
            "empty": text.str.strip() == "",
        }
    )
    return frame.astype(float)


def describe_more(texts: Sequence[str | None]) -> pd.DataFrame:
    """Describe the form of texts further: `describe`, with repetition and a guess at the language.

    Args:
        texts: Any texts; None counts as an empty one.

    Returns:
        One row a text in the order given, the columns of `DESCRIPTORS` and of `MORE`, all finite floats.
    """
    guessed = pd.Series([code or "unknown" for code in languages(texts)], dtype="object")
    more = {"repetition": pd.Series([_repeated(text or "") for text in texts], dtype="float64")} | {
        name: (guessed == name.removeprefix("language_")).astype(float)
        for name in MORE
        if name.startswith("language_")
    }
    return pd.concat([describe(texts), pd.DataFrame(more)], axis=1)


def _repeated(text: str) -> float:
    """Share of a text's runs of three words that it had before: near 1 where it loops, 0 of a short text."""
    words = text.lower().split()
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return 1.0 - len(set(runs)) / len(runs) if runs else 0.0


def describe_sides(prompts: Sequence[str | None], outputs: Sequence[str | None]) -> pd.DataFrame:
    """Describe prompts and answers side by side; the columns say which (`prompt_words`, `answer_words`)."""
    return pd.concat(
        [describe(prompts).add_prefix("prompt_"), describe(outputs).add_prefix("answer_")],
        axis=1,
    )


def in_words(column: str) -> str:
    """What a column of `describe_sides`, or of `describe_more` with its side, is called in a sentence."""
    side, _, name = column.partition("_")
    return f"{(DESCRIPTORS | MORE)[name]} of {side}s"
