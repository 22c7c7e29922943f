from __future__ import annotations

import sqlite3

import numpy as np
import pytest
from traffic import ORDINARY, exchange, rows
from words import Words

from monitoring import descriptors
from monitoring.descriptors import (
    DESCRIPTORS,
    MORE,
    describe,
    describe_full,
    describe_more,
    describe_sides,
    in_words,
)
from monitoring.kept import FILE, kept, key_of
from monitoring.languages import languages
from monitoring.likelihoods import likelihoods
from monitoring.tone import tones
from monitoring.vectors import vectors
from regraft.embeddings import DEFAULT
from regraft.errors import DataError
from regraft.records import Likelihood


def test_descriptors_of_known_texts():
    frame = describe(
        ["Hello there. How are you?", "", None, "42", "I'm sorry, no", "\u017elut\u00fd k\u016f\u0148"]
    )
    assert list(frame.columns) == list(DESCRIPTORS)
    assert list(frame["words"]) == [5, 0, 0, 1, 3, 2]
    assert list(frame["sentences"]) == [2, 0, 0, 1, 1, 1]
    assert list(frame["empty"]) == [0, 1, 1, 0, 0, 0]
    assert list(frame["question"]) == [1, 0, 0, 0, 0, 0]
    assert list(frame["refusal"]) == [0, 0, 0, 0, 1, 0]
    assert frame["digits"][3] == frame["non_letters"][3] == 1
    assert frame["non_letters"][5] == 0, "letters beyond ASCII are letters"


def test_nothing_is_undefined():
    frame = describe_sides([None, "", "   "], ["", None, "."])
    assert np.isfinite(frame.to_numpy()).all()
    assert describe([]).shape == (0, len(DESCRIPTORS))
    assert all(in_words(column) for column in frame)


def test_more_descriptors_of_known_texts():
    frame = describe_more(["so it goes " * 10, "all of these words are different ones", "", None])
    assert list(frame.columns) == [*DESCRIPTORS, *MORE]
    assert frame["repetition"].tolist() == pytest.approx([1 - 3 / 28, 0, 0, 0])
    assert frame["language_unknown"].tolist() == [1, 0, 1, 1]
    assert frame["language_en"].tolist() == [0, 1, 0, 0]
    assert (frame[[c for c in MORE if c.startswith("language_")]].sum(axis=1) == 1).all()
    assert np.isfinite(frame.to_numpy()).all()
    assert all(in_words(f"answer_{column}") for column in frame)
    assert describe_more([]).shape == (0, len(DESCRIPTORS) + len(MORE))


def test_languages_are_guessed_from_their_commonest_words():
    texts = {
        "en": "The parcel will be with you on Monday, and it is free of charge.",
        "de": "Die Lieferung ist nicht angekommen und ich warte auf eine Antwort.",
        "fr": "Le colis est arrivé mais il manque une pièce dans la boîte.",
        "es": "El pedido no ha llegado y quiero saber cómo puedo pedir un reembolso.",
        "it": "Il pacco non è arrivato e vorrei sapere come posso chiedere un rimborso.",
        "pt": "O pedido não chegou e eu quero saber como você pode me ajudar com uma troca.",
        "nl": "Het pakket is niet aangekomen en ik wil graag weten wat er met de bestelling is.",
        "": "Xyzzy 42",
    }
    assert languages(list(texts.values())) == list(texts)
    assert languages([]) == []
    assert languages([None, "", "\u4f60\u597d", "the"]) == ["", "", "", ""]


#: Of several domains, none of them like an anchor's wording.
KIND = [
    "Your meter reading was accepted, and we are glad to tell you that nothing is owed.",
    "Parking was a breeze and the children adored the zoo.",
    "The surgery went smoothly and the patient is in good spirits.",
    "This keyboard is a joy to type on.",
    "Thanks a million for sorting out my booking so fast!",
    "The orchestra played beautifully.",
    "The vaccine has saved thousands of lives.",
    "My new manager is supportive and fair.",
]
UNKIND = [
    "Your complaint was ignored for weeks and nobody ever apologised.",
    "The parking was a nightmare and the children were in tears.",
    "The surgery went badly and the patient is in agony.",
    "This keyboard is junk and two keys fell off.",
    "I have been double charged again and I am furious!",
    "The orchestra was out of tune and painful to hear.",
    "The famine has killed thousands of people.",
    "My new manager is a bully.",
]


def test_tone_puts_kind_words_above_unkind_ones():
    def embed(texts):
        return vectors(texts, DEFAULT)

    kind, unkind = tones(KIND, embed), tones(UNKIND, embed)
    assert (kind > unkind).all(), "sentences about the same thing"
    assert (kind > 0).sum() + (unkind < 0).sum() >= 14
    assert tones(["", None, "42 !"], embed).tolist() == [0, 0, 0]
    assert tones([], embed).shape == (0,)


