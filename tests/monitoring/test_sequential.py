from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from monitoring.sequential import SequentialState, e_value

START = SequentialState(reference_id="r1", started="2026-01-01T00:00:00+00:00")


def run(state: SequentialState, p_values: list[float], first: int = 0) -> SequentialState:
    for i, p in enumerate(p_values, start=first):
        state = state.step(p, f"check-{i}")
    return state


def test_evidence_adds_up_as_defined():
    state = run(START, [0.5, 0.01])
    first = 0.125 * 0.5**-0.75 + 0.25 * 0.5**-0.5
    second = 0.125 * 0.01**-0.75 + 0.25 * 0.01**-0.5
    assert state.value == pytest.approx(second * (first + 1))
    assert state.checks == 2
    assert [s.p_value for s in state.last] == [0.5, 0.01]
    assert START.value == 0, "a step makes a new record"


def test_an_e_value_is_one_on_average_where_nothing_changed():
    for size in (1000, 10_000):  # of permutation p-values, which are multiples of 1/size
        assert np.mean([e_value(k / size) for k in range(1, size + 1)]) < 1
    assert np.mean([e_value(k / 10_000) for k in range(1, 10_001)]) > 0.9


def test_strong_windows_raise_the_alarm_and_it_stays():
    state = run(START, [0.8, 0.4, 0.002, 0.002])
    assert not state.alarm
    state = run(state, [0.002, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], first=4)
    assert state.alarm
    assert state.alarmed_by == "check-4"
    assert state.value < state.arl, "evidence fades, the alarm does not"


def test_false_alarms_are_as_rare_as_the_run_length_says():
    generator = np.random.default_rng(0)
    runs = []
    for _ in range(200):
        value, checks = 0.0, 0
        while value < 20:
            value, checks = e_value(float(generator.integers(1, 1001)) / 1000) * (value + 1), checks + 1
        runs.append(checks)
    assert np.mean(runs) >= 20
    state = SequentialState(reference_id="r", arl=20.0)
    assert run(state, [0.05] * 3).alarm == (run(state, [0.05] * 3).value >= 20)


def test_the_same_check_twice_is_one_step():
    once = START.step(0.01, "a")
    assert once.step(0.01, "a") is once
    assert once.step(0.5, "a") is once
    assert once.step(0.01, "b").checks == 2


@pytest.mark.parametrize("p", [0.0, -0.1, 1.0001, float("nan"), float("inf")])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(ValueError, match=r"p_value must be in \(0, 1\]"):
        START.step(p, "a")


def test_a_reset_forgets_the_evidence_and_counts_no_check_twice():
    alarmed = run(START, [0.001] * 5)
    assert alarmed.alarm
    new = alarmed.reset("r2", "2026-02-01T00:00:00+00:00")
    assert (new.value, new.checks, new.alarm, new.seen, new.last) == (0.0, 0, False, (), ())
    assert (new.reference_id, new.arl) == ("r2", START.arl)
    again = alarmed.reset("r1")
    assert run(again, [0.001] * 5) == again, "windows of before stay counted against their reference"
    assert again.step(0.001, "check-5").checks == 1


def test_a_state_comes_back_from_json_whatever_the_evidence():
    state = run(START, [0.001] * 400)
    assert np.isfinite(state.value)
    assert len(state.last) == 20
    assert SequentialState.model_validate_json(state.model_dump_json()) == state
    for wrong in ({"reference_id": ""}, {"reference_id": "r", "arl": 1}, {"reference_id": "r", "value": -1}):
        with pytest.raises(ValidationError):
            SequentialState.model_validate(wrong)
