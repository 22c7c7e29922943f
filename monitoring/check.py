"""One check: a window of captured exchanges against the frozen reference, added to what was seen before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from monitoring.detectors import DETECTOR_CLASSES, Calibrated, Detection, Detector, parse_detector
from monitoring.explaining import Explained, explain
from monitoring.likelihoods import beside
from monitoring.measures import SERVICE
from monitoring.sequential import DRIFT, PROMPTS, alarm_at, step
from monitoring.windows import Reference, Row, Window, sampled
from monitoring.wording import summary
from regraft.config import MonitorSection
from regraft.errors import ConfigError
from regraft.records import (
    CapturedExchange,
    DriftKind,
    DriftReport,
    Evidence,
    QualitySignal,
    TestResult,
    content_hash,
)


class Checked(NamedTuple):
    """A check's report, and what the page for people is made of; the detection is that of the answers.

    `drifted` are ids of exchanges, those that a reviewer should see first in front.
    """

    report: DriftReport
    detection: Detection | None
    reference: list[Row]
    window: tuple[Row, ...]
    drifted: tuple[str, ...] = ()


def detector_of(settings: MonitorSection, cache: Path | None = None) -> Detector:
    """The detector that a configuration asks for.

    Args:
        settings: Its `min_rows` is the calibrated detector's smallest window too, unless that says otherwise.
        cache: Folder that keeps embeddings between processes.

    Raises:
        ConfigError: If there is no such detector, a field of it is wrong, or `reference_rows` are too few for
            it.
    """
    given = dict(settings.detector)
    kinds = {kind.model_fields["name"].default: kind for kind in DETECTOR_CLASSES}
    fields = kinds[given["name"]].model_fields if given["name"] in kinds else {}
    if given["name"] == "calibrated":
        given = {"min_window": settings.min_rows} | given
    if cache is not None and "cache" in fields:
        given |= {"cache": cache}
    try:
        detector = parse_detector(given)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        raise ConfigError(
            f"monitor.detector{'.' * bool(field)}{field}: {first['msg']}", "see docs/monitoring.md"
        ) from error
    least = getattr(detector, "min_reference", 0)
    if 0 < settings.reference_rows < least:
        raise ConfigError(
            f"monitor.reference_rows: is {settings.reference_rows}, and {detector.name} tells nothing below "
            f"{least}",
            f"freeze at least {least} sessions, take {{name: omnibus}}, or keep the evaluation's answers (0)",
        )
    return detector


def check_window(
    reference: Reference,
    exchanges: Sequence[CapturedExchange],
    settings: MonitorSection,
    *,
    detector: Detector | None = None,
    explainer: Calibrated | None = None,
    previous: DriftReport | None = None,
    quality: Sequence[QualitySignal] = (),
    since_growth: Sequence[CapturedExchange] | None = None,
    logprobs: Mapping[str, float] | None = None,
    start: str = "",
    end: str = "",
) -> Checked:
    """Compare a window with the reference, and add what it says to the evidence.

    Args:
        reference: The frozen one. Exchanges of other models or versions are left out and counted.
        exchanges: What was captured, in any order.
        settings: Thresholds and sizes.
        detector: How to compare; what the settings ask for if not given.
        explainer: Whose embeddings tell what an alarm is about; the detector itself where it has some.
        previous: The last report against the same reference; None begins without evidence.
        quality: Signals of the same window.
        since_growth: Exchanges since the evidence began to grow, which an alarm is explained by; the window
            if not given.
        logprobs: Mean log-probability of a token of answers, by the ids of exchanges, where it is known. It
            is told, and explains; it raises no alarm.
        start: Of the window, where it is not that of its first exchange.
        end: Of the window, likewise.

    Returns:
        Status `drift` where an alarm is raised and the effect is at least `min_effect`, or a quality signal
        alarms; `suspected` where this window alone has a p-value of at most `alpha`; `insufficient` where
        there are fewer than `min_rows` rows, or too few for the detector, and no quality signal could be
        tested. The same input gives the same report.

    Raises:
        ConfigError: If the settings' detector is wrong.
    """
    detector = detector or detector_of(settings)
    window = Window.of(exchanges, settings.max_rows, model=reference.model, version=reference.version)
    # The larger the reference, the closer the evidence of many checks keeps to its bound; the others sample.
    most = len(reference.rows) if isinstance(detector, Calibrated) else settings.max_rows
    before = sampled(reference.rows, most)
    lacking = (
        f"at least {settings.min_rows} of each are needed"
        if min(len(window.rows), len(before)) < settings.min_rows
        else detector.lacking(before, window.rows)
    )
    detections = {} if lacking else _detected(detector, before, window.rows)
    detection = detections.get(DRIFT)
    start, end = start or window.start, end or window.end
    identity = content_hash(
        [
            reference.id,
            start,
            end,
            sorted(e.id for e in exchanges),
            # How often checks run, and who is told, changes nothing about what this one finds.
            settings.model_dump(
                mode="json", include={"alpha", "arl", "min_effect", "min_rows", "max_rows", "quality"}
            ),
            detector.model_dump(mode="json"),
            previous.id if previous else None,
        ]
    )
    p_values = {} if detector.advisory else {name: found.p_value for name, found in detections.items()}
    p_values |= {signal.name: signal.p_value for signal in quality if signal.p_value is not None}
    counted = p_values | {name: found.counted for name, found in detections.items() if name in p_values}
    evidence = _stepped(previous, counted, identity, start, settings.arl, len(quality))
    alarms = _alarms(evidence, detections, quality, settings)
    suspicious = [
        n for n, p in p_values.items() if p <= settings.alpha and _large(n, detections, quality, settings)
    ]
    status = (
        "insufficient"
        if not p_values and detection is None
        else "drift"
        if alarms
        else "suspected"
        if suspicious
        else "stable"
    )
    explained = Explained()
    if status in {"drift", "suspected"} and detection is not None:
        explainer = explainer or (detector if isinstance(detector, Calibrated) else Calibrated())
        explained = explain(
            before,
            window,
            since_growth if since_growth is not None else exchanges,
            explainer,
            inputs_p=detections[PROMPTS].p_value if explainer == detector else None,
            logprobs=logprobs,
            since=min((e.since for n, e in evidence.items() if n in detections and e.since), default=""),
        )
    kind = _kind(explained, alarms) if alarms else None
    report = DriftReport.model_validate(
        {
            "id": identity,
            "model": reference.model,
            "model_version": reference.version,
            "reference_id": reference.id,
            "window_start": start,
            "window_end": end,
            "rows": len(window.rows),
            "reference_rows": len(before),
            "status": status,
            "p_value": detection.p_value if detection else None,
            "effect": detection.effect if detection else None,
            "alpha": settings.alpha,
            "detector": detector.name,
            "tests": _tests(detections),
            "drivers": [driver for found in detections.values() for driver in found.drivers],
            "p_values": p_values,
            "evidence": evidence,
            "arl": settings.arl,
            "covered": end if p_values else previous.covered if previous else "",
            "previous": previous.id if previous else None,
            "quality": tuple(quality),
            "alarms": alarms,
            "kind": kind,
            "attribution": explained.attribution,
            "answer_logprob": beside(before, window.rows, logprobs or {}),
            "summary": "",
        }
    )
    words = summary(report, detector, detection, settings, window, lacking, explained.unclear)
    report = report.model_copy(update={"summary": words})
    return Checked(report, detection, before, window.rows, _drifted(detections, kind))


def _detected(detector: Detector, reference: Sequence[Row], window: Sequence[Row]) -> dict[str, Detection]:
    """What the detector finds in the answers, and in the prompts where it looks at one side at a time."""
    found = {DRIFT: detector.detect(reference, window)}
    if "side" in type(detector).model_fields:
        prompts = detector.model_copy(update={"side": "prompts"})
        found[PROMPTS] = prompts.detect(reference, window)
    return found


def _drifted(detections: Mapping[str, Detection], kind: DriftKind | None) -> tuple[str, ...]:
    """Ids of the exchanges least like the reference's.

    Of new content by their prompts: a model answers what it was never asked in its usual words. Otherwise by
    prompts and answers in turn.
    """
    sides = [[n.row.id for n in detections[side].novel] for side in (PROMPTS, DRIFT) if side in detections]
    if kind == "new_content":
        return tuple(dict.fromkeys(chain.from_iterable(sides)))
    turns = chain.from_iterable(zip_longest(*sides))
    return tuple(dict.fromkeys(name for name in turns if name is not None))


def _stepped(
    previous: DriftReport | None,
    p_values: dict[str, float],
    report_id: str,
    begun: str,
    arl: float,
    signals: int,
) -> dict[str, Evidence]:
    """The evidence with this check in it."""
    evidence = dict(previous.evidence) if previous else {}
    for name, p_value in p_values.items():
        evidence[name] = step(
            evidence.get(name, Evidence()),
            p_value,
            report_id=report_id,
            begun=begun,
            arl=alarm_at(name, arl, signals),
        )
    return evidence


def _tests(detections: Mapping[str, Detection]) -> list[TestResult]:
    """The tests of all sides; the prompts' under names of their own."""
    named = list(detections[DRIFT].tests) if detections else []
    for test in detections[PROMPTS].tests if PROMPTS in detections else ():
        named.append(test.model_copy(update={"name": f"prompt {test.name}"}))
    return named


def _large(
    name: str, detections: Mapping[str, Detection], quality: Sequence[QualitySignal], settings: MonitorSection
) -> bool:
    """Whether what this window shows is large enough to matter."""
    if name in (DRIFT, PROMPTS):
        return name in detections and detections[name].effect >= settings.min_effect
    return any(signal.name == name and signal.worse for signal in quality)


def _alarms(
    evidence: dict[str, Evidence],
    detections: Mapping[str, Detection],
    quality: Sequence[QualitySignal],
    settings: MonitorSection,
) -> tuple[str, ...]:
    return tuple(
        name
        for name, found in sorted(evidence.items())
        if found.alarmed_by is not None and _large(name, detections, quality, settings)
    )


def _kind(explained: Explained, alarms: Sequence[str]) -> DriftKind | None:
    """What an alarm is about: faults of the model and the service come before a change of what is asked.

    Worse answers to new questions are what a retraining mends, so that new content is told before quality.
    """
    if explained.kind == "behaviour":
        return "behaviour"
    if SERVICE & set(alarms):
        return "quality"
    if explained.kind == "new_content":
        return "new_content"
    return explained.kind if set(alarms) <= {DRIFT, PROMPTS} else "quality"
