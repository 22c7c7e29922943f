"""From what a client asks to the token ids that the model continues."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from regraft.records import Message
from serving.engines.base import Engine
from serving.openai_api import ApiError, ChatRequest, CompletionRequest


@dataclass(frozen=True)
class Prompt:
    """A prompt as the capture keeps it and as the engine takes it."""

    messages: Sequence[Message]
    ids: tuple[int, ...]


async def read_prompts(engine: Engine, body: ChatRequest | CompletionRequest) -> list[Prompt]:
    """Encode the prompts of a request, in a thread.

    Raises:
        ApiError: If the model cannot take one; 400, naming the field.
    """
    if isinstance(body, ChatRequest):
        return [await _read("messages", engine, [m.message for m in body.messages])]
    return [await _read("prompt", engine, prompt) for prompt in body.prompts]


async def _read(field: str, engine: Engine, asked: list[Message] | list[int] | str) -> Prompt:
    try:
        prompt = await asyncio.to_thread(_encode, engine, asked)
    except Exception as error:  # chat templates refuse what they do not like in ways of their own
        raise ApiError(400, f"{field}: {error}", code="invalid_value", param=field) from error
    if not 0 < len(prompt.ids) < engine.context_length:
        raise ApiError(
            400,
            f"{field}: {len(prompt.ids)} tokens, but the model's context holds {engine.context_length}, "
            "answer included",
            code="context_length_exceeded",
            param=field,
        )
    return prompt


def _encode(engine: Engine, asked: list[Message] | list[int] | str) -> Prompt:
    if isinstance(asked, str):
        return Prompt([Message(role="user", content=asked)], tuple(engine.encode_text(asked)))
    messages = [part for part in asked if isinstance(part, Message)]
    if messages:
        return Prompt(messages, tuple(engine.encode_chat(messages)))
    ids = tuple(part for part in asked if isinstance(part, int))
    unknown = next((token for token in ids if token >= engine.vocabulary), None)
    if unknown is not None:
        raise ValueError(f"there is no token {unknown}; the vocabulary has {engine.vocabulary}")
    return Prompt([Message(role="user", content=engine.decode_text(ids))], ids)
