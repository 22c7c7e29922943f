"""Replay the prompts of a chat file against the endpoint, a few at a time, as separate users."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime

import httpx

from jobs.console import Say
from regraft.errors import ServiceError
from regraft.records import Example, Record


class Replayed(Record):
    """What a replay came to. Times are UTC, ISO 8601."""

    start: str
    end: str
    answered: int
    seconds: float
    completion_tokens: int
    by_version: dict[str, int]


def key_header() -> dict[str, str]:
    """What shows an endpoint with keys who asks: the key in REGRAFT_API_KEY, if there is one."""
    key = os.environ.get("REGRAFT_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


def replay(
    base: str, model: str, examples: Sequence[Example], *, max_tokens: int, concurrency: int, say: Say
) -> Replayed:
    """Ask every prompt once.

    Args:
        base: The endpoint's base URL, without `/v1`.
        model: The `model` to ask for.
        examples: Whose prompts to ask; the references are not sent.
        max_tokens: Longest answer.
        concurrency: Requests under way at a time.
        say: Called about every quarter.

    Raises:
        ServiceError: If any request failed: a replay counts as traffic only when all of it was answered.
    """
    return asyncio.run(_replay(base, model, examples, max_tokens, concurrency, say))


async def _replay(
    base: str, model: str, examples: Sequence[Example], max_tokens: int, concurrency: int, say: Say
) -> Replayed:
    gate = asyncio.Semaphore(concurrency)
    versions: Counter[str] = Counter()
    failures: list[str] = []
    done = tokens = 0
    started = datetime.now(UTC)

    async def ask(client: httpx.AsyncClient, example: Example) -> None:
        nonlocal done, tokens
        body = {
            "model": model,
            "messages": [m.model_dump() for m in example.prompt],
            "max_tokens": max_tokens,
            "temperature": 0,
            "user": f"replay-{example.id}",
        }
        async with gate:
            try:
                answer = await client.post(f"{base}/v1/chat/completions", json=body)
                answer.raise_for_status()
            except httpx.HTTPError as error:
                failures.append(f"{example.id}: {error}")
                return
        found = answer.json()
        versions[found["model"]] += 1
        tokens += found["usage"]["completion_tokens"]
        done += 1
        if done % max(1, len(examples) // 4) == 0:
            say(f"  {done}/{len(examples)} answered")

    async with httpx.AsyncClient(timeout=300, headers=key_header()) as client:
        await asyncio.gather(*(ask(client, e) for e in examples))
    ended = datetime.now(UTC)
    if failures:
        shown = "\n".join(failures[:5])
        raise ServiceError(
            f"{len(failures)} of {len(examples)} requests failed:\n{shown}", "see the endpoint's log"
        )
    return Replayed(
        start=started.isoformat(),
        end=ended.isoformat(),
        answered=done,
        seconds=(ended - started).total_seconds(),
        completion_tokens=tokens,
        by_version=dict(versions),
    )
