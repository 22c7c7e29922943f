"""What becomes of a drift report: every rule, its bounds, and what never happens."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from monitoring.check import _kind
from monitoring.explaining import Explained
from monitoring.policy import Facts, decide, job_of
from monitoring.waiting import blackout_end
from regraft.config import RetrainSection
from regraft.records import DriftReport

#: A Friday.
NOW = datetime(2026, 1, 2, 12, tzinfo=UTC)
KINDS = ("new_content", "behaviour", "prompt_mix", "quality", None)
ALARMS = ("drift", "prompts", "error_rate", "latency_p95_ms", "first_token_p95_ms", "refusal_rate")


def report(status: str = "drift", kind: str | None = "new_content", **more: Any) -> DriftReport:
    fields: dict[str, Any] = {
        "id": "abc",
        "model": "acme/shop 2",
        "model_version": 1,
        "reference_id": "r",
        "window_start": "",
        "window_end": "",
        "rows": 10,
        "reference_rows": 100,
        "status": status,
        "p_value": None,
        "effect": None,
        "alpha": 0.01,
        "summary": "",
        "kind": kind,
        "alarms": ("drift",) if status == "drift" else (),
        "run_id": "run",
    }
    return DriftReport.model_validate(fields | more)


def facts(**more: Any) -> Facts:
    return Facts.model_validate({"alarm_id": "alarm", "fresh_examples": 20, "former_champion": 3} | more)


def settings(**more: Any) -> RetrainSection:
    return RetrainSection.model_validate(more)


@pytest.mark.parametrize(
    ("status", "p_value", "action", "words"),
    [
        ("insufficient", None, "nothing", "10 exchanges against a reference of 100 are too few"),
        ("stable", 0.4, "nothing", "No drift"),
        ("stable", None, "nothing", "Whether texts changed cannot be told"),
        ("suspected", 0.004, "watch", "no alarm"),
    ],
)
def test_without_an_alarm_nothing_is_done(
    status: str, p_value: float | None, action: str, words: str
) -> None:
    decision = decide(report(status, p_value=p_value), settings(), facts(), now=NOW)
    assert (decision.action, decision.page, decision.job_id) == (action, False, None)
    assert words in decision.reason
    assert (decision.run_id, decision.drift_report_id) == ("run", "abc")


@pytest.mark.parametrize("kind", ["behaviour", "quality"])
@pytest.mark.parametrize(
    ("roll_back", "former", "action", "automatic", "words"),
    [
        ("never", 3, "watch", True, "retrain.roll_back is never"),
        ("propose", None, "watch", True, "no former champion"),
        ("automatic", None, "watch", True, "no former champion"),
        ("propose", 3, "roll_back", False, "version 3, if a person"),
        ("automatic", 3, "roll_back", True, "go back to version 3"),
    ],
)
def test_what_is_answered_otherwise_or_worse_is_gone_back_from(
    kind: str, roll_back: str, former: int | None, action: str, automatic: bool, words: str
) -> None:
    alarms = ("drift",) if kind == "behaviour" else ("refusal_rate", "latency_p95_ms")
    decision = decide(
        report(kind=kind, alarms=alarms),
        settings(roll_back=roll_back),
        facts(former_champion=former),
        now=NOW,
    )
    assert (decision.action, decision.automatic, decision.page) == (action, automatic, True)
    assert words in decision.reason
    assert decision.job_id is None


@pytest.mark.parametrize("alarms", [("latency_p95_ms",), ("error_rate", "first_token_p95_ms")])
@pytest.mark.parametrize("status", ["drift", "stable", "insufficient", "suspected"])
def test_an_endpoint_that_is_slow_or_fails_is_looked_at_and_keeps_its_champion(
    alarms: tuple[str, ...], status: str
) -> None:
    decision = decide(
        report(status, "quality", alarms=alarms), settings(roll_back="automatic"), facts(), now=NOW
    )
    assert (decision.action, decision.page) == ("watch", True)
    assert ", ".join(alarms) in decision.reason


def test_empty_answers_are_the_models_own_wherever_they_are_looked_at() -> None:
    seen = report("drift", "quality", alarms=("empty_rate", "latency_p95_ms"))
    assert decide(seen, settings(roll_back="automatic"), facts(), now=NOW).action == "roll_back"
    new = Explained("new_content")
    assert _kind(new, ("drift", "empty_rate")) == "new_content"
    assert _kind(new, ("drift", "error_rate")) == "quality"


def test_answers_that_got_worse_count_though_there_are_too_few_texts_to_compare() -> None:
    seen = report("insufficient", None, alarms=("refusal_rate",))
    assert decide(seen, settings(), facts(), now=NOW).action == "roll_back"


def test_new_content_with_worse_answers_is_learned_and_not_gone_back_from() -> None:
    seen = report(alarms=("drift", "refusal_rate"))
    assert decide(seen, settings(), facts(), now=NOW).action == "retrain"


def test_an_alarm_nobody_can_explain_is_collected_and_shown_to_a_person() -> None:
    decision = decide(report(kind=None), settings(), facts(), now=NOW)
    assert (decision.action, decision.page) == ("collect", True)
    assert "could not be told" in decision.waiting[0]


def test_another_mix_of_prompts_is_watched_until_a_topic_is_answered_worse() -> None:
    seen = report(kind="prompt_mix")
    assert decide(seen, settings(), facts(), now=NOW).action == "watch"
    worse = decide(seen, settings(), facts(segment_worse=("bills, meter",)), now=NOW)
    assert worse.action == "retrain"
    assert "bills, meter" in worse.reason
    assert (
        decide(seen, settings(), facts(segment_worse=("x",), fresh_examples=0), now=NOW).action == "collect"
    )


@pytest.mark.parametrize(
    ("given_settings", "given_facts", "action", "words"),
    [
        ({}, {"fresh_examples": 19}, "collect", "19 reviewed fresh examples, 20 needed"),
        ({}, {"fresh_examples": 20}, "retrain", "20 reviewed"),
        (
            {},
            {"fresh_examples": 39, "tried_examples": 79},
            "collect",
            "39 reviewed fresh examples, 40 needed after one with 79 was rejected",
        ),
        ({}, {"fresh_examples": 40, "tried_examples": 79}, "retrain", ""),
        ({"again_fresh": 0.25}, {"fresh_examples": 20, "tried_examples": 79}, "retrain", ""),
        ({"again_fresh": 0}, {"fresh_examples": 20, "tried_examples": 900}, "retrain", ""),
        ({}, {"last_retrain": NOW - timedelta(hours=23)}, "collect", "too recent"),
        ({}, {"last_retrain": NOW - timedelta(hours=24)}, "retrain", ""),
        (
            {"cooldown_seconds": 3600},
            {"last_retrain": NOW - timedelta(seconds=3599)},
            "collect",
            "too recent",
        ),
        ({"cooldown_seconds": 3600}, {"last_retrain": NOW - timedelta(seconds=3600)}, "retrain", ""),
        ({"cooldown_seconds": 60}, {"last_retrain": datetime(2026, 1, 2, 11, 59, 30)}, "collect", "12:01"),
        ({"confirmations": 2}, {"suspected_since_alarm": 1}, "collect", "1 of 2 further windows"),
        ({"confirmations": 2}, {"suspected_since_alarm": 2}, "retrain", ""),
        ({"gpu_hours_a_month": 8}, {"gpu_hours": 8}, "collect", "8 GPU-hours of the 8 for 30 days"),
        ({"gpu_hours_a_month": 8}, {"gpu_hours": 7.9}, "retrain", ""),
        ({"gpu_hours_a_month": 0}, {}, "collect", "0 GPU-hours of the 0"),
        ({"cpu_hours_a_month": 5}, {"cpu_hours": 5.5}, "collect", "5.5 core-hours of the 5"),
        ({"cpu_hours_a_month": 5}, {"cpu_hours": 1, "gpu_hours": 99}, "retrain", ""),
        ({}, {"under_way": "other-job"}, "collect", "another retraining is under way as other-job"),
        ({"blackout": ["fri 12:00-mon 07:00"]}, {}, "collect", "Not before 2026-01-05 07:00 UTC"),
        ({"blackout": ["fri 12:01-mon 07:00"]}, {}, "retrain", ""),
        ({"blackout": ["fri 08:00-fri 12:00"]}, {}, "retrain", ""),
        ({"blackout": ["wed 00:00-tue 23:59", "tue 23:00-wed 01:00"]}, {}, "collect", "no retraining starts"),
    ],
)
def test_a_retraining_waits_for_what_it_needs(
    given_settings: dict[str, Any], given_facts: dict[str, Any], action: str, words: str
) -> None:
    decision = decide(report(), settings(**given_settings), facts(**given_facts), now=NOW)
    assert decision.action == action
    assert words in decision.reason
    assert (decision.job_id is not None) == (action == "retrain")
    assert bool(decision.waiting) == (action == "collect")


def test_all_that_is_waited_for_is_named_with_the_time_from_which_it_may_start() -> None:
    decision = decide(
        report(),
        settings(
            min_fresh=30, confirmations=1, cooldown_seconds=7200, gpu_hours_a_month=1, blackout=["fri 13:00-sat 06:00"]
        ),
        facts(last_retrain=NOW, gpu_hours=2, affordable=NOW + timedelta(hours=3)),
        now=NOW,
    )  # fmt: skip
    # At 14:00 the cooldown ends, at 15:00 there are hours again, and both lie in the blackout.
    assert len(decision.waiting) == 4
    for part in ("20 reviewed", "0 of 1", "2026-01-02 14:00 UTC", "2026-01-02 15:00 UTC"):
        assert part in decision.reason
    assert decision.reason.endswith("Not before 2026-01-03 06:00 UTC.")


def test_a_retraining_that_ended_or_is_under_way_is_not_decided_again() -> None:
    ended = decide(report(), settings(), facts(settled="rejected: no better"), now=NOW)
    assert (ended.action, ended.page) == ("watch", True)
    assert "rejected: no better" in ended.reason
    job = job_of(report().model, "alarm")
    running = decide(report(), settings(), facts(under_way=job), now=NOW)
    assert (running.action, running.page) == ("watch", False)
    assert job in running.reason


def test_one_alarm_is_one_retraining_whatever_check_decides_it() -> None:
    first = decide(report(), settings(), facts(), now=NOW)
    later = decide(report(id="def"), settings(), facts(fresh_examples=99), now=NOW + timedelta(hours=5))
    other = decide(report(), settings(), facts(alarm_id="other"), now=NOW)
    assert (first.job_id, first.id) == (later.job_id, later.id)
    assert first.job_id != other.job_id
    assert first.id != other.id
    assert first.job_id is not None
    assert first.job_id.startswith("regraft-retrain-acme-shop-2-")
    assert decide(report("stable"), settings(), facts(), now=NOW).id != decide(
        report("stable", id="def"), settings(), facts(), now=NOW
    ).id  # fmt: skip


@pytest.mark.parametrize(
    ("blackout", "moment", "end"),
    [
        (["sun 22:00-mon 02:00"], "2026-01-04T23:30", "2026-01-05T02:00"),  # over Sunday
        (["sun 22:00-mon 02:00"], "2026-01-05T01:59", "2026-01-05T02:00"),
        (["sun 22:00-mon 02:00"], "2026-01-05T02:00", "2026-01-05T02:00"),
        (["fri 10:00-fri 13:00", "fri 12:30-fri 15:00"], "2026-01-02T12:00:30", "2026-01-02T15:00"),
        (["fri 10:00-fri 10:00"], "2026-01-02T10:00", "2026-01-02T10:00"),
        (["mon 00:00-thu 00:00", "thu 00:00-mon 00:00"], "2026-01-02T10:00", None),
    ],
)
def test_the_end_of_a_blackout(blackout: list[str], moment: str, end: str | None) -> None:
    found = blackout_end(blackout, datetime.fromisoformat(moment))
    assert found == (None if end is None else datetime.fromisoformat(end).replace(tzinfo=UTC))


SPANS = st.sampled_from(
    ["fri 16:00-mon 07:00", "sat 00:00-sun 23:00", "mon 09:00-mon 17:00", "wed 06:00-thu 05:00"]
)
CASES = {
    "status": st.sampled_from(["stable", "suspected", "drift", "insufficient"]),
    "kind": st.sampled_from(KINDS),
    "alarms": st.lists(st.sampled_from(ALARMS), unique=True),
    "rules": st.fixed_dictionaries(
        {
            "blackout": st.lists(SPANS, max_size=2),
            "gpu_hours_a_month": st.none() | st.integers(0, 4),
            "cpu_hours_a_month": st.none() | st.integers(0, 4),
            "confirmations": st.integers(0, 2),
            "min_fresh": st.integers(1, 3),
            "roll_back": st.sampled_from(["never", "propose", "automatic"]),
        }
    ),
    "known": st.fixed_dictionaries(
        {
            "fresh_examples": st.integers(0, 4),
            "gpu_hours": st.integers(0, 4),
            "cpu_hours": st.integers(0, 4),
            "under_way": st.none() | st.sampled_from(["another", job_of("acme/shop 2", "alarm")]),
            "former_champion": st.none() | st.just(3),
            "suspected_since_alarm": st.integers(0, 2),
            "segment_worse": st.sampled_from([(), ("bills",)]),
        }
    ),
    "minutes": st.integers(0, 2 * 7 * 24 * 60),
}  # fmt: skip


@given(**CASES)
def test_what_never_happens(
    status: str,
    kind: str | None,
    alarms: list[str],
    rules: dict[str, Any],
    known: dict[str, Any],
    minutes: int,
) -> None:
    now = NOW + timedelta(minutes=minutes)
    rule, fact = settings(**rules), facts(**known)
    decision = decide(report(status, kind, alarms=tuple(alarms)), rule, fact, now=now)
    retrain, gone_back = decision.action == "retrain", decision.action == "roll_back"
    assert (decision.job_id is not None) == retrain
    assert bool(decision.waiting) == (decision.action == "collect")
    if retrain:
        assert status == "drift"
        assert kind in {"new_content", "prompt_mix"}
        assert kind == "new_content" or fact.segment_worse
        assert fact.under_way is None
        assert blackout_end(rule.blackout, now) == now
        assert rule.gpu_hours_a_month is None or fact.gpu_hours < rule.gpu_hours_a_month
        assert rule.cpu_hours_a_month is None or fact.cpu_hours < rule.cpu_hours_a_month
        assert fact.fresh_examples >= rule.min_fresh
        assert fact.suspected_since_alarm >= rule.confirmations
    if gone_back:
        assert rule.roll_back != "never"
        assert fact.former_champion is not None
        assert decision.page
        assert decision.automatic == (rule.roll_back == "automatic")
        assert (
            set(alarms) - {"error_rate", "latency_p95_ms", "first_token_p95_ms"}
            or kind == "behaviour"
            or not alarms
        )
