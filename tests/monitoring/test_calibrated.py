from __future__ import annotations

import random

import numpy as np
import pytest
from traffic import NEW, ORDINARY, exchange, rows
from words import SMALL, Words

from monitoring.check import check_window
from monitoring.detectors import Calibrated
from monitoring.detectors import permutation as perm
from monitoring.detectors.frozen import split
from monitoring.windows import Reference, Row, session_of
from regraft.config import MonitorSection
from regraft.errors import DataError

DETECTOR = Words(**SMALL)
REFUSAL = "I'm sorry, I cannot help with that."


def conversations(count: int, seed: int, prefix: str = "s") -> list[Row]:
    """Sessions of four turns that keep to one topic and repeat themselves."""
    made = []
    for i, row in enumerate(rows(ORDINARY, count, seed, prefix)):
        made += [
            Row(id=f"{row.id}-{turn}", prompt=row.prompt, output=row.output, session=f"{prefix}{i}")
            for turn in range(4)
        ]
    return made


def with_answers(given: list[Row], output: str, every: int) -> list[Row]:
    return [r if i % every else r.model_copy(update={"output": output}) for i, r in enumerate(given)]


def test_new_topics_are_found_by_their_meaning():
    reference, ordinary, new = rows(ORDINARY, 120, 1), rows(ORDINARY, 60, 2, "o"), rows(NEW, 15, 3, "n")
    detector = Calibrated(min_reference=100, min_window=50)
    found = detector.detect(reference, [*ordinary[:45], *new])
    assert found.p_value < 0.02
    assert found.effect > 0.1
    assert {t.name: t.p_value for t in found.tests}["novelty"] < 0.02
    assert found.drivers[0].startswith(("answers are unlike", "answers unlike", "the answers are spread"))
    assert sum(n.row.id.startswith("n") for n in found.novel) >= 6
    assert detector.detect(reference, ordinary).p_value > 0.05


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
    assert sum(p <= 0.1 for p in single) >= 14, "the same turns taken for independent ones"


def test_a_change_of_form_is_found_and_counts_where_the_gate_says_so():
    reference, window = rows(ORDINARY, 100, 1), with_answers(rows(ORDINARY, 60, 2), REFUSAL, 3)
    found = DETECTOR.detect(reference, window)
    assert found.p_value < 0.02
    assert any("share of refusals of answers" in driver for driver in found.drivers)
    loud = [r.model_copy(update={"output": r.output.upper() + "!?!?!?"}) for r in rows(ORDINARY, 60, 2)]
    assert DETECTOR.detect(reference, loud).effect < 0.1, "the words are known ones"
    assert DETECTOR.model_copy(update={"gate": "any"}).detect(reference, loud).effect > 0.5


def test_a_closer_look_tells_how_small_a_p_value_is():
    closer = DETECTOR.model_copy(update={"most_permutations": 4999})
    reference, ordinary, new = rows(ORDINARY, 120, 1), rows(ORDINARY, 40, 2, "o"), rows(NEW, 40, 3, "n")
    assert 1e-3 <= DETECTOR.detect(reference, new).p_value <= 2e-3
    assert 2e-4 <= closer.detect(reference, new).p_value < 1e-3
    assert closer.detect(reference, ordinary) == DETECTOR.detect(reference, ordinary), "nothing to look at"


def test_a_new_topic_in_few_rows_keeps_company():
    reference = rows(ORDINARY, 300, 1)
    window = [*rows(ORDINARY, 92, 2, "o"), *rows(NEW, 8, 3, "n")]
    tests = {t.name: t.p_value for t in DETECTOR.detect(reference, window).tests}
    assert tests["company"] <= 0.02
    ordinary = {t.name: t.p_value for t in DETECTOR.detect(reference, rows(ORDINARY, 100, 4, "p")).tests}
    assert ordinary["company"] > 0.05


def test_too_few_sessions_are_insufficient_never_stable():
    one = conversations(25, 1)
    with pytest.raises(DataError, match="the window has 19 sessions of its own, at least 20"):
        DETECTOR.detect(rows(ORDINARY, 80, 0), one[: 19 * 4])
    reference = Reference(id="r", model="shop", version=1, rows=tuple(rows(ORDINARY, 80, 0)))
    given = [exchange(r) for r in rows(ORDINARY, 60, 7, "w")]
    report = check_window(
        reference, given, MonitorSection(min_rows=50), detector=Words(min_reference=81)
    ).report
    assert report.status == "insufficient"
    assert report.p_value is None
    assert "the reference has 80 sessions, at least 81 are needed" in report.summary
    enough = check_window(reference, given, MonitorSection(min_rows=50), detector=Words(**SMALL)).report
    assert enough.status == "stable"
    again = check_window(reference, given, MonitorSection(min_rows=50), detector=Words(**SMALL))
    assert enough.id == again.report.id


