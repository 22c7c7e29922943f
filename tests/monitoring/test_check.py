from __future__ import annotations

import pytest
from traffic import NEW, ORDINARY, exchange, rows
from words import SMALL, Words

from monitoring.check import check_window, detector_of
from monitoring.detectors import Calibrated, EvidentlyColumns
from monitoring.windows import Reference, freeze
from regraft.config import MonitorSection
from regraft.errors import ConfigError
from regraft.records import CapturedExchange, DriftReport, QualitySignal

#: One window with a small p-value is enough.
SETTINGS = MonitorSection(
    detector={"name": "omnibus", "permutations": 499}, min_rows=50, arl=5, min_effect=0.1
)
PATIENT = SETTINGS.model_copy(update={"arl": 400.0, "min_effect": 0.3})


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Reference:
    return freeze(tmp_path_factory.mktemp("reference"), model="shop", version=1, rows=rows(ORDINARY, 100, 0))


@pytest.fixture(scope="module")
def storm() -> list[CapturedExchange]:
    return [exchange(row, second=i) for i, row in enumerate(rows(NEW, 70, 5, "n"))]


@pytest.fixture(scope="module")
def calm() -> list[CapturedExchange]:
    return [exchange(row) for row in rows(ORDINARY, 80, 7, "w")]


def look(reference: Reference, window: list[CapturedExchange], settings=SETTINGS, **more) -> DriftReport:
    # Embeddings made of the words themselves, in place of a model.
    return check_window(reference, window, settings, explainer=Words(**SMALL), **more).report


def signal(name: str, p_value: float | None, **more) -> QualitySignal:
    return QualitySignal(name=name, value=0.4, reference=0.0, count=80, p_value=p_value, **more)


def test_an_ordinary_window_is_stable(reference, calm):
    report = look(reference, calm)
    assert report.status == "stable"
    assert report.summary.startswith("Stable over 80 exchanges")
    assert (report.alarms, report.kind, report.attribution) == ((), None, None)


def test_new_topics_are_drift_and_said_in_words(reference, storm):
    report = look(reference, storm)
    assert report.status == "drift"
    assert report.kind == "new_content"
    assert "the prompts are about other things" in report.summary
    assert "new content" in report.summary
    assert any(driver.startswith("terms that grew") for driver in report.drivers)
    assert {test.name for test in report.tests} == {"novelty", "prompt topics", "answer topics", "form"}
    assert report.attribution.where in {"inputs", "both"}


def test_one_window_is_suspected_and_more_of_them_alarm(reference, storm, calm):
    first = look(reference, storm[:60], PATIENT, start="a", end="b")
    assert first.status == "suspected"
    assert first.evidence["drift"].since == "a"
    again = [e.model_copy(update={"id": f"{e.id}'"}) for e in storm]
    second = look(reference, again, PATIENT, previous=first, start="b", end="c")
    assert second.previous == first.id
    assert second.covered == "c"
    third = look(reference, storm, PATIENT, previous=second, start="c", end="d")
    assert third.status == "drift"
    assert third.attribution.since == "a"
    raised = third.evidence["drift"].alarmed_by
    assert raised in {second.id, third.id}
    over = look(reference, calm, PATIENT, previous=third, start="d", end="e")
    assert over.evidence["drift"].alarmed_by == raised, "the alarm stays"
    assert (over.status, over.alarms) == ("stable", ()), "and counts only while there is something to see"


def test_too_little_to_tell_adds_no_evidence_and_covers_nothing(reference, storm):
    first = look(reference, storm, PATIENT, start="a", end="b")
    few = look(reference, storm[:20], PATIENT, previous=first, start="b", end="c")
    assert few.status == "insufficient"
    assert few.evidence == first.evidence
    assert few.covered == "b"


def test_significance_without_effect_is_not_drift(reference, storm):
    report = look(reference, storm, SETTINGS.model_copy(update={"min_effect": 1.0}))
    assert report.status == "stable"
    assert "too little to act on" in report.summary


def test_a_quality_signal_alarms_by_itself_where_it_is_worse_by_enough(reference, calm):
    worse = signal("refusal_rate", 1e-9, worse=True)
    report = look(reference, calm, quality=[worse, signal("error_rate", 0.5)])
    assert (report.status, report.alarms, report.kind) == ("drift", ("refusal_rate",), "quality")
    assert "refusal_rate 0.4 (0 in the reference)" in report.summary
    slight = look(reference, calm, quality=[worse.model_copy(update={"worse": False})])
    assert (slight.status, slight.alarms) == ("stable", ())


def test_signals_share_their_false_alarms(reference, calm):
    one = signal("refusal_rate", 0.005, worse=True)
    alone = look(reference, calm, quality=[one])
    among = look(reference, calm, quality=[one, *(signal(f"s{i}", 0.5) for i in range(9))])
    assert alone.alarms == ("refusal_rate",)
    assert among.alarms == ()
    assert among.status == "suspected"


