from __future__ import annotations

import random

import numpy as np
import pytest
from traffic import NEW, ORDINARY, rows
from words import SMALL, Words

from monitoring.attribution import attribute, sort_rows
from monitoring.matching import matched_test
from monitoring.topics import MIN_TEXTS, SCATTERED_NAME, new_topics, topic_names
from monitoring.windows import Row

DETECTOR = Words(**SMALL)
REFERENCE = rows(ORDINARY, 300, 1)
SPACE = {"space": NEW["space"]}


def found_in(window: list[Row], **more):
    return attribute(REFERENCE, window, DETECTOR, matched_test(REFERENCE, window, DETECTOR), **more)


def test_a_new_topic_is_named_shown_and_dated():
    new = rows(SPACE, 20, 3, "n")
    created = {row.id: f"2026-01-02T00:00:{i:02d}+00:00" for i, row in enumerate(reversed(new))}
    found = found_in([*rows(ORDINARY, 80, 2, "o"), *new], created=created, since="2026-01-01")
    assert found.where == "inputs"
    assert found.since == "2026-01-01"
    assert found.inputs_p < 0.01 < found.outputs_p
    assert found.new_share > 0.1
    by_side = {t.side: t for t in found.topics if t.new}
    assert set(by_side) == {"prompt", "answer"}
    for side, topic in by_side.items():
        assert set(topic.name.split(", ")) <= set(SPACE["space"]), "the words of the topic, none of the frame"
        assert topic.count >= 18
        assert topic.reference_share == 0
        assert topic.window_share == topic.count / 100
        assert topic.since == min(created.values()), side
        assert len(topic.examples) == 3
        assert all(e.id.startswith("n") for e in topic.examples)


def test_known_topics_do_not_shrink_because_there_are_new_ones():
    found = found_in([*rows(ORDINARY, 60, 2, "o"), *rows(SPACE, 120, 3, "n")])
    assert sum(t.new for t in found.topics) == 2
    assert sum(not t.new for t in found.topics) <= 1, "each has a third of its former share of the whole"


def test_an_ordinary_window_is_explained_by_nothing():
    listed = [found_in(rows(ORDINARY, 80, seed, "w")) for seed in range(10, 14)]
    assert sum(len(f.topics) + len(f.descriptors) for f in listed) <= 1
    assert sum(f.where == "neither" for f in listed) >= 3


def test_known_topics_in_other_shares_are_listed_and_not_called_new():
    window = [*rows(ORDINARY, 40, 2, "o"), *rows({"bikes": ORDINARY["bikes"]}, 60, 3, "b")]
    found = found_in(window)
    assert found.where == "inputs"
    assert not any(t.new for t in found.topics)
    grown = [t for t in found.topics if t.window_share > t.reference_share and t.side == "prompt"]
    assert grown
    assert all(set(t.name.split(", ")) & set(ORDINARY["bikes"]) for t in grown)


def test_other_answers_to_the_same_prompts_are_a_change_of_outputs():
    loop = "again and again " * 30
    window = [
        r.model_copy(update={"output": loop + r.output}) if i % 2 else r
        for i, r in enumerate(rows(ORDINARY, 100, 2, "o"))
    ]
    found = found_in(window)
    assert found.where == "outputs"
    assert {c.side for c in found.descriptors} == {"answer"}
    by_name = {c.name: c for c in found.descriptors}
    assert by_name["repetition"].window > 0.3 > by_name["repetition"].reference
    assert by_name["length"].distance >= 0.45
    distances = [c.distance for c in found.descriptors]
    assert distances == sorted(distances, reverse=True)
    assert all(len(e.answer) <= 300 for t in found.topics for e in t.examples)


def test_both_sides_are_told_from_one():
    new = rows(SPACE, 30, 3, "n")
    old = [r.model_copy(update={"output": "I'm sorry, no."}) for r in rows(ORDINARY, 80, 2, "o")]
    assert found_in([*old, *new]).where == "both"