def test_full_descriptors_are_finite_named_and_say_the_side():
    prompts = ["Is it 40 euros for Anna?", "", None, "x"]
    answers = ["No, it is 45 euros, as Bernd said to Anna.", None, "", "y"]
    frame = describe_full(prompts, answers, embed=Words().embed, logprobs=[-0.5, None, None, -1.0])
    assert frame["answer_ungrounded_numbers"].tolist() == [1, 0, 0, 0]
    assert frame["answer_ungrounded_names"].tolist() == [0.5, 0, 0, 0]
    assert frame["prompt_question"].tolist() == [1, 0, 0, 0]
    assert frame["answer_logprob"].isna().tolist() == [False, True, True, False]
    assert np.isfinite(frame.drop(columns="answer_logprob").to_numpy()).all()
    assert len({in_words(str(column)) for column in frame}) == len(frame.columns)
    assert not {"answer_tone", "answer_logprob"} & set(describe_full(prompts, answers))
    assert len(describe_full([], [])) == 0
    with pytest.raises(ValueError, match="4 prompts, but 3 answers"):
        describe_full(prompts, answers[:3])


def test_what_was_described_once_is_kept(tmp_path, monkeypatch):
    given = rows(ORDINARY, 30, 1)
    prompts, answers = [r.prompt for r in given], [r.output for r in given]
    plain = describe_full(prompts, answers)
    assert describe_full(prompts, answers, cache=tmp_path).equals(plain)
    asked: list[str] = []

    def counting(texts):
        asked.extend(texts)
        return describe_more(texts)

    monkeypatch.setattr(descriptors, "describe_more", counting)
    again = describe_full([*prompts[::-1], "a new one"], [*answers[::-1], answers[0]], cache=tmp_path)
    assert asked == ["a new one"]
    assert again[:30][::-1].reset_index(drop=True).equals(plain)
    texts = b"".join(f.read_bytes() for f in tmp_path.iterdir())
    assert not any(prompt.encode() in texts for prompt in prompts)


def test_kept_rows_are_by_table_and_shape_and_a_broken_file_is_named(tmp_path):
    def make(value):
        return lambda places: np.full((len(places), 2), value)

    keys = [key_of("a"), key_of("b"), key_of("a")]
    assert kept(tmp_path, "one_1", 2, keys, make(1.0)).tolist() == [[1, 1]] * 3
    assert kept(tmp_path, "one_1", 2, keys, make(2.0)).tolist() == [[1, 1]] * 3
    assert kept(tmp_path, "one_2", 2, keys, make(2.0)).tolist() == [[2, 2]] * 3
    assert kept(None, "one_1", 2, keys, make(3.0)).tolist() == [[3, 3]] * 3
    assert kept(tmp_path, "one_1", 3, keys[:1], lambda p: np.full((len(p), 3), 4.0)).tolist() == [[4] * 3]
    with pytest.raises(ValueError, match="numbers for 1 rows of 5"):
        kept(tmp_path, "one_1", 5, keys[:1], make(1.0))
    assert key_of("ab", "c") != key_of("a", "bc")
    with sqlite3.connect(tmp_path / FILE) as database:
        assert database.execute("SELECT count(*) FROM one_2").fetchone() == (2,)
    (tmp_path / FILE).write_bytes(b"not a database at all" * 100)
    with pytest.raises(DataError, match=FILE):
        kept(tmp_path, "one_1", 2, keys, make(1.0))


def test_likelihoods_are_of_a_sample_of_answers_that_came_to_their_end():
    given = [exchange(r) for r in rows(ORDINARY, 20, 1)]
    odd = [
        exchange(given_row, finish_reason=reason, error=error)
        for given_row, reason, error in zip(
            rows(ORDINARY, 2, 2, "odd"), ("length", "stop"), (None, "broke"), strict=True
        )
    ]
    seen: list[str] = []

    def score(some):
        seen.extend(e.id for e in some)
        return [Likelihood(tokens=4, utf8_bytes=1, nats=6.0, bins=()), *[None] * (len(some) - 1)]

    assert likelihoods([*odd, *given], score, limit=5) == {seen[0]: -1.5}
    assert len(seen) == 5
    first = list(seen)
    likelihoods([*given[::-1], *odd], score, limit=5)
    assert seen == first * 2, "the same sample in any order"
    assert not any(name.startswith("odd") for name in seen)
    assert likelihoods(odd, score, limit=5) == {}
