"""From token ids, one at a time, to text that may be shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Decodes a growing answer.

    A token may hold part of a character (byte-level vocabularies) and its spelling may depend on the one
    before it (leading spaces). So a window is decoded that begins one settled token early, and text is
    given out only when it does not end in the middle of a character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # the window begins here
        self._settled = 0  # tokens before this have been given out

    def push(self, token: int) -> str:
        """Take one more token; return the text that is now certain."""
        self._ids.append(token)
        text = self._fresh()
        if text.endswith(_UNFINISHED):
            return ""
        self._start, self._settled = self._settled, len(self._ids)
        return text

    def flush(self) -> str:
        """The rest, however it ends."""
        text = self._fresh()
        self._start = self._settled = len(self._ids)
        return text

    def _fresh(self) -> str:
        known = self._decode(self._ids[self._start : self._settled])
        return self._decode(self._ids[self._start :])[len(known) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)


class StopScanner:
    """Cuts a text before the first stop string, holding back what might be the beginning of one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [s for s in stop if s]
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take more text.

        Returns:
            The text that may be given out, and whether a stop string ended it.
        """
        if not self._stop:
            return text, False
        self._held += text
        found = [at for at in (self._held.find(s) for s in self._stop) if at >= 0]
        if found:
            out, self._held = self._held[: min(found)], ""
            return out, True
        keep = max(_overlap(self._held, s) for s in self._stop)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """What was held back; no stop string came of it."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
