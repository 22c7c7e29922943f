from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from monitoring.policy import decide
from regraft.config import RetrainSection
from regraft.records import DriftReport

NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
SETTINGS = RetrainSection(min_fresh=20, cooldown_seconds=3600)


def report(status: str, identifier: str = "abc") -> DriftReport:
    return DriftReport(
        id=identifier,
        model="acme/shop 2",
        model_version=1,
        reference_id="r",
        window_start="",
        window_end="",
        rows=10,
        reference_rows=100,
        status=status,
        p_value=None,
        effect=None,
        alpha=0.01,
        summary="",
    )


@pytest.mark.parametrize(
    ("status", "fresh", "since", "action", "words"),
    [
        ("stable", 99, None, "nothing", "No drift"),
        ("insufficient", 99, None, "nothing", "too few"),
        ("drift", 0, None, "collect", "0 reviewed fresh examples, 20 needed"),
        ("drift", 19, None, "collect", "19 reviewed"),
        ("drift", 20, None, "retrain", "20 reviewed"),
        ("drift", 20, 3599, "collect", "too recent"),
        ("drift", 20, 3600, "retrain", "retrain"),
        ("drift", 3, 10, "collect", "3 reviewed"),
    ],
)
def test_policy(status, fresh, since, action, words):
    last = None if since is None else NOW - timedelta(seconds=since)
    decision = decide(report(status), SETTINGS, fresh_examples=fresh, last_retrain=last, now=NOW)
    assert decision.action == action
    assert words in decision.reason
    assert (decision.job_id is not None) == (action == "retrain")
    assert decision.drift_report_id == "abc"


def test_the_same_report_is_the_same_job_whenever_it_is_decided():
    def job(identifier: str, hours: int) -> str | None:
        now = NOW + timedelta(hours=hours)
        return decide(
            report("drift", identifier), SETTINGS, fresh_examples=30, last_retrain=None, now=now
        ).job_id

    assert job("abc", 0) == job("abc", 5) != job("other", 0)
    assert job("abc", 0).startswith("regraft-retrain-acme-shop-2-")


def test_times_without_a_zone_are_utc():
    last = (NOW - timedelta(seconds=5)).replace(tzinfo=None)
    assert (
        decide(report("drift"), SETTINGS, fresh_examples=30, last_retrain=last, now=NOW).action == "collect"
    )
