"""Personal data taken out of an exchange before it is stored.

It hides what has a form (`regraft.personal_data`) and what the user's own rules match. It does not know
names or postal addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from regraft.personal_data import KINDS, find
from regraft.records import CapturedExchange
from regraft.serve_sections import CaptureSection, RedactionRule

#: Levels of lists and mappings in the parameters that are looked into; what lies deeper is not stored.
_DEEPEST = 32
_DEEP = "<DEEP>"


class Redactor:
    """Puts `<EMAIL>`, `<IBAN>` … in the place of personal data.

    Where pieces overlap, they go together, under the name of the longest; of equal ones, of the one that
    begins first, then of the rule that comes first. So nothing that was recognised remains in part.

    Args:
        kinds: Kinds of `regraft.personal_data.KINDS`.
        rules: Own rules; what one matches without a letter is left alone.
    """

    def __init__(self, kinds: Sequence[str] = KINDS, rules: Sequence[RedactionRule] = ()) -> None:
        self._kinds = tuple(kinds)
        self._rules = tuple((rule.name, re.compile(rule.pattern)) for rule in rules)
        names = (*self._kinds, *(rule.name for rule in rules))
        self._order = {name: place for place, name in enumerate(names)}

    @classmethod
    def of(cls, section: CaptureSection) -> Redactor | None:
        """The redactor that a configuration asks for; None if it asks for none."""
        if section.redact == "all":
            return cls(KINDS, section.rules)
        if not section.redact:
            return None
        kinds = [kind for kind in KINDS if kind in section.redact]
        return cls(kinds, [rule for rule in section.rules if rule.name in section.redact])

    def redact(self, text: str) -> str:
        """The text without personal data."""
        spans = sorted(self._spans(text))
        if not spans:
            return text
        parts, done = [], 0
        start, end, best = spans[0][0], spans[0][1], spans[0]
        for span in [*spans[1:], (len(text) + 1, 0, "")]:
            if span[0] < end:
                end = max(end, span[1])
                best = min(best, span, key=self._rank)
                continue
            parts += [text[done:start], f"<{best[2].upper()}>"]
            done = end
            start, end, best = span[0], span[1], span
        return "".join([*parts, text[done:]])

    def apply(self, exchange: CapturedExchange) -> CapturedExchange:
        """The exchange without personal data in messages, answer, session, parameters and error."""
        fields = ("messages", "output", "session", "parameters", "error")
        return exchange.model_copy(update={name: self._value(getattr(exchange, name)) for name in fields})

    def _value(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, str):
            return self.redact(value)
        if isinstance(value, BaseModel):
            inside = {k: self._value(v, depth + 1) for k, v in value.__dict__.items() if k != "role"}
            return value.model_copy(update=inside)
        if not isinstance(value, dict | list | tuple):
            return value
        if depth == _DEEPEST:
            return _DEEP
        if isinstance(value, dict):
            return {key: self._value(inner, depth + 1) for key, inner in value.items()}
        return type(value)(self._value(inner, depth + 1) for inner in value)

    def _spans(self, text: str) -> Iterator[tuple[int, int, str]]:
        for found in find(text, self._kinds, joined=True):
            yield found.start, found.end, found.kind
        for name, pattern in self._rules:
            for match in pattern.finditer(text):
                if match.end() > match.start():
                    yield match.start(), match.end(), name

    def _rank(self, span: tuple[int, int, str]) -> tuple[int, int, int]:
        start, end, name = span
        return start - end, start, self._order[name]


def redact(text: str) -> str:
    """The text without personal data of any kind that is built in."""
    return _BUILT_IN.redact(text)


_BUILT_IN = Redactor()
