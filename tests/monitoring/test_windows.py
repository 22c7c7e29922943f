from __future__ import annotations

import json
import random

import pytest
from traffic import ORDINARY, exchange, rows

from monitoring.windows import REFERENCE_FILE, Row, Window, accepted, freeze, load, rows_of
from regraft.errors import DataError
from regraft.records import content_hash


def test_a_frozen_reference_comes_back_whole(tmp_path):
    frozen = freeze(tmp_path, model="shop", version=1, rows=rows(ORDINARY, 10, 0))
    assert load(tmp_path) == frozen
    assert freeze(tmp_path / "b", model="shop", version=1, rows=rows(ORDINARY, 10, 0)).id == frozen.id
    assert freeze(tmp_path / "c", model="shop", version=2, rows=rows(ORDINARY, 10, 0)).id != frozen.id


def test_a_row_without_a_session_hashes_as_before_there_were_any(tmp_path):
    row = Row(id="a", prompt="p", output="o")
    alone = freeze(tmp_path, model="shop", version=1, rows=[row])
    assert alone.id == content_hash(["shop", 1, [["a", "p", "o"]]])
    path = tmp_path / REFERENCE_FILE
    path.write_text(path.read_text().replace('"session": null', '"session": "s"'))
    with pytest.raises(DataError, match="changed since it was frozen"):
        load(tmp_path)


@pytest.mark.parametrize("field", ["output", "prompt", "id"])
def test_a_tampered_reference_is_refused(tmp_path, field):
    freeze(tmp_path, model="shop", version=1, rows=rows(ORDINARY, 10, 0))
    path = tmp_path / REFERENCE_FILE
    raw = json.loads(path.read_text())
    raw["rows"][3][field] += "!"
    path.write_text(json.dumps(raw))
    with pytest.raises(DataError, match="changed since it was frozen"):
        load(tmp_path)


@pytest.mark.parametrize("content", [None, "not json", "[]", "{}"])
def test_a_missing_or_broken_reference_is_a_data_error(tmp_path, content):
    if content is not None:
        (tmp_path / REFERENCE_FILE).write_text(content)
    with pytest.raises(DataError):
        load(tmp_path)


def test_nothing_or_an_id_twice_cannot_be_frozen(tmp_path):
    row = Row(id="a", prompt="p", output="o")
    with pytest.raises(DataError, match="no exchanges"):
        freeze(tmp_path, model="shop", version=1, rows=[])
    with pytest.raises(DataError, match="twice"):
        freeze(tmp_path, model="shop", version=1, rows=[row, row])
    assert not (tmp_path / REFERENCE_FILE).exists()


def test_a_window_says_what_it_left_out():
    base = rows(ORDINARY, 12, 0)
    given = [
        *(exchange(row, second=i) for i, row in enumerate(base[:4])),
        exchange(base[4], error="timeout", output=""),
        exchange(base[5], model_version=2),
        exchange(base[6], model="other"),
        exchange(base[7], session="s"),
        exchange(base[8], session="s"),
        exchange(Row(id="again", prompt=f"  {base[0].prompt.upper()} ", output="x")),
        exchange(Row(id="empty", prompt="a question of its own", output="")),
    ]
    window = Window.of(given, 100, model="shop", version=1)
    assert (window.given, window.errors, window.other_versions, window.repeats) == (11, 1, 2, 2)
    assert len(window.rows) == 6
    assert "empty" in {row.id for row in window.rows}, "an empty answer is an answer"
    assert (window.start, window.end) == (given[0].created, given[3].created)


def test_the_sample_depends_on_the_ids_alone():
    given = [exchange(row) for row in rows(ORDINARY, 80, 0)]
    shuffled = list(given)
    random.Random(1).shuffle(shuffled)
    window = Window.of(given, 50)
    assert window == Window.of(shuffled, 50)
    assert (len(window.rows), window.not_sampled) == (50, 30)


def test_accepted_traffic_is_as_many_rows_as_were_wanted_though_prompts_repeat():
    asked = rows(ORDINARY, 40, 1)
    often = [row.model_copy(update={"id": f"again{i}", "prompt": "Hello"}) for i, row in enumerate(asked)]
    mixed = [row for pair in zip(asked, often, strict=True) for row in pair]
    given = [exchange(row, second=i) for i, row in enumerate(mixed)]
    disliked = frozenset({asked[0].id})
    taken = accepted(given, disliked, 20)
    assert taken is not None
    assert len(rows_of(taken)) == 20
    assert taken[-1].id == asked[19].id, "and no more are taken than it needs"
    assert not disliked & {e.id for e in taken}
    assert accepted(list(reversed(given)), disliked, 20) == taken
    assert accepted(given, frozenset(), 41) is not None
    assert accepted(given, frozenset(), 42) is None, "forty questions and a greeting"