def test_turns_of_one_session_count_once():
    new = [
        row.model_copy(update={"id": f"{row.id}-{turn}", "session": row.id})
        for row in rows(SPACE, 3, 3, "n")
        for turn in range(12)
    ]
    old = rows(ORDINARY, 80, 2, "o")
    found = attribute(REFERENCE, [*old, *new], DETECTOR, None)
    assert all(t.count <= 3 for t in found.topics)
    assert found.outputs_p is None
    assert found.new_share is None


def test_too_few_rows_leave_the_prompts_untested():
    found = attribute(REFERENCE, rows(ORDINARY, 5, 2, "o"), DETECTOR, None)
    assert found.inputs_p is None
    assert found.where == "neither"


def test_order_changes_nothing():
    window = [*rows(ORDINARY, 60, 2, "o"), *rows(NEW, 30, 3, "n")]
    first = attribute(REFERENCE, window, DETECTOR, None)
    mixed = list(window)
    random.Random(0).shuffle(mixed)
    assert attribute(REFERENCE[::-1], mixed, DETECTOR, None) == first
    assert len([t for t in first.topics if t.new and t.side == "prompt"]) == 2, "space and sea are two topics"


def test_likelihood_is_compared_where_it_is_known():
    window = rows(ORDINARY, 60, 2, "w")
    known = {r.id: -0.5 - 0.001 * i for i, r in enumerate(REFERENCE)} | {r.id: -2.5 for r in window[:40]}
    found = attribute(REFERENCE, window, DETECTOR, None, logprobs=known)
    assert [(c.name, c.window) for c in found.descriptors] == [("logprob", -2.5)]
    assert -1 < found.descriptors[0].reference < -0.5


def test_topics_put_like_prompts_together_and_new_ones_apart():
    new, odd = rows(SPACE, 20, 3, "n"), Row(id="odd", prompt="zzz qqq xxx", output="?")
    known = {topic: rows({topic: words}, 20, 5, topic) for topic, words in ORDINARY.items()}
    given = [*REFERENCE, *new, odd, *(r for some in known.values() for r in some)]
    topics = sort_rows("prompt", REFERENCE, given, DETECTOR)
    found = {row.id: topics.name(int(group)) for row, group in zip(given, topics.group, strict=True)}
    assert len({found[r.id] for r in new}) == 1
    assert found["odd"] == SCATTERED_NAME
    of_topic = {topic: {found[r.id] for r in some} - {SCATTERED_NAME} for topic, some in known.items()}
    for topic, names in of_topic.items():
        others = set().union(*(n for t, n in of_topic.items() if t != topic), {found[new[0].id]})
        assert not names & others, topic


def test_names_need_no_list_of_stop_words_and_differ():
    german = [
        ["wann kommt die Rechnung", "die Rechnung ist falsch", "wo ist die Rechnung"],
        ["wann kommt das Paket", "das Paket ist weg", "wo ist das Paket"],
        ["die Uhr und das Licht", "das ist die Uhr", "wo ist die Uhr"],
        ["\u6211\u7684\u53d1\u7968\u5728\u54ea\u91cc", "\u53d1\u7968\u4e0d\u5bf9", "\u53d1\u7968"],
        ["", "", ""],
        ["", "42", "!"],
    ]
    names = topic_names(german)
    assert names[0].startswith("rechnung")
    assert names[1].startswith("paket")
    assert names[3].startswith("\u53d1\u7968")
    assert names[4:] == ("without words", "without words (2)")
    assert topic_names([]) == ()


@pytest.mark.parametrize("count", [0, 1, MIN_TEXTS])
def test_few_texts_are_a_topic_only_if_they_are_enough_and_alike(count):
    same = np.tile(np.eye(8, dtype=np.float32)[0], (count, 1))
    assert new_topics(same) == ([list(range(count))] if count >= MIN_TEXTS else [])
    assert new_topics(np.eye(8, dtype=np.float32)[:count]) == []
