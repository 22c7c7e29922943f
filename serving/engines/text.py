"""From token ids, one at a time, to text that may be shown."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


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

    def whole(self, ids: Sequence[int]) -> str:
        """A whole answer."""
        return self._decode(ids)

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


class Spelling:
    """The bytes of single tokens.

    Decoding one token alone loses the parts of characters and, in SentencePiece vocabularies, the leading
    space; so its entry in the vocabulary is read, which has three common forms: bytes written as printable
    characters (GPT-2), `<0x0A>` for a byte, and `▁` for a space (both SentencePiece).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = frozenset(tokenizer.added_tokens_decoder)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = None if backend is None else backend.decoder
        steps = _steps({} if decoder is None else json.loads(decoder.__getstate__()))
        self._bytes = _printable_bytes() if any(s.get("type") == "ByteLevel" for s in steps) else None

    def __call__(self, token: int) -> bytes:
        """The bytes of a token; none of an id that the tokenizer does not know."""
        entry = self._tokenizer.convert_ids_to_tokens(token)
        if entry is None:
            return b""
        if token in self._added:
            return str(entry).encode()
        if self._bytes is not None and all(character in self._bytes for character in entry):
            return bytes(self._bytes[character] for character in entry)
        byte = _BYTE.fullmatch(entry)
        return (
            bytes([int(byte[1], 16)])
            if byte
            else str(entry).replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        )


def _steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
    """A decoder's steps, from how the tokenizers library writes it down."""
    nested = [_steps(inner) for inner in decoder.get("decoders", ())]
    return [decoder, *(step for steps in nested for step in steps)]


def _printable_bytes() -> dict[str, int]:
    """What byte each character of a byte-level vocabulary stands for; the table is GPT-2's.

    Printable bytes of Latin-1 stand for themselves, the others for the characters from 256 on, in order.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


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
