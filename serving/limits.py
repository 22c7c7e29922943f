"""How much a key may ask: a bucket of requests and a bucket of tokens, each refilled within a minute.

In memory and for one process: behind several, a key may ask of each of them. Calls come from one event loop,
and none of them waits, so there is no lock.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Literal

from regraft.serve_sections import LimitsSection

Kind = Literal["requests", "tokens"]


class RateLimitedError(Exception):
    """Too much was asked.

    Args:
        kind: What of.
        message: For the client.
        headers: For the client.
    """

    def __init__(self, kind: Kind, message: str, headers: dict[str, str]) -> None:
        super().__init__(message)
        self.kind = kind
        self.headers = headers


class _Bucket:
    """Holds at most as much as runs into it within a minute.

    It may be owed something: an answer can take more tokens than were reserved for it.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self.level = float(per_minute)
        self._at = now

    def turn(self, per_minute: int, now: float) -> None:
        """Let in what has come since the last time; the limit may have changed."""
        self.level = min(per_minute, self.level + (now - self._at) * self.per_minute / 60)
        self.per_minute = per_minute
        self._at = now

    def seconds_until(self, amount: float) -> float:
        """Until it holds that much."""
        return max(0.0, amount - self.level) * 60 / self.per_minute


class Reservation:
    """What one request has been let in with. It ends once, by `settle`.

    Attributes:
        headers: How much is left, as OpenAI names it.
    """

    def __init__(self, tokens: int, bucket: _Bucket | None, headers: dict[str, str]) -> None:
        self.headers = headers
        self._reserved = tokens
        self._bucket = bucket

    def settle(self, used: int | None) -> None:
        """Charge what was used instead of what was reserved; the reservation itself if that is not known."""
        bucket, self._bucket = self._bucket, None
        if bucket is not None and used is not None:
            bucket.level = min(bucket.per_minute, bucket.level + self._reserved - used)


class Limiter:
    """The buckets of all callers.

    Args:
        clock: Seconds that never run backwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: dict[tuple[str, Kind], _Bucket] = {}

    def reserve(self, caller: str, limits: LimitsSection, tokens: int) -> Reservation:
        """Let a request in, and set the tokens aside that it may use.

        Args:
            caller: Whose buckets.
            limits: What they hold; a change counts from now on.
            tokens: Upper estimate of prompt and answer together.

        Raises:
            RateLimitedError: If a bucket does not hold that much; nothing is taken from either then.
        """
        requests = self._bucket(caller, "requests", limits.requests_per_minute)
        of_tokens = self._bucket(caller, "tokens", limits.tokens_per_minute)
        wanted: list[tuple[Kind, _Bucket, int]] = []
        if requests is not None:
            wanted.append(("requests", requests, 1))
        if of_tokens is not None and tokens:
            wanted.append(("tokens", of_tokens, tokens))
        buckets: list[tuple[Kind, _Bucket | None]] = [("requests", requests), ("tokens", of_tokens)]
        for kind, bucket, amount in wanted:
            if amount > bucket.per_minute:
                raise RateLimitedError(
                    kind,
                    f"the limit is {bucket.per_minute} {kind} a minute; this request alone may use {amount}: "
                    "shorten it or lower its max_tokens",
                    # OpenAI's clients heed the second: to ask again is of no use.
                    {**_headers(buckets), "x-should-retry": "false"},
                )
            if wait := bucket.seconds_until(amount):
                seconds = max(1, math.ceil(wait))
                raise RateLimitedError(
                    kind,
                    f"the limit is {bucket.per_minute} {kind} a minute; try again in {seconds} s",
                    {**_headers(buckets), "Retry-After": str(seconds)},
                )
        for _, bucket, amount in wanted:
            bucket.level -= amount
        return Reservation(tokens, of_tokens, _headers(buckets))

    def _bucket(self, caller: str, kind: Kind, per_minute: int | None) -> _Bucket | None:
        if per_minute is None:
            self._buckets.pop((caller, kind), None)
            return None
        now = self._clock()
        bucket = self._buckets.setdefault((caller, kind), _Bucket(per_minute, now))
        bucket.turn(per_minute, now)
        return bucket


def _headers(buckets: list[tuple[Kind, _Bucket | None]]) -> dict[str, str]:
    headers = {}
    for kind, bucket in buckets:
        if bucket is not None:
            headers[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level)))
            headers[f"x-ratelimit-reset-{kind}"] = _duration(bucket.seconds_until(bucket.per_minute))
    return headers


def _duration(seconds: float) -> str:
    """As OpenAI writes it: 20ms, 7s, 1m12s."""
    if seconds < 1:
        return f"{math.ceil(1000 * seconds)}ms"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"
