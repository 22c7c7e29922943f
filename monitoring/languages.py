"""A guess at the language of a text by its commonest words: offline, coarse, seven languages.

It cannot tell texts of a few words, languages that are not listed, those not written in Latin letters, or
close kin of a listed one (Catalan passes for Spanish, Afrikaans for Dutch). A text in two languages is given
to the one with more common words. It is meant for shares over many texts: an endpoint that begins to answer
in another language.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

#: Code to English name.
LANGUAGES = {
    "de": "German",
    "en": "English",
    "es": "Spanish",
    "fr": "French",
    "it": "Italian",
    "nl": "Dutch",
    "pt": "Portuguese",
}
#: Function words, few of them shared: a word of two languages counts for both.
_WORDS = {
    "de": "der die das und ist nicht ein eine einen mit für auf sie ich wir es im den dem zu von auch wie "
    "bei oder aber haben werden wird sind kann bitte ihre ihr",
    "en": "the and is are was were of to in that it for you your with on this have has be can will not "
    "from they what how do does my we please would there about",
    "es": "el la los las un una es son y que de en por para con no se su sus lo como más pero está puede "
    "usted qué cómo si del al muy tiene",
    "fr": "le la les un une des est sont et que qui de du dans pour pas avec vous nous je il elle sur au ce "
    "cette votre mais plus être avez ou où ne",
    "it": "il lo la gli le un una è sono e che di del della nel per con non si come più ma anche questo "
    "questa può suo ha dei alla sia",
    "nl": "de het een en is zijn niet van in op te dat die voor met ik je wij u uw ook maar kan wordt naar "
    "bij als er heeft aan om",
    "pt": "o a os as um uma é são e que de do da em no na para com não se seu sua por como mais mas está "
    "você pode também ao dos das",
}
#: Fewer different common words than this are no evidence.
MIN_WORDS = 2


def languages(texts: Sequence[str | None]) -> list[str]:
    """Guess the language of each text.

    Args:
        texts: Any texts; None counts as an empty one.

    Returns:
        A code of `LANGUAGES` for each, or "" where fewer than two different common words were found, or two
        languages have as many of them.
    """
    from sklearn.feature_extraction.text import CountVectorizer

    if not texts:
        return []
    codes = list(LANGUAGES)
    common = [set(_WORDS[code].split()) for code in codes]
    vocabulary = sorted(set().union(*common))
    counter: Any = CountVectorizer(binary=True, vocabulary=vocabulary, token_pattern=r"(?u)\b[^\W\d_]+\b")
    member = np.array([[word in words for words in common] for word in vocabulary], dtype=np.float64)
    found = np.asarray(counter.transform([text or "" for text in texts]) @ member)
    best = found.argmax(axis=1)
    most = found.max(axis=1)
    alone = (found == most[:, None]).sum(axis=1) == 1
    sure = alone & (most >= MIN_WORDS)
    return [codes[i] if ok else "" for i, ok in zip(best, sure, strict=True)]
