"""Ask an endpoint as its users do, from a process of its own; knows nothing of Regraft.

    python -P benchmarks/serving_load.py '{"url": "http://127.0.0.1/v1/completions", "bodies": [{}]}'
    python -P benchmarks/serving_load.py -

Each answer is one line of JSON, written as soon as it has come whole or failed. See `Load` for what to ask.
An empty line ends the answers of each load; with `-` loads are lines of standard input.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import aiohttp


@dataclass(frozen=True)
class Load:
    """What to ask, and how often.

    Attributes:
        url: Where to.
        bodies: Of the requests; taken by turns.
        clients: With no rate: so many ask at once, each as soon as it has its answer.
        rate: Requests a second, begun whether others are answered or not; None for clients.
        seconds: For how long, or
        count: how many; the first that is reached ends it.
        timeout_s: How long one answer may take.
        warm: Requests before, which are not told: they open connections.
    """

    url: str
    bodies: list[dict[str, Any]]
    clients: int = 1
    rate: float | None = None
    seconds: float = 3600.0
    count: int = 10**9
    timeout_s: float = 120.0
    warm: int = 0


@dataclass
class Told:
    """What became of a request.

    Attributes:
        begun: When it was sent, in seconds of the machine's monotonic clock.
        seconds: Until its answer had come whole, or failed.
        first: Seconds until the first event with text of a stream.
        status: Of HTTP; 0 if there was none.
        version: As the header says.
        id: Of the answer, if it came whole.
        text: Of the first choice.
        error: Why it is not whole.
    """

    begun: float
    seconds: float = 0.0
    first: float | None = None
    status: int = 0
    version: str = ""
    id: str = ""
    text: str = ""
    error: str = ""


async def ask(http: aiohttp.ClientSession, load: Load, body: dict[str, Any]) -> Told:
    """Send one request and read its answer to the end."""
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    told = Told(time.monotonic())
    try:
        async with http.post(load.url, json=body, timeout=timeout) as reply:
            told.status, told.version = reply.status, reply.headers.get("x-regraft-version", "")
            if reply.status == 200 and body.get("stream"):
                await _stream(reply, told)
            else:
                whole = json.loads(await reply.read())
                if reply.status == 200:
                    told.id, told.text = whole["id"], _said(whole["choices"][0], "message")
                else:
                    told.error = str(whole)[:300]
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        told.error = f"{type(error).__name__}: {error}"[:300]
    told.seconds = time.monotonic() - told.begun
    return told


async def _stream(reply: aiohttp.ClientResponse, told: Told) -> None:
    found, done = "", False
    async for line in reply.content:
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            done = True
        elif data:
            event = json.loads(data)
            if "error" in event:
                told.error = str(event["error"])[:300]
            elif event["choices"]:
                found = event["id"]
                more = _said(event["choices"][0], "delta")
                if more and told.first is None:
                    told.first = time.monotonic() - told.begun
                told.text += more
    if done:
        told.id = found
    else:
        told.error = told.error or "the stream ended before its end"


def _said(choice: dict[str, Any], part: str) -> str:
    return str(choice["text"] if "text" in choice else choice[part].get("content") or "")


async def run(loads: Iterable[str]) -> None:
    """Ask one load after another, on the same connections, and tell of each answer."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:
        for line in loads:
            await _run(http, Load(**json.loads(line)))
            sys.stdout.write("\n")
            sys.stdout.flush()


async def _run(http: aiohttp.ClientSession, load: Load) -> None:
    for number in range(load.warm):
        await ask(http, load, load.bodies[number % len(load.bodies)])
    begun = time.monotonic()
    numbers = iter(range(load.count))

    async def one(number: int) -> Told:
        told = await ask(http, load, load.bodies[number % len(load.bodies)])
        sys.stdout.write(json.dumps(asdict(told)) + "\n")
        sys.stdout.flush()
        return told

    async def client() -> None:
        for number in numbers:  # which all clients share
            if time.monotonic() - begun >= load.seconds:
                return
            if not (await one(number)).status:
                await asyncio.sleep(0.05)  # nobody listens

    async def arrivals(rate: float) -> None:
        async with asyncio.TaskGroup() as running:
            for number in numbers:
                due = begun + number / rate
                if due - begun >= load.seconds:
                    return
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                running.create_task(one(number))

    if load.rate is None:
        await asyncio.gather(*(client() for _ in range(load.clients)))
    else:
        await arrivals(load.rate)


if __name__ == "__main__":
    asyncio.run(run(sys.stdin if sys.argv[1] == "-" else sys.argv[1:]))
