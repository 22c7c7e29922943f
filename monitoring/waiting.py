"""What a retraining waits for: fresh examples, confirmation, time, money, and hours in which it may start."""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import datetime, timedelta

from regraft.config import RetrainSection
from regraft.monitor_sections import MINUTES_A_WEEK, blackout_minutes
from regraft.records import Record
from regraft.times import utc

#: What the monthly budgets look back on.
MONTH = timedelta(days=30)


class Facts(Record):
    """What the policy looks at beside the report.

    Attributes:
        alarm_id: The report that raised the alarm; the report's own id without one.
        fresh_examples: Reviewed examples that no training has seen yet.
        tried_examples: Fresh examples that retrainings of this champion trained on and were rejected with.
        last_retrain: When the last retraining of this model was decided. Without a zone it is UTC.
        gpu_hours, cpu_hours: What retrainings of the last 30 days took.
        affordable: When, without another one, the monthly budget has room again; None if nobody knows.
        under_way: Job id of a retraining that has no outcome yet.
        settled: What became of a retraining for this very alarm, in words; empty if there was none.
        former_champion: The version that one could go back to.
        suspected_since_alarm: Windows that looked changed after the one that raised the alarm.
        segment_worse: Topics whose quality fell.
    """

    alarm_id: str
    fresh_examples: int = 0
    tried_examples: int = 0
    last_retrain: datetime | None = None
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    affordable: datetime | None = None
    under_way: str | None = None
    settled: str = ""
    former_champion: int | None = None
    suspected_since_alarm: int = 0
    segment_worse: tuple[str, ...] = ()


def unmet(settings: RetrainSection, facts: Facts, now: datetime) -> tuple[tuple[str, ...], datetime | None]:
    """What a retraining still waits for, in words, and the earliest start by the conditions that are times.

    Args:
        settings: The conditions.
        facts: What is known.
        now: The present; without a zone it is UTC.
    """
    now = utc(now)
    waiting: list[str] = []
    starts: list[datetime] = []
    if facts.under_way is not None:
        waiting.append(f"another retraining is under way as {facts.under_way}")
    needed = fresh_needed(settings, facts.tried_examples)
    if facts.fresh_examples < needed:
        why = f" after one with {facts.tried_examples} was rejected" if needed > settings.min_fresh else ""
        waiting.append(
            f"{facts.fresh_examples} reviewed fresh examples, {needed} needed{why}: "
            "review answers of this window to get more"
        )
    if facts.suspected_since_alarm < settings.confirmations:
        waiting.append(
            f"{facts.suspected_since_alarm} of {settings.confirmations} further windows that look changed"
        )
    if facts.last_retrain is not None:
        until = utc(facts.last_retrain) + timedelta(seconds=settings.cooldown_seconds)
        if now < until:
            starts.append(until)
            waiting.append(f"the last retraining was too recent, the next may start at {readable(until)}")
    spent = {
        "GPU": (facts.gpu_hours, settings.gpu_hours_a_month),
        "core": (facts.cpu_hours, settings.cpu_hours_a_month),
    }
    for name, (hours, bound) in spent.items():
        if bound is not None and hours >= bound:
            words = f"{hours:.3g} {name}-hours of the {bound:g} for 30 days are used up"
            if facts.affordable is not None and bound > 0:
                starts.append(utc(facts.affordable))
                words += f", some come free at {readable(utc(facts.affordable))}"
            waiting.append(words)
    if blackout_end(settings.blackout, now) != now:
        waiting.append(f"no retraining starts during {' and '.join(settings.blackout)} (UTC)")
    begin = max([now, *starts])
    start = blackout_end(settings.blackout, begin)
    return tuple(waiting), start if starts or start != now else None


def fresh_needed(settings: RetrainSection, tried: int) -> int:
    """New examples that a retraining needs, where those before were rejected with so many."""
    return max(settings.min_fresh, math.ceil(settings.again_fresh * tried))


def blackout_end(blackout: Iterable[str], moment: datetime) -> datetime | None:
    """The first minute from a moment on that lies in no blackout; None if the week has no such minute.

    Args:
        blackout: Weekly spans, such as `fri 16:00-mon 07:00`, begin included and end not. They may reach over
            Sunday, overlap and follow one another; one that ends where it begins is empty.
        moment: Given back if it lies in none itself.
    """
    spans = [blackout_minutes(entry) for entry in blackout]
    time = utc(moment)
    latest = time + timedelta(minutes=MINUTES_A_WEEK)
    while True:
        minute = time.weekday() * 24 * 60 + time.hour * 60 + time.minute
        left = [
            (end - minute) % MINUTES_A_WEEK
            for begin, end in spans
            if (minute - begin) % MINUTES_A_WEEK < (end - begin) % MINUTES_A_WEEK
        ]
        if not left:
            return time
        time = time.replace(second=0, microsecond=0) + timedelta(minutes=max(left))
        if time > latest:
            return None


def readable(moment: datetime) -> str:
    """A time to the minute, rounded up."""
    time = utc(moment)
    whole = time.replace(second=0, microsecond=0)
    if whole < time:
        whole += timedelta(minutes=1)
    return f"{whole:%Y-%m-%d %H:%M} UTC"
