from __future__ import annotations

import numpy as np

from monitoring.descriptors import DESCRIPTORS, describe, describe_sides, in_words


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