def test_an_outage_alarms_though_there_are_no_texts_to_compare(reference, calm):
    failed = [e.model_copy(update={"error": "timeout"}) for e in calm]
    report = look(reference, failed, quality=[signal("error_rate", 1e-9, worse=True)])
    assert (report.status, report.kind) == ("drift", "quality")
    assert report.p_value is None
    assert "Quality fell: error_rate" in report.summary


def test_new_questions_answered_worse_are_new_content_and_a_slow_service_is_not(reference, storm):
    feedback = signal("feedback_score", 1e-9, worse=True)
    assert look(reference, storm, quality=[feedback]).kind == "new_content"
    slow = signal("latency_p95_ms", 1e-9, worse=True)
    assert look(reference, storm, quality=[feedback, slow]).kind == "quality"


def test_a_fault_that_is_over_does_not_explain_what_came_after_it(reference, storm):
    fault = [exchange(r, output="I'm sorry, I cannot.") for r in rows(ORDINARY, 90, 11, "f")]
    assert look(reference, fault).kind == "behaviour"
    assert look(reference, storm, since_growth=[*fault, *storm]).kind == "new_content"


def test_the_calibrated_detector_looks_at_prompts_too(reference, storm):
    usual = [e.model_copy(update={"output": rows(ORDINARY, 1, i)[0].output}) for i, e in enumerate(storm)]
    report = look(reference, usual, detector=Words(**SMALL))
    assert report.alarms == ("prompts",), "new questions, answered in the usual words"
    assert report.kind == "new_content"
    assert {"novelty", "prompt novelty"} <= {test.name for test in report.tests}


def test_an_advisory_detector_decides_nothing(reference, storm):
    assert look(reference, storm, detector=EvidentlyColumns()).status == "stable"


def test_too_few_exchanges_are_insufficient_never_stable(reference, storm):
    failed = [e.model_copy(update={"error": "timeout"}) for e in storm[40:]]
    report = look(reference, [*storm[:40], *failed])
    assert report.status == "insufficient"
    assert report.p_value is None
    assert report.effect is None
    assert "30 failed" in report.summary
    assert look(reference, []).status == "insufficient"
    few = reference.model_copy(update={"rows": reference.rows[:30]})
    assert look(few, storm).status == "insufficient"


def test_empty_answers_are_drift_not_a_crash(reference):
    given = [exchange(r, output="" if i % 3 else r.output) for i, r in enumerate(rows(ORDINARY, 80, 7, "w"))]
    report = look(reference, given)
    assert report.status == "drift"
    assert "empty" in report.summary
    assert look(reference, [e.model_copy(update={"output": ""}) for e in given]).status == "drift"


def test_the_same_window_gives_the_same_report(reference, storm):
    report = look(reference, storm)
    assert look(reference, storm[::-1]) == report
    assert look(reference, storm[1:]).id != report.id
    assert look(reference, storm, SETTINGS.model_copy(update={"alpha": 0.02})).id != report.id
    assert look(reference, storm, SETTINGS.model_copy(update={"every_seconds": 5})).id == report.id


def test_a_detector_of_the_settings_is_built_or_named_in_the_error(tmp_path):
    built = detector_of(MonitorSection(min_rows=40), tmp_path)
    assert isinstance(built, Calibrated)
    assert (built.min_window, built.gate, built.cache) == (40, "any", tmp_path)
    for wrong, field in (
        ({"name": "tea leaves"}, "monitor.detector"),
        ({"name": "calibrated", "tail": 2}, r"monitor\.detector\.tail"),
        ({"name": "omnibus", "tael": 2}, r"monitor\.detector\.tael"),
    ):
        with pytest.raises(ConfigError, match=field):
            detector_of(MonitorSection(detector=wrong))


def test_of_new_content_the_strangest_prompts_come_first_however_usual_their_answers(tmp_path):
    frozen = freeze(tmp_path, model="shop", version=1, rows=rows(ORDINARY, 150, 0))
    usual = rows(ORDINARY, 60, 7, "w")
    new = [
        row.model_copy(update={"output": known.output})
        for row, known in zip(rows(NEW, 25, 5, "n"), rows(ORDINARY, 25, 9), strict=True)
    ]
    detector = Words(**SMALL, gate="any", examples=20)
    settings = SETTINGS.model_copy(update={"detector": {"name": "calibrated"}})
    found = check_window(frozen, [exchange(row) for row in [*usual, *new]], settings, detector=detector)
    assert "prompts" in found.report.alarms
    assert found.report.kind == "new_content"
    assert all(name.startswith("n") for name in found.drifted[:20])
    assert any(name.startswith("w") for name in found.drifted), "strange answers follow"
    assert len(set(found.drifted)) == len(found.drifted)


def test_a_reference_that_the_detector_would_never_take_is_refused():
    small = {"reference_rows": 200}
    with pytest.raises(ConfigError, match=r"monitor\.reference_rows: is 200.* below 250"):
        detector_of(MonitorSection(**small))
    detector_of(MonitorSection(**small, detector={"name": "omnibus"}))
    detector_of(MonitorSection(**small, detector={"name": "calibrated", "min_reference": 150}))
    detector_of(MonitorSection(reference_rows=0))
