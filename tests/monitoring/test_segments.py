"""Topics whose quality fell, told from those that are only asked about more often."""

from __future__ import annotations

import pytest
from traffic import NEW, ORDINARY, exchange, rows
from words import SMALL, Words

from monitoring.segments import worse_segments
from monitoring.windows import Row
from regraft.config import MonitorSection
from regraft.errors import DataError
from regraft.records import CapturedExchange

DETECTOR = Words(**SMALL)
SETTINGS = MonitorSection()
SOME = {k: v for k, v in ORDINARY.items() if k in ("bikes", "music")}


@pytest.fixture(scope="module")
def reference() -> list[Row]:
    return rows(ORDINARY, 400, 1)


def asked(worse: str = "", every: int = 1) -> list[CapturedExchange]:
    """More of two topics than before; answers about one of them may be refused."""
    given = rows(SOME, 160, 5, "w")
    own = [any(word in row.prompt for word in ORDINARY[worse]) if worse else False for row in given]
    refused = [flag and i % every == 0 for i, flag in enumerate(own)]
    return [
        exchange(row, i, **({"output": "I'm sorry, but I cannot help with that."} if refused[i] else {}))
        for i, row in enumerate(given)
    ]


def test_a_topic_that_is_refused_is_named_by_its_words_and_the_others_are_not(reference: list[Row]) -> None:
    found = worse_segments(asked("bikes"), reference, SETTINGS, detector=DETECTOR)
    assert found
    for name in found:
        assert set(name.rsplit(" (", 1)[0].replace(",", "").split()) & set(ORDINARY["bikes"])
        assert not set(name.rsplit(" (", 1)[0].replace(",", "").split()) & set(ORDINARY["music"])


def test_a_new_topic_has_no_answers_to_be_worse_than(reference: list[Row]) -> None:
    sorry = "I'm sorry, but I cannot help with that."
    new = [exchange(row, i, output=sorry) for i, row in enumerate(rows(NEW, 80, 6, "n"))]
    assert worse_segments([*asked(), *new], reference, SETTINGS, detector=DETECTOR) == ()
    (worse,) = worse_segments([*asked("bikes"), *new], reference, SETTINGS, detector=DETECTOR)
    assert set(worse.split(", ")) <= set(ORDINARY["bikes"]), "called by its words, as the report does"


def test_more_of_a_topic_that_is_answered_as_before_is_no_loss(reference: list[Row]) -> None:
    assert worse_segments(asked(), reference, SETTINGS, detector=DETECTOR) == ()
    assert worse_segments([], reference, SETTINGS, detector=DETECTOR) == ()


def test_a_topic_that_always_was_refused_got_no_worse(reference: list[Row]) -> None:
    sorry = "I'm sorry, but I cannot help with that."
    before = [
        row.model_copy(update={"output": sorry}) if any(w in row.prompt for w in ORDINARY["bikes"]) else row
        for row in reference
    ]
    assert worse_segments(asked("bikes"), before, SETTINGS, detector=DETECTOR) == ()


def test_a_reference_too_small_for_topics_is_named(reference: list[Row]) -> None:
    with pytest.raises(DataError, match="too small to split"):
        worse_segments(asked(), reference[:4], SETTINGS, detector=DETECTOR)
