from __future__ import annotations

import numpy as np
import pytest
from traffic import NEW, ORDINARY, rows
from words import SMALL, Words

from monitoring.matching import MatchedTest, classify, matched_test, pairs
from monitoring.windows import Row
from regraft.errors import DataError

DETECTOR = Words(**SMALL)
SOME = {k: v for i, (k, v) in enumerate(ORDINARY.items()) if i < 2}


@pytest.fixture(scope="module")
def reference() -> list[Row]:
    return rows(ORDINARY, 400, 1)


def answered(given: list[Row], output: str, every: int) -> list[Row]:
    return [r if i % every else r.model_copy(update={"output": output}) for i, r in enumerate(given)]


def test_refusals_to_known_prompts_are_behaviour(reference):
    found = matched_test(
        reference, answered(rows(ORDINARY, 100, 2, "w"), "I'm sorry, I cannot.", 4), DETECTOR
    )
    assert found.p_value <= 0.01
    assert abs(found.new_share) < 0.05
    assert classify(found) == "behaviour"


def test_another_mix_of_known_prompts_is_no_change_of_behaviour(reference):
    window = rows(SOME, 100, 2, "w")
    assert DETECTOR.detect(reference, window).p_value < 0.01, "it is drift all the same"
    found = matched_test(reference, window, DETECTOR)
    assert found.pairs >= 30
    assert found.p_value > 0.01
    assert classify(found) == "prompt_mix"


def test_prompts_like_no_others_are_new_content(reference):
    found = matched_test(reference, [*rows(ORDINARY, 70, 2, "w"), *rows(NEW, 30, 3, "n")], DETECTOR)
    assert found.unmatched > 0.1
    assert found.p_value > 0.01
    assert classify(found) == "new_content"
    assert classify(matched_test(reference, rows(NEW, 60, 3, "n"), DETECTOR)) == "new_content"


def test_ordinary_pairs_raise_few_alarms(reference):
    found = [matched_test(reference, rows(ORDINARY, 60, 50 + i, "w"), DETECTOR).p_value for i in range(20)]
    # Binomial(20, 0.08), as much as was measured, exceeds 5 once in two hundred times.
    assert sum(p <= 0.05 for p in found) <= 5
    assert matched_test(reference, rows(ORDINARY, 60, 50, "w")[::-1], DETECTOR).p_value == found[0]


def test_turns_of_one_session_are_swapped_together(reference):
    # One session that goes wrong in all its turns is one observation, not forty.
    window = rows(ORDINARY, 100, 2, "w")
    one = [
        r.model_copy(update={"session": "s", "output": "I'm sorry, I cannot."}) if i < 40 else r
        for i, r in enumerate(window)
    ]
    alone = [r.model_copy(update={"session": None}) for r in one]
    assert matched_test(reference, alone, DETECTOR).p_value <= 0.01
    assert matched_test(reference, one, DETECTOR).p_value > 0.1


def test_pairs_are_nearest_first_and_one_to_one():
    similar = np.array([[0.9, 0.8, 0.1], [0.95, 0.7, 0.1], [0.2, 0.3, 0.59]], dtype=np.float32)
    assert pairs(similar, 0.6) == [(0, 1), (1, 0)]
    assert pairs(np.zeros((2, 0), np.float32), 0.6) == []
    assert pairs(np.ones((3, 2), np.float32), 0.6) == [(0, 0), (1, 1)]


def test_what_cannot_be_told_is_said():
    few = MatchedTest(
        p_value=None, pairs=4, prompts=20, unmatched=0.5, ordinary_unmatched=0.5, ordinary_prompts=40
    )
    assert classify(few) is None
    # Six points more among 20 and 40 prompts are within what chance gives.
    noisy = few.model_copy(update={"p_value": 0.5, "pairs": 30, "unmatched": 0.56})
    assert classify(noisy) == "prompt_mix"
    with pytest.raises(DataError, match="no rows of its own"):
        matched_test(rows(ORDINARY, 60, 1), [], DETECTOR)
