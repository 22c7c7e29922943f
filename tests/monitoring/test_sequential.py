from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from monitoring.sequential import e_value, given_reference, step
from regraft.records import Evidence


def run(evidence: Evidence, p_values: list[float], first: int = 0, arl: float = 1000.0) -> Evidence:
    for i, p in enumerate(p_values, start=first):
        evidence = step(evidence, p, report_id=f"check-{i}", begun=f"day {i}", arl=arl)
    return evidence


def test_evidence_adds_up_as_defined():
    evidence = run(Evidence(), [0.5, 0.01])
    first = (0.1 * 0.5**-0.9 + 0.25 * 0.5**-0.75 + 0.5 * 0.5**-0.5) / 3
    second = (0.1 * 0.01**-0.9 + 0.25 * 0.01**-0.75 + 0.5 * 0.01**-0.5) / 3
    assert evidence.value == pytest.approx(second * (first + 1))
    assert evidence.checks == 2


def test_an_e_value_is_one_on_average_where_nothing_changed():
    for size in (1000, 10_000):  # of permutation p-values, which are multiples of 1/size
        assert np.mean([e_value(k / size) for k in range(1, size + 1)]) < 1
    assert np.mean([e_value(k / 10_000) for k in range(1, 10_001)]) > 0.8


def test_strong_windows_raise_the_alarm_and_it_stays():
    evidence = run(Evidence(), [0.8, 0.4, 0.002, 0.002])
    assert evidence.alarmed_by is None
    evidence = run(evidence, [0.002, *[1.0] * 8], first=4)
    assert evidence.alarmed_by == "check-4"
    assert evidence.value < 1000, "evidence fades, the alarm does not"


def test_it_says_where_the_change_began():
    evidence = run(Evidence(), [0.8, 0.01, 0.9, 1.0, 1.0, 1.0])
    assert (evidence.growth, evidence.since) == (0.0, ""), "one strange window among ordinary ones"
    evidence = run(evidence, [0.004, 0.02, 0.3, 0.002], first=6)
    assert evidence.since == "day 6"


def test_false_alarms_are_as_rare_as_the_run_length_says():
    generator = np.random.default_rng(0)
    runs = []
    for _ in range(200):
        evidence = Evidence()
        while evidence.alarmed_by is None:
            p = float(generator.integers(1, 1001)) / 1000
            evidence = step(evidence, p, report_id="c", begun="", arl=20.0)
        runs.append(evidence.checks)
    assert np.mean(runs) >= 20


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(ValueError, match=r"p_value must be in \(0, 1\]"):
        run(Evidence(), [p])


def test_evidence_comes_back_from_json_however_much_there_is():
    evidence = run(Evidence(), [0.001] * 400)
    assert np.isfinite(evidence.value)
    assert Evidence.model_validate_json(evidence.model_dump_json()) == evidence


def test_an_unlucky_reference_does_not_alarm_for_ever():
    """Means of windows against one reference's, by two-sample tests that are exact for a single window."""
    generator = np.random.default_rng(0)
    window, reference, streams = 100, 50, 100
    plain, counted = 0, 0
    for _ in range(streams):
        center = generator.normal() / np.sqrt(reference)
        apart = (generator.normal(size=30) / np.sqrt(window) - center) / np.sqrt(1 / window + 1 / reference)
        p_values = np.maximum(2 * norm.sf(np.abs(apart)), 1e-4).tolist()
        plain += run(Evidence(), p_values).alarmed_by is not None
        given = [given_reference(p, window / reference) for p in p_values]
        counted += run(Evidence(), given).alarmed_by is not None
    assert plain > 0.03 * streams, "more than 30 checks at an average run length of 1,000 may"
    assert counted <= 0.01 * streams


def test_a_p_value_given_the_reference_is_no_smaller_and_hardly_larger_against_a_large_one():
    for p_value in (1e-4, 0.003, 0.2, 0.9, 1.0):
        assert given_reference(p_value, 0.0) == p_value
        found = [given_reference(p_value, share) for share in (1e-6, 0.01, 0.1, 0.3)]
        assert p_value <= found[0] <= p_value * 1.02 + 1e-9
        assert found == sorted(found)
        assert found[-1] <= 1
