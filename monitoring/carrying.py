"""Which evidence a check hands on to the next one: not that of alarms that were dealt with, or are over."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from monitoring.sequential import DRIFT, PROMPTS
from regraft.records import DriftKind, DriftReport, Evidence

#: Kinds of alarms that a fault of model or service raises.
FAULTS: tuple[DriftKind, ...] = ("behaviour", "quality")
#: Kinds that are over with the first window that shows none of it: no retraining is being prepared for them.
PASSING: tuple[DriftKind, ...] = (*FAULTS, "prompt_mix")
#: A window shows something of an alarm at this p-value or below. Larger than `alpha`: what is weak and goes
#: on would be over and begin again all the time.
SHOWS = 0.05


def carried(
    report: DriftReport, kinds: Mapping[str, DriftKind], dealt: Collection[str]
) -> dict[str, Evidence]:
    """The evidence of a report that later checks add to.

    What was dealt with has to be gathered anew: what a retraining or a rollback did not mend raises another
    alarm. What no retraining mends is over once a window that could tell shows none of it, and so is a
    quality signal's own alarm; any other once all checks together tell nothing of it any more. Neither
    explains what comes later, nor does what the same moved without an alarm.

    Args:
        report: The last one.
        kinds: What its alarms were last taken for, by the report that raised each, where known.
        dealt: Alarms that a retraining or a rollback came to an end for.
    """
    raised = {e.alarmed_by for e in report.evidence.values() if e.alarmed_by is not None}
    shown = {e.alarmed_by for name, e in report.evidence.items() if report.p_values.get(name, 1.0) <= SHOWS}
    told = report.p_value is not None
    over = {alarm for alarm in raised - shown if told and kinds.get(alarm) in PASSING}

    def left(name: str, evidence: Evidence) -> Evidence:
        alarm = evidence.alarmed_by
        if alarm is not None:
            better = name not in (DRIFT, PROMPTS) and report.p_values.get(name, 0.0) > SHOWS
            ended = better or alarm in over or alarm in dealt or not evidence.growth
            return Evidence() if ended else evidence
        return Evidence() if over and "" < evidence.since < report.window_start else evidence

    return {name: left(name, evidence) for name, evidence in report.evidence.items()}
