"""How texts are written, whatever they say: one row of numbers a text. Empty and missing texts are fine.

Evidently has descriptors of its own; some of them fail on an empty string or on None, and one empty answer
must not cost a report.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from monitoring.kept import kept, key_of
from monitoring.languages import LANGUAGES, languages
from monitoring.tone import Embed, tones
from regraft.evals.base import Answer
from regraft.evals.grounding import Grounding

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
#: What `describe_full` has beside those: how a text speaks, and what an answer has to do with its prompt.
FULL: dict[str, str] = {
    "tone": "tone, from unkind to kind",
    "ungrounded_numbers": "share of numbers that the prompt does not have",
    "ungrounded_names": "share of names that the prompt does not have",
    "logprob": "mean log-probability of a token, in nats",
}
#: Raised whenever `describe_more` changes: rows that were kept are made anew.
FORM_VERSION = 1
_GROUNDED = tuple(output.name for output in Grounding.outputs)
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


def describe_full(
    prompts: Sequence[str | None],
    answers: Sequence[str | None],
    *,
    embed: Embed | None = None,
    logprobs: Sequence[float | None] | None = None,
    cache: Path | None = None,
) -> pd.DataFrame:
    """Describe exchanges in full, for reports and attribution.

    Args:
        prompts: What was asked; None counts as empty.
        answers: What was answered to each.
        embed: Gives texts their vectors, for the tone; without it there are no columns of tone.
        logprobs: Mean log-probability of a token of each answer, None where it is not known; without it
            there is no column of it.
        cache: Folder that keeps rows between processes.

    Returns:
        A row for each exchange in the order given; columns `prompt_<name>` and `answer_<name>`, see
        `in_words`. All are finite but `answer_logprob`, which is NaN where it is not known.

    Raises:
        ValueError: If there are not as many answers (or log-probabilities) as prompts.
        DataError: If the cache cannot be read.
        ModelError: If the embedding model cannot be had.
    """
    asked, told = ([text or "" for text in side] for side in (prompts, answers))
    if len(asked) != len(told) or (logprobs is not None and len(logprobs) != len(told)):
        raise ValueError(f"{len(asked)} prompts, but {len(told)} answers or other log-probabilities")
    sides = {"prompt": asked, "answer": told}
    frames = [_form(texts, cache).add_prefix(f"{side}_") for side, texts in sides.items()]
    grounding = Grounding()

    def grounded(places: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        scores = [grounding.score(Answer(told[i], prompt=asked[i])) for i in places]
        return np.array([[score[name] for name in _GROUNDED] for score in scores], dtype=np.float64)

    keys = [key_of(*pair) for pair in zip(asked, told, strict=True)]
    rows = kept(cache, f"grounding_{Grounding.version}", len(_GROUNDED), keys, grounded)
    frames.append(pd.DataFrame(rows, columns=list(_GROUNDED)).add_prefix("answer_"))
    if embed is not None:
        frames.append(pd.DataFrame({f"{side}_tone": tones(texts, embed) for side, texts in sides.items()}))
    if logprobs is not None:
        known = [np.nan if value is None else value for value in logprobs]
        frames.append(pd.DataFrame({"answer_logprob": np.array(known, dtype=np.float64)}))
    return pd.concat(frames, axis=1)


def _form(texts: Sequence[str], cache: Path | None) -> pd.DataFrame:
    """`describe_more`, each distinct text once."""
    names = [*DESCRIPTORS, *MORE]
    keys = [key_of(text) for text in texts]

    def make(places: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        return describe_more([texts[i] for i in places])[names].to_numpy(dtype=np.float64)

    return pd.DataFrame(kept(cache, f"form_{FORM_VERSION}", len(names), keys, make), columns=names)


def in_words(column: str) -> str:
    """What a column with its side, such as `prompt_words` or `answer_tone`, is called in a sentence."""
    side, _, name = column.partition("_")
    return f"{(DESCRIPTORS | MORE | FULL)[name]} of {side}s"
