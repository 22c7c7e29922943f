"""A request as vLLM's `/v1/completions` takes it, and what the events of its answer give a row."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from typing import Any

import torch

from serving.engines.base import EngineError, GenerationRequest
from serving.engines.rows import Row
from serving.engines.vllm_process import error_of


def body(request: GenerationRequest, name: str, end_ids: frozenset[int]) -> dict[str, Any]:
    """The request as vLLM's `/v1/completions` takes it."""
    return {
        "model": name,
        "prompt": list(request.prompt_ids),
        "max_tokens": request.max_new_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
        "stop": list(request.stop),
        "stop_token_ids": sorted(end_ids),
        "stream": True,
        "return_token_ids": True,
        "logprobs": request.logprobs,
        "return_tokens_as_token_ids": True,
    }


async def choices(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, Any]]:
    """The choices of a stream of server-sent events.

    Raises:
        EngineError: If the stream tells of an error.
    """
    async for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        chunk = json.loads(line.removeprefix("data: "))
        if "error" in chunk:
            raise error_of(chunk["error"].get("code", 500), line.removeprefix("data: ").encode())
        for choice in chunk["choices"]:
            yield choice


def take(row: Row, choice: dict[str, Any], end_ids: frozenset[int], vocabulary: int) -> None:
    """Give a row what one chunk says."""
    asked = row.request.logprobs is not None
    for index, token in enumerate(choice.get("token_ids") or ()):
        if not row.done:
            row.take(token, end_ids, _logits(choice["logprobs"], index, vocabulary) if asked else None)
    reason = choice.get("finish_reason")
    if reason and not row.done:
        if reason not in {"stop", "length"}:
            raise EngineError(f"vLLM ended the answer: {reason}")
        row.finish(reason)


def _logits(told: dict[str, Any], index: int, vocabulary: int) -> torch.Tensor:
    """Logits that give the log-probabilities that vLLM tells of one token, which are few.

    What is left is shared out evenly, which puts no token before one that is told.
    """
    known = {told["tokens"][index]: told["token_logprobs"][index], **(told["top_logprobs"][index] or {})}
    ids = [int(name.removeprefix("token_id:")) for name in known]
    values = torch.tensor(list(known.values()), dtype=torch.float64)
    left = max(1 - float(values.exp().sum()), 1e-12)
    logits = torch.full((vocabulary,), math.log(left / max(vocabulary - len(ids), 1)), dtype=torch.float64)
    logits[ids] = values
    return logits
