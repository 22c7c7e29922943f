from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import pytest
from traffic import NEW, ORDINARY, rows
from words import SMALL, Words

from monitoring.detectors import DomainClassifier
from monitoring.detectors import permutation as perm
from monitoring.detectors.domain_classifier import areas_under_curve, halves
from monitoring.windows import Row, session_of
from regraft.errors import DataError

REMIXED = {topic: ORDINARY[topic] for topic in ("bread", "garden", "bikes")}


class WordsClassifier(DomainClassifier):
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        return Words(**SMALL).embed(texts)


DETECTOR = WordsClassifier(min_reference=30, min_window=20)


def conversations(count: int, seed: int, prefix: str = "s") -> list[Row]:
    """Sessions of four turns that repeat themselves."""
    return [
        row.model_copy(update={"id": f"{row.id}-{turn}", "session": f"{prefix}{i}"})
        for i, row in enumerate(rows(ORDINARY, count, seed, prefix))
        for turn in range(4)
    ]


def test_new_topics_are_found_and_the_effect_is_about_their_share():
    reference, ordinary, new = rows(ORDINARY, 600, 1), rows(ORDINARY, 400, 2, "o"), rows(NEW, 100, 3, "n")
    window = [*ordinary[:300], *new]
    found = DETECTOR.detect(reference, window)
    assert found.p_value == 1 / 1000, "the smallest there is"
    assert 0.1 < found.effect < 0.35
    assert found.drivers[0].startswith("a classifier tells answers from the reference's (AUC 0.")
    assert all(n.row.id.startswith("n") for n in found.novel)
    assert {n.row.id for n in found.novel} <= {row.id for row in halves(window).held_out}
    assert {term.text for term in found.terms} & set(NEW["space"] + NEW["sea"])
    assert DETECTOR.detect(reference, ordinary).p_value > 0.05


def test_other_shares_of_known_topics_are_found():
    assert DETECTOR.detect(rows(ORDINARY, 400, 1), rows(REMIXED, 200, 2, "w")).p_value < 0.01


def test_prompts_are_looked_at_where_that_is_asked_for():
    reference, ordinary, new = rows(ORDINARY, 300, 1), rows(ORDINARY, 200, 2, "o"), rows(NEW, 200, 3, "n")
    usual = [n.model_copy(update={"output": o.output}) for n, o in zip(new, ordinary, strict=True)]
    assert DETECTOR.detect(reference, usual).p_value > 0.05
    found = DETECTOR.model_copy(update={"side": "prompts"}).detect(reference, usual)
    assert found.p_value < 0.01
    assert found.effect > 0.8


def test_sessions_of_like_turns_raise_no_more_false_alarms_than_alpha_says():
    whole, single = [], []
    for seed in range(40):
        both = conversations(70, seed)
        reference, window = both[:160], both[160:]
        whole.append(DETECTOR.detect(reference, window).p_value)
        alone = [[r.model_copy(update={"session": None}) for r in side] for side in (reference, window)]
        single.append(DETECTOR.detect(*alone).p_value)
    # Binomial(40, 0.1) exceeds 9 once in two hundred times.
    assert sum(p <= 0.1 for p in whole) <= 9
    assert 0.3 < np.mean(whole) < 0.7, "p-values of ordinary windows spread over the whole range"
    assert sum(p <= 0.1 for p in single) >= 14, "the same turns taken for independent ones"


def test_areas_are_those_of_the_definition_under_every_labelling():
    from sklearn.metrics import roc_auc_score

    labels = perm.session_labellings([f"s{i // 3}" for i in range(60)], [i >= 36 for i in range(60)], 30, 0)
    scores = np.random.default_rng(0).integers(0, 9, 60).astype(float)
    found = areas_under_curve(scores, labels)
    for column in (0, 7, 30):
        assert found[column] == pytest.approx(roc_auc_score(labels[:, column], scores))


def test_halves_share_no_session_whatever_the_order():
    given = [*conversations(31, 1), *rows(ORDINARY, 20, 2)]
    parts = halves(given)
    sessions = [{session_of(row) for row in part} for part in parts]
    assert [len(s) for s in sessions] == [25, 26]
    assert not sessions[0] & sessions[1]
    assert halves(given[::-1]) == parts


def test_neither_order_nor_sessions_of_both_sides_change_what_is_found():
    reference, window = conversations(40, 1), conversations(30, 2, "w")
    found = DETECTOR.detect(reference, window)
    again = [r.model_copy(update={"id": f"again-{r.id}", "output": "no"}) for r in reference[:80]]
    mixed, shuffled = [*window, *again], list(reference)
    for side in (mixed, shuffled):
        random.Random(0).shuffle(side)
    assert DETECTOR.detect(shuffled, mixed) == found


def test_too_few_sessions_are_refused_and_said_to_be_lacking():
    reference, few = rows(ORDINARY, 40, 1), conversations(19, 2)
    assert DETECTOR.lacking(reference, few) == (
        "the window has 19 sessions of its own, at least 20 are needed"
    )
    with pytest.raises(DataError, match="the window has 19 sessions of its own"):
        DETECTOR.detect(reference, few)
    assert "the reference has 29 sessions" in DETECTOR.lacking(reference[:29], few)
    assert DETECTOR.lacking(reference, conversations(20, 2)) == ""


@pytest.mark.parametrize(
    "wrong", [{"permutations": 998}, {"penalty": 0}, {"side": "both"}, {"min_window": 9}]
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DomainClassifier(**wrong)
