"""Swear words, slurs, insults and threats in a text, by a list.

List and engine are those of the `safetype` package, which reads through case, accents, look-alike letters,
digits for letters, repeated and spaced letters, and takes words whole, so that Scunthorpe is a town. What it
lacks in English is added here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from safetype import ModerationEngine

Language = Literal["de", "en", "es", "fr", "hi", "hi-latn", "pt"]

_WILL = "(ll|will|am|m|are|re|gonna)"
#: Names, kinds and patterns as the package writes them: words in a row, of which `(a|b)` is either, `a?` may
#: be missing, and `a*` is any that begins so.
_ENGLISH: tuple[tuple[str, Literal["profanity", "hate", "harassment"], str], ...] = (
    ("slur", "hate", "(trannies|tranny|gooks|spics|paki|pakis|beaners)"),
    ("subhuman", "hate", "(subhuman|subhumans|untermensch*)"),
    ("such-an", "harassment", "(what|such) (a|an) (complete|total)? (idiot*|moron*|imbecile*|cretin*)"),
    ("stupid", "harassment", "(stupid|dumb|complete|total|utter) (idiot*|moron*|imbecile*|cretin*)"),
    ("are-you", "harassment", "are you (really|so|just)? (a|an)? (stupid|dumb|retarded|idiot*|moron*)"),
    ("hell", "harassment", "(go|rot|burn) (to|in) hell"),
    ("deserve", "harassment", "(you|he|she|they) (should|deserve|deserves) (to)? (all)? die"),
    ("hope", "harassment", "hope (that)? (you|he|she|they) (all)? (die|choke|rot)"),
    ("shut", "harassment", "shut your (mouth|face|trap|gob)"),
    ("suck", "profanity", "suck my (dick|cock|balls)"),
    ("ass", "profanity", "(asshat*|asswipe*|arsewipe*)"),
    ("beat", "harassment", "beat (you|u) (up|senseless)"),
    # In place of the package's, which takes "I'll shoot you a mail" and "sorry that I hurt you" for one.
    ("threat", "harassment", f"(i|we) {_WILL} (going|gonna)? (to)? (kill|murder|stab|hurt) (you|u)"),
    ("threat-ill", "harassment", "(ill|imma) (kill|murder|stab|hurt) (you|u)"),
    ("threat-break", "harassment", f"(i|we) {_WILL} (going|gonna)? (to)? break your (neck|legs|jaw|face)"),
    # Letters behind asterisks: the package takes such words for masked already, and leaves them.
    ("masked-f", "profanity", "(f*ck*|f**k*|fu*k*|motherf*ck*|motherf**k*)"),
    ("masked-s", "profanity", "(sh*t|sh*tt*|s**t|bullsh*t)"),
    ("masked-b", "profanity", "(b*tch*|b**ch*|bit*h*)"),
    ("masked-a", "profanity", "(a**hole*|sshole*|as*hole*|c*nt|c*nts)"),
    ("masked-slur", "hate", "(n*gger*|n**ger*|n*gga*|f*ggot*)"),
)
#: Words that begin like one of the package's list, or come to one with their letters doubled.
_INNOCENT = ("shiite", "shiites", "shiitic", "wankel", "twatt", "kikelomo")
#: Where words are parted: at spaces and signs, but for the signs that stand for letters and the final `*`.
_BETWEEN = re.compile(r"[\s\u2010-\u201f\"'#%&()+,./:;<=>?\[\\\]^_`{|}~-]+")
_REPLACED = "en.harassment.threat"
#: The package passes over words with the sign it masks with; this sign no text has.
_NO_MASK = "\u2588"


def broken(
    text: str,
    languages: Sequence[Language] = ("en",),
    words: Sequence[str] = (),
    allow: Sequence[str] = (),
) -> frozenset[str]:
    """The names of the rules that a text breaks.

    Slurs, insults and threats that are quoted or mentioned ("the word ...") break none; swear words do.

    Args:
        text: Any text.
        languages: Whose lists are used.
        words: More words or phrases; `*` at the end of a word stands for any ending.
        allow: Words that are let pass.
    """
    matches = _engine(tuple(languages), tuple(words), tuple(allow)).moderate(text).matches
    return frozenset(m.rule_id for m in matches if m.action != "allow" and not _is_code(m.text))


def _is_code(text: str) -> bool:
    """Whether a match is more digits than letters: the road A55, the time 5h17."""
    return sum(map(str.isdigit, text)) > sum(map(str.isalpha, text))


def check(words: Sequence[str], allow: Sequence[str]) -> None:
    """Say what is wrong with a user's own words.

    Raises:
        ValueError: If there is nothing to look for in one, or one of those let pass is several.
    """
    for word in words:
        parts = _parts(word)
        if not parts or not all(part.strip("*!") for part in parts):
            raise ValueError(f"words: {word!r} has no letters to look for")
    for word in allow:
        if len(_parts(word)) != 1:
            raise ValueError(f"allow: {word!r} is not one word")


def _parts(words: str) -> list[str]:
    return [part for part in _BETWEEN.split(words) if part]


@cache
def _engine(
    languages: tuple[Language, ...], words: tuple[str, ...], allow: tuple[str, ...]
) -> ModerationEngine:
    from safetype import create_moderation_engine

    engine = create_moderation_engine(
        mode="block",
        languages=languages,
        # The package's sexual terms are left out: a text about sex is not toxic for that.
        categories=("profanity", "hate", "harassment", "custom"),
        custom_words=[" ".join(_parts(word)) for word in words],
        allow_list=(*_INNOCENT, *allow),
        mask_char=_NO_MASK,
    )
    if "en" in languages:
        engine.remove_rule(_REPLACED)
        for name, category, pattern in _ENGLISH:
            engine.add_rule({"id": f"regraft.{name}", "category": category, "pattern": pattern})
    return engine
