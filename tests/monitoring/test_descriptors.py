from __future__ import annotations

import numpy as np
import pytest

from monitoring.descriptors import DESCRIPTORS, MORE, describe, describe_more, describe_sides, in_words
from monitoring.languages import languages


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
