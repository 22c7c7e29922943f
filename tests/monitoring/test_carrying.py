"""What of the evidence goes on to the next check, and what is over."""

from __future__ import annotations

from typing import Any

import pytest

from monitoring.carrying import carried
from regraft.records import DriftKind, DriftReport, Evidence

ALARMED = Evidence(value=1e6, checks=5, growth=9, since="2026-01-01", alarmed_by="a")
MOVED = Evidence(value=9, checks=5, growth=2, since="2026-01-01")
GROWING = Evidence(value=3, checks=5, growth=1, since="2026-01-03")


def report(
    evidence: dict[str, Evidence], p_values: dict[str, float], p_value: float | None = 0.3
) -> DriftReport:
    fields: dict[str, Any] = {
        "id": "r", "model": "m", "model_version": 1, "reference_id": "f", "window_start": "2026-01-03",
        "window_end": "2026-01-04", "rows": 100, "reference_rows": 300, "status": "drift", "effect": 0.1,
        "alpha": 0.01, "summary": "", "p_value": p_value, "p_values": p_values, "evidence": evidence,
    }  # fmt: skip
    return DriftReport.model_validate(fields)


@pytest.mark.parametrize("kind", ["behaviour", "quality", "prompt_mix"])
def test_what_no_retraining_mends_is_over_with_the_first_window_that_shows_none_of_it(
    kind: DriftKind,
) -> None:
    given = {"drift": ALARMED, "prompts": MOVED, "refusal_rate": GROWING}
    quiet = report(given, {"drift": 0.126, "prompts": 0.4, "refusal_rate": 0.02})
    left = carried(quiet, {"a": kind}, ())
    assert left == {"drift": Evidence(), "prompts": Evidence(), "refusal_rate": GROWING}
    for shown in (
        report(given, {"drift": 0.03, "prompts": 0.4}),
        report(given, {"refusal_rate": 0.9}, None),  # too few texts to tell
    ):
        assert carried(shown, {"a": kind}, ()) == given


def test_an_alarm_of_several_questions_is_over_once_none_of_them_shows_it() -> None:
    given = {"drift": ALARMED, "refusal_rate": ALARMED}
    assert carried(report(given, {"drift": 0.5, "refusal_rate": 1e-9}), {"a": "behaviour"}, ()) == given


def test_new_content_stays_until_it_is_dealt_with_or_nothing_of_it_is_left() -> None:
    given = {"drift": ALARMED, "prompts": MOVED}
    quiet = report(given, {"drift": 0.9, "prompts": 0.9})
    assert carried(quiet, {"a": "new_content"}, ()) == given
    assert carried(quiet, {"a": "new_content"}, {"a"}) == {"drift": Evidence(), "prompts": MOVED}
    gone = ALARMED.model_copy(update={"growth": 0.0, "since": ""})
    assert carried(report({"drift": gone}, {"drift": 0.9}), {"a": "new_content"}, ()) == {"drift": Evidence()}


def test_a_signal_that_recovered_alarms_no_longer_while_another_alarm_goes_on() -> None:
    """A fault amid a changed mix: its own alarm stood on for days, as the decisions were about the mix."""
    fault = ALARMED.model_copy(update={"alarmed_by": "fault"})
    given = {"drift": ALARMED, "refusal_rate": fault, "truncated_rate": fault}
    after = report(given, {"drift": 1e-4, "refusal_rate": 0.9, "truncated_rate": 0.04})
    left = carried(after, {"a": "prompt_mix"}, ())
    assert left == {"drift": ALARMED, "refusal_rate": Evidence(), "truncated_rate": fault}
