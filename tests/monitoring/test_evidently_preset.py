from __future__ import annotations

import pytest
from traffic import ORDINARY, exchange, rows

from monitoring.check import check_window
from monitoring.detectors import EvidentlyPreset
from monitoring.windows import Reference
from regraft.config import MonitorSection

DETECTOR = EvidentlyPreset()


@pytest.mark.parametrize(("size", "gives"), [(1000, "p_value"), (1001, "distance")])
def test_the_share_is_evidentlys_own_count_whichever_tests_it_takes(size, gives):
    reference = rows(ORDINARY, size, 1)
    changes = {"prompt": "Why? " * 40, "output": "I'm sorry, I cannot help."}
    refusing = [r.model_copy(update=changes) for r in rows(ORDINARY, 60, 2)]
    for window, drifted in ((rows(ORDINARY, 60, 2), False), (refusing, True)):
        found = DETECTOR.detect(reference, window)
        verdict, *columns = found.tests
        assert all(gives in test.detail for test in columns)
        assert found.effect == verdict.effect == pytest.approx(sum(t.effect for t in columns) / len(columns))
        assert any(t.effect and t.name == "answer_refusal" for t in columns) == drifted
    assert verdict.detail.startswith("Evidently's verdict is drift: ")
    assert found.drivers[0] == verdict.detail
    assert any(driver.startswith("share of refusals of answers (") for driver in found.drivers)
    # Of distances there is no p-value, and none is made up.
    assert found.p_value == 1.0 if gives == "distance" else 0 < found.p_value < 1e-6


def test_its_verdict_decides_nothing():
    reference = Reference(id="r", model="shop", version=1, rows=tuple(rows(ORDINARY, 80, 0)))
    loud = [r.model_copy(update={"output": r.output.upper() * 9}) for r in rows(ORDINARY, 60, 7, "w")]
    report = check_window(
        reference, [exchange(r) for r in loud], MonitorSection(min_rows=50), detector=DETECTOR
    ).report
    assert "advisory" in report.summary
    assert report.p_value is not None
    assert report.p_value < 0.001
    assert (report.status, report.evidence) == ("stable", {})
