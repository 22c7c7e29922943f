from __future__ import annotations

import pytest

from regraft.serve_sections import LimitsSection
from serving.limits import Limiter, RateLimitedError


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_requests_come_back_at_the_rate_of_the_limit() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), LimitsSection(requests_per_minute=6)
    left = [limiter.reserve("a", limits, 0).headers["x-ratelimit-remaining-requests"] for _ in range(6)]
    assert left == ["5", "4", "3", "2", "1", "0"]
    with pytest.raises(RateLimitedError) as refused:
        limiter.reserve("a", limits, 0)
    assert refused.value.kind == "requests"
    assert refused.value.headers == {
        "Retry-After": "10",
        "x-ratelimit-limit-requests": "6",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }
    limiter.reserve("b", limits, 0)  # another key has buckets of its own
    clock.now += 10
    limiter.reserve("a", limits, 0)
    with pytest.raises(RateLimitedError):
        limiter.reserve("a", limits, 0)


def test_a_burst_cannot_reserve_more_than_there_is_and_gets_back_what_it_did_not_use() -> None:
    limiter, limits = Limiter(Clock()), LimitsSection(tokens_per_minute=1000)
    first, _ = limiter.reserve("a", limits, 400), limiter.reserve("a", limits, 400)
    with pytest.raises(RateLimitedError) as refused:
        limiter.reserve("a", limits, 400)
    assert refused.value.kind == "tokens"
    assert refused.value.headers["Retry-After"] == "12"  # 200 of 1000 a minute
    first.settle(50)
    first.settle(0)  # only the first counts
    assert limiter.reserve("a", limits, 400).headers["x-ratelimit-remaining-tokens"] == "150"


def test_what_was_used_beyond_the_reservation_is_owed() -> None:
    clock = Clock()
    limiter, limits = Limiter(clock), LimitsSection(tokens_per_minute=600)
    limiter.reserve("a", limits, 100).settle(900)
    with pytest.raises(RateLimitedError) as refused:
        limiter.reserve("a", limits, 10)
    assert refused.value.headers["Retry-After"] == "31"
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"
    clock.now += 31
    limiter.reserve("a", limits, 10)


def test_a_refused_request_takes_nothing() -> None:
    limiter = Limiter(Clock())
    limits = LimitsSection(requests_per_minute=2, tokens_per_minute=100)
    limiter.reserve("a", limits, 90)
    for _ in range(5):
        with pytest.raises(RateLimitedError, match="100 tokens"):
            limiter.reserve("a", limits, 20)
    assert limiter.reserve("a", limits, 10).headers["x-ratelimit-remaining-requests"] == "0"


def test_more_than_the_whole_bucket_is_refused_for_good() -> None:
    limiter, limits = Limiter(Clock()), LimitsSection(tokens_per_minute=100)
    with pytest.raises(RateLimitedError, match="may use 101") as refused:
        limiter.reserve("a", limits, 101)
    assert refused.value.headers["x-should-retry"] == "false"
    assert "Retry-After" not in refused.value.headers


def test_a_changed_limit_counts_from_the_next_request() -> None:
    clock = Clock()
    limiter = Limiter(clock)
    limiter.reserve("a", LimitsSection(requests_per_minute=100), 0)
    tight = LimitsSection(requests_per_minute=1)
    limiter.reserve("a", tight, 0)
    with pytest.raises(RateLimitedError):
        limiter.reserve("a", tight, 0)
    limiter.reserve("a", LimitsSection(), 0)