def test_neither_order_nor_cache_changes_what_is_found(tmp_path):
    reference, window = conversations(40, 1), conversations(30, 2, "w")
    found = DETECTOR.detect(reference, window)
    shuffle = random.Random(0)
    for side in (reference, window):
        shuffle.shuffle(side)
    other = Words(**SMALL, cache=tmp_path)
    assert other.detect(reference, window) == found
    assert other.model_dump() == DETECTOR.model_dump()


def test_sessions_on_both_sides_are_left_out_of_the_window():
    reference, window = conversations(40, 1), conversations(30, 2, "w")
    again = [r.model_copy(update={"id": f"again-{r.id}", "output": REFUSAL}) for r in reference[:80]]
    assert DETECTOR.detect(reference, [*window, *again]) == DETECTOR.detect(reference, window)


def test_the_reference_is_split_by_whole_sessions_whatever_the_order():
    given = [*conversations(30, 1), *rows(ORDINARY, 20, 2)]
    parts = split(given)
    sessions = [{session_of(row) for row in part} for part in parts]
    assert [len(s) for s in sessions] == [20, 10, 20]
    assert not (sessions[0] & sessions[1] or sessions[0] & sessions[2] or sessions[1] & sessions[2])
    assert sum(map(len, parts)) == len(given)
    assert split(given[::-1]) == parts


def test_the_threshold_holds_for_rows_that_made_neither_it_nor_the_index():
    reference = rows(ORDINARY, 3000, 1)
    frozen, parts = DETECTOR.frozen(reference), split(reference)

    def beyond(part: list[Row]) -> float:
        distances = frozen.features(DETECTOR.embed([r.output for r in part])).distances
        return float((distances > frozen.threshold).mean())

    assert 0.02 < beyond(parts.compared) < 0.09
    assert beyond(parts.mapped) < 0.01, "the index looks near to itself"
    assert beyond(rows(NEW, 100, 2)) > 0.9


def test_whole_sessions_are_permuted():
    sessions = [f"s{i // 3}" for i in range(30)]
    labels = perm.session_labellings(sessions, [i >= 18 for i in range(30)], 200, 0)
    assert labels[:, 0].tolist() == [i >= 18 for i in range(30)]
    blocks = labels.reshape(10, 3, 201)
    assert (blocks == blocks[:, :1]).all()
    assert (blocks[:, 0].sum(axis=0) == 4).all()
    assert len({tuple(column) for column in labels.T}) > 100
    with pytest.raises(ValueError, match="in the reference and in the window"):
        perm.session_labellings(sessions, [i >= 17 for i in range(30)], 10, 0)


def test_topic_statistics_agree_with_their_definitions():
    from scipy.stats import chi2_contingency

    generator = np.random.default_rng(0)
    topics, labels = generator.integers(0, 5, 60), perm.labellings(40, 20, 30, 1)
    for column in (0, 11):
        inside = np.bincount(topics[labels[:, column]], minlength=5)
        outside = np.bincount(topics[~labels[:, column]], minlength=5)
        expected = chi2_contingency(np.stack([inside, outside]), correction=False).statistic
        # The window's cells over (1 - share) are both sides' cells together.
        assert perm.mixture(topics, labels)[column] == pytest.approx(expected)
        distance = np.abs(inside / 20 - outside / 40).sum() / 2
        assert perm.total_variation(topics, labels)[column] == pytest.approx(distance)
    flag = generator.integers(0, 2, 60).astype(float)
    np.testing.assert_allclose(
        perm.rate_differences(flag[:, None], labels)[0], perm.kolmogorov_smirnov(flag, labels), atol=1e-12
    )


def test_company_counts_neighbours_on_the_same_side():
    generator = np.random.default_rng(0)
    places, labels = generator.normal(size=(30, 3)), perm.labellings(20, 10, 5, 0)
    squared = perm.squared_distances(places @ places.T)
    near, weights = perm.neighbours(squared, 4), np.maximum(generator.normal(size=30), 0)
    assert (near.sum(axis=1) == 4).all()
    assert not near.diagonal().any()
    column = labels[:, 3]
    expected = sum(weights[i] * (near[i] & column).sum() for i in range(30) if column[i]) / 100
    assert perm.company(weights, near, labels)[3] == pytest.approx(expected)
    # Of equal texts none comes before the other, or the order of rows would tell the sides apart.
    assert perm.neighbours(np.zeros((6, 6)), 2).sum() == 30


def test_a_distribution_of_many_values_is_looked_at_by_quantiles():
    from scipy.stats import ks_2samp

    values, labels = np.random.default_rng(0).normal(size=300), perm.labellings(200, 100, 4, 0)
    for column in range(5):
        exact = ks_2samp(values[labels[:, column]], values[~labels[:, column]]).statistic
        assert exact - 0.03 <= perm.kolmogorov_smirnov(values, labels)[column] <= exact + 1e-9


@pytest.mark.parametrize("wrong", [{"permutations": 998}, {"tail": 1.0}, {"gate": "form"}, {"min_window": 0}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Calibrated(**wrong)
