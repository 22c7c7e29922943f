"""Personal data that has a form: e-mail addresses, IBANs, card numbers, US SSNs, IPv4, phone numbers.

It finds; what is then counted or hidden is for others to say. Names and postal addresses have no form, and
it does not find them. Every search takes time in proportion to the text, whatever the text is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

_PATTERNS = {
    # The part after the @; what stands before is read backwards, so that no text is searched twice.
    "email": re.compile(r"@[\w-]++(?:\.[\w-]++)++"),
    "iban": re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"),
    "card": re.compile(r"\b(?:\d[ -]?){12,18}\d\b"),
    "ssn": re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b"),
    "ip": re.compile(r"\b(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)\b"),
    "phone": re.compile(
        r"(?<![\w-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\)[ .-]?|\d{3}[ .-])\d{3}[ .-]?\d{4}(?!\w)"
    ),
}
#: The kinds that are known.
KINDS = tuple(_PATTERNS)
#: The usual ways to group a card number, also at the end or the start of more digits (an expiry date).
_CARD_GROUPS = re.compile(
    r"(?<!\d)(?=((?:\d{4}[ -]?){3}\d{4}(?!\d)|\d{4}[ -]?\d{6}[ -]?\d{4,5}(?!\d)|\d{13,19}(?!\d)))"
)
_SPACING = re.compile(r"[ ().-]")
#: Cards, SSNs, addresses and phone numbers lie whole in such runs, and most texts have few: to look there
#: alone, and at the one letter behind, finds the same several times as fast.
_RUN = re.compile(r"[\d .()+-]{7,}")
_IBAN_START = re.compile(r"[A-Z]{2}\d{2}")


class Found(NamedTuple):
    """A piece of personal data. `plain` is what it is without spaces and dashes, in small letters."""

    kind: str
    start: int
    end: int
    plain: str


def find(text: str, kinds: Iterable[str] = KINDS, *, joined: bool = False) -> Iterator[Found]:
    """Find personal data; pieces of different kinds may overlap.

    Args:
        text: Where to look.
        kinds: What to look for, of `KINDS`.
        joined: Whether to find IBANs and card numbers too to which more digits are joined by a space.
            `4111 1111 1111 1111 12/27` reads as one number of 18 digits, whose check digit is wrong. To
            count personal data that is a number like any other; to hide it, better hide too much.
    """
    windows = [(run.start(), run.end() + 1) for run in _RUN.finditer(text)]
    whole = [(0, len(text))] if _IBAN_START.search(text) else []
    for kind in kinds:
        if kind == "email":
            yield from _emails(text)
            continue
        for start, end in whole if kind == "iban" else windows:
            for match in _PATTERNS[kind].finditer(text, start, end):
                plain = match.group() if kind == "ip" else _SPACING.sub("", match.group())
                if _checks(kind, plain):
                    yield Found(kind, match.start(), match.end(), plain.lower())
                elif joined and kind == "iban":
                    yield from _shorter(match)
            if joined and kind == "card":
                yield from _grouped(text, start, end)


def _grouped(text: str, start: int, end: int) -> Iterator[Found]:
    for match in _CARD_GROUPS.finditer(text, start, end):
        plain = _SPACING.sub("", match[1])
        if _luhn(plain):
            yield Found("card", match.start(1), match.end(1), plain)


def _shorter(match: re.Match[str]) -> Iterator[Found]:
    text = match.group()
    while (cut := text.rfind(" ")) > 0:
        text = text[:cut]
        plain = text.replace(" ", "")
        if len(plain) >= 15 and _mod97(plain):  # Norway's, the shortest, has 15
            yield Found("iban", match.start(), match.start() + cut, plain.lower())
            return


def _emails(text: str) -> Iterator[Found]:
    r"""As `[\w.+-]+@[\w-]+(?:\.[\w-]+)+` finds them, which takes time in the square of a long word."""
    begin = 0
    for match in _PATTERNS["email"].finditer(text):
        start = match.start()
        while start > begin and ((letter := text[start - 1]).isalnum() or letter in "_.+-"):
            start -= 1
        if start < match.start():
            begin = match.end()
            yield Found("email", start, begin, text[start:begin].lower())


def _checks(kind: str, plain: str) -> bool:
    if kind == "card":
        return _luhn(plain)
    return kind != "iban" or _mod97(plain)


def _luhn(digits: str) -> bool:
    """Whether the last digit checks the others (ISO/IEC 7812-1)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (2 if place % 2 else 1)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _mod97(iban: str) -> bool:
    """Whether an IBAN's check digits are right (ISO 13616)."""
    moved = iban[4:] + iban[:4]
    return int("".join(str(int(c, 36)) for c in moved)) % 97 == 1
