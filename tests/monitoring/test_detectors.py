from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from traffic import NEW, ORDINARY, rows

from monitoring.detectors import DETECTOR_CLASSES, Detector, Omnibus, parse_detector
from monitoring.detectors import permutation as perm
from monitoring.detectors.text import grown_terms, similarities
from monitoring.windows import Row

FAST = Omnibus(permutations=299)
#: Settings with which each detector takes the few rows of these tests.
_FEW = {"min_reference": 30, "min_window": 30}
SMALL = {"calibrated": _FEW, "domain_classifier": _FEW}


def small(kind: type[Detector]) -> Detector:
    name = kind.model_fields["name"].default
    return parse_detector({"name": name} | SMALL.get(name, {}))


def test_ordinary_windows_alarm_no_more_often_than_alpha_says():
    found = []
    for seed in range(40):
        both = rows(ORDINARY, 100, seed)
        found.append(FAST.detect(both[:60], both[60:]).p_value)
    # Binomial(40, 0.1) exceeds 9 once in two hundred times.
    assert sum(p <= 0.1 for p in found) <= 9
    assert 0.25 < np.mean(found) < 0.75, "p-values of ordinary windows spread over the whole range"


def test_new_topics_are_found_even_in_ordinary_answers():
    reference, ordinary = rows(ORDINARY, 80, 1), rows(ORDINARY, 60, 2, "o")
    new = rows(NEW, 60, 3, "n")
    styled = [Row(id=n.id, prompt=n.prompt, output=o.output) for n, o in zip(new, ordinary, strict=True)]
    for window in (new, styled):
        found = FAST.detect(reference, window)
        assert found.p_value < 0.02
        assert found.effect > 0.3
        assert {term.text for term in found.terms} & set(NEW["space"] + NEW["sea"])
        assert found.drivers
    assert all(n.row.id.startswith("n") for n in FAST.detect(reference, [*ordinary[:40], *new[:20]]).novel)


@pytest.mark.parametrize("output", ["", "I'm sorry, I cannot help with that."])
def test_a_change_of_form_is_found(output):
    reference, window = rows(ORDINARY, 80, 1), rows(ORDINARY, 60, 2)
    changed = [row.model_copy(update={"output": output}) if i < 24 else row for i, row in enumerate(window)]
    found = FAST.detect(reference, changed)
    assert found.p_value < 0.02
    assert found.effect > 0.1


def test_a_reference_and_a_window_without_any_text_are_the_same():
    blank = [Row(id=str(i), prompt="", output="") for i in range(30)]
    for kind in DETECTOR_CLASSES:
        found = small(kind).detect(blank, blank)
        assert found.p_value == 1.0
        assert found.effect == 0.0


@pytest.mark.parametrize("kind", DETECTOR_CLASSES)
def test_every_detector_is_deterministic_and_a_record(kind):
    reference, window = rows(ORDINARY, 60, 1), rows(NEW, 50, 2)
    detector = small(kind)
    found = detector.detect(reference, window)
    assert found == detector.detect(reference, window)
    assert type(found).model_validate_json(found.model_dump_json()) == found
    assert 0 < found.p_value <= 1
    assert kind.effect_unit


def test_an_unknown_detector_or_field_is_refused():
    for settings in ({"name": "magic"}, {"name": "omnibus", "magic": 1}, {"name": "omnibus", "tail": 1.5}):
        with pytest.raises(ValidationError):
            parse_detector(settings)


def test_leave_one_out_scores_are_those_of_refitting():
    generator = np.random.default_rng(0)
    features = generator.normal(size=(20, 4))
    similarity, labels = features @ features.T, perm.labellings(12, 8, 3, 0)
    scores = perm.novelty(similarity, labels, 2.0)
    kernel = similarity + 1.0
    for row in (0, 7, 19):
        rest = np.arange(20) != row
        weights = np.linalg.solve(kernel[np.ix_(rest, rest)] + 2.0 * np.eye(19), labels[rest].astype(float))
        np.testing.assert_allclose(scores[row], kernel[row, rest] @ weights, rtol=1e-9)


def test_statistics_agree_with_their_definitions():
    from scipy.stats import ks_2samp

    generator = np.random.default_rng(1)
    labels = perm.labellings(30, 20, 50, 0)
    assert (labels.sum(axis=0) == 20).all()
    values = generator.integers(0, 6, 50).astype(float)
    for column in (0, 17):
        inside, outside = values[labels[:, column]], values[~labels[:, column]]
        assert perm.kolmogorov_smirnov(values, labels)[column] == pytest.approx(
            ks_2samp(inside, outside).statistic
        )
    continuous = generator.normal(size=(50, 51))
    found = perm.excess(continuous, labels)[5]
    inside, outside = continuous[labels[:, 5], 5], continuous[~labels[:, 5], 5]
    assert found == pytest.approx(ks_2samp(inside, outside, alternative="less").statistic)
    assert perm.p_values(np.array([3.0, 1.0, 2.0, 3.0])).tolist() == [0.5, 1.0, 0.75, 0.5]


def test_many_statistics_in_a_group_do_not_bound_its_p_value():
    generator = np.random.default_rng(2)
    form = generator.normal(size=(18, 1000))
    form[3, 0] = 12.0
    joint, adjusted = perm.joint_p({"form": form, "other": generator.normal(size=(1, 1000))})
    assert max(joint, adjusted["form"]) <= 0.003


def test_similarities_are_cosines_whatever_the_texts():
    matrix = similarities(["red apple pie", "red apple tart", "", " ", "zzz", "\u00fc"])
    np.testing.assert_allclose(np.diag(matrix), 1.0)
    np.testing.assert_allclose(matrix, matrix.T)
    assert matrix[0, 1] > 0.2
    assert matrix[2, 3] == 1.0
    assert matrix[2, 0] == matrix[4, 5] == 0.0


def test_terms_that_grew_say_by_how_much():
    terms = grown_terms(["old words"] * 10, ["new words"] * 5 + ["old words"] * 5, 5)
    assert ("new", 0.0, 0.5) in {(t.text, t.reference_share, t.window_share) for t in terms}
    assert "words" not in {t.text for t in terms}
    assert grown_terms([""], ["the"], 5) == ()
