"""How answers are written down: the JSON of the OpenAI API, whole or in chunks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serving.engines.base import TokenLogprob

#: What JSON has no number for is written as this, as OpenAI does.
_LOWEST = -9999.0


@dataclass(frozen=True)
class Choice:
    """One finished answer."""

    text: str
    reason: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True)
class Counts:
    """How many tokens there were, over all prompts and all choices."""

    prompt: int
    completion: int


class Reply:
    """Builds the JSON of one answer, whole or in chunks.

    Args:
        id: Of the answer.
        created: Seconds since the epoch.
        model: The served id of the version that answers.
        chat: Whether this answers a chat.
        logprobs: How many likeliest tokens were asked for; None if no log-probabilities were.
        usage: Whether a stream ends with the token counts.
    """

    def __init__(
        self,
        id: str,
        created: int,
        model: str,
        *,
        chat: bool,
        logprobs: int | None = None,
        usage: bool = False,
    ) -> None:
        self._chat = chat
        self._logprobs = logprobs
        self._object = "chat.completion" if chat else "text_completion"
        self._head: dict[str, Any] = {"id": id, "created": created, "model": model}
        # Where the last chunk tells the counts, the others say that they do not.
        self._no_usage: dict[str, Any] = {"usage": None} if usage else {}

    def whole(self, answers: Sequence[Choice], counts: Counts) -> dict[str, Any]:
        """The answer in one piece."""
        choices = [self._whole_choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head, "object": self._object, "choices": choices, "usage": _usage(counts)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, which says who speaks; only chats have one."""
        if not self._chat:
            return None
        return self._chunk(index, {"delta": {"role": "assistant", "content": ""}}, None, None)

    def delta(self, index: int, text: str, tokens: Sequence[TokenLogprob] = ()) -> dict[str, Any]:
        """A chunk with more text."""
        said = {"delta": {"content": text}} if self._chat else {"text": text}
        return self._chunk(index, said, self._told(tokens) if tokens else None, None)

    def end(self, index: int, reason: str) -> dict[str, Any]:
        """The chunk with which a choice ends."""
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return self._chunk(index, said, None, reason)

    def usage(self, counts: Counts) -> dict[str, Any]:
        """The last chunk: no choice, only the token counts."""
        return {**self._head, "object": self._chunk_object, "choices": [], "usage": _usage(counts)}

    @property
    def _chunk_object(self) -> str:
        return "chat.completion.chunk" if self._chat else self._object

    def _chunk(
        self, index: int, said: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}
        return {**self._head, "object": self._chunk_object, "choices": [choice], **self._no_usage}

    def _whole_choice(self, index: int, answer: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        said: dict[str, Any] = {"message": message} if self._chat else {"text": answer.text}
        logprobs = None if self._logprobs is None else self._told(answer.tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": answer.reason}

    def _told(self, tokens: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self._chat:
            content = [{**_entry(token), "top_logprobs": [_entry(t) for t in token.top]} for token in tokens]
            return {"content": content, "refusal": None}
        # The drawn token is among the likeliest even if it is not one of them: so does OpenAI.
        tops = [{_name(t.spelling): _finite(t.logprob) for t in (*token.top, token)} for token in tokens]
        return {
            "tokens": [_name(token.spelling) for token in tokens],
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": tops if self._logprobs else None,
            "text_offset": [token.offset for token in tokens],
        }


def _entry(token: TokenLogprob) -> dict[str, Any]:
    spelling = token.spelling
    return {"token": _name(spelling), "logprob": _finite(token.logprob), "bytes": list(spelling)}


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def _name(spelling: bytes) -> str:
    r"""A token as text; one that is no whole characters is told by its bytes, as `\xf0\x9f`."""
    try:
        return spelling.decode()
    except UnicodeDecodeError:
        return "".join(f"\\x{byte:02x}" for byte in spelling)


def _usage(counts: Counts) -> dict[str, Any]:
    """Token counts; what this endpoint never has is 0, so that clients need not ask whether it is there."""
    return {
        "prompt_tokens": counts.prompt,
        "completion_tokens": counts.completion,
        "total_tokens": counts.prompt + counts.completion,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def sse(data: dict[str, Any] | Literal["[DONE]"]) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, allow_nan=False)
    return b"data: " + text.encode() + b"\n\n"


def model_card(id: str, created: int) -> dict[str, Any]:
    """An entry of `/v1/models`."""
    return {"id": id, "object": "model", "created": created, "owned_by": "regraft"}
