from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from monitoring import vectors as module
from monitoring.vectors import vectors
from regraft.errors import DataError


class Counting:
    """An embedder that says what it was asked for."""

    dimensions = 4

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, texts: list[str]) -> np.ndarray:
        self.asked += texts
        return np.array([[len(t), *t.encode()[:3].ljust(3)] for t in texts], np.float32).reshape(-1, 4)


@pytest.fixture
def counting(monkeypatch) -> Counting:
    made = Counting()
    monkeypatch.setattr(module, "embedder", lambda model, precision: made)
    monkeypatch.setattr(module, "_kept", {})
    monkeypatch.setattr(module, "_read", set())
    return made


def test_each_text_is_embedded_once(counting):
    first = vectors(["b", "a", "b", ""], "m")
    assert first[0].tolist() == first[2].tolist() == [1, ord("b"), 32, 32]
    assert counting.asked == ["b", "a", ""]
    assert vectors(["", "c"], "m")[0].tolist() == first[3].tolist()
    assert counting.asked == ["b", "a", "", "c"]
    vectors(["b"], "another model")
    assert counting.asked[-1] == "b"
    assert vectors([], "m").shape == (0, 4)


def test_a_folder_keeps_vectors_between_processes(counting, tmp_path, tiny_model):
    code = "import sys; from pathlib import Path; from monitoring.vectors import vectors; "
    code += "print(vectors(sys.argv[3:], sys.argv[1], Path(sys.argv[2])).tolist())"
    command = [sys.executable, "-c", code, str(tiny_model), str(tmp_path / "kept"), "one text", "another"]
    said = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(module.__file__).parents[1]
    )
    assert [f.suffix for f in (tmp_path / "kept").iterdir()] == [".npz"]
    found = vectors(["another", "one text"], str(tiny_model), tmp_path / "kept")
    assert str(found[::-1].tolist()) == said.stdout.strip()
    assert counting.asked == []


def test_vectors_of_the_folder_are_not_made_again(counting, monkeypatch, tmp_path):
    made = vectors(["a", "b"], "m", tmp_path)
    monkeypatch.setattr(module, "_kept", {})
    monkeypatch.setattr(module, "_read", set())
    counting.asked.clear()
    np.testing.assert_array_equal(vectors(["b", "a"], "m", tmp_path), made[::-1])
    assert counting.asked == []


def test_vectors_of_another_precision_are_made_anew(counting, monkeypatch, tmp_path):
    for number, precision in enumerate(("float32", "bfloat16", "float32", "bfloat16")):
        monkeypatch.setattr(module, "quickest", lambda precision=precision: precision)
        monkeypatch.setattr(module, "_kept", {})
        monkeypatch.setattr(module, "_read", set())
        vectors(["a"], "m", tmp_path)
        assert counting.asked == ["a"] * min(number + 1, 2)


def test_a_broken_file_is_named(counting, tmp_path):
    (tmp_path / "x.npz").write_bytes(b"PK not a file of vectors")
    with pytest.raises(DataError, match=r"x\.npz: not a file of vectors"):
        vectors(["a"], "m", tmp_path)


def test_what_is_kept_is_bounded(counting, monkeypatch):
    monkeypatch.setattr(module, "KEPT", 3)
    vectors(list("abcde"), "m")
    vectors(list("cde"), "m")
    assert counting.asked == list("abcde")
    vectors(["a"], "m")
    assert counting.asked == [*"abcde", "a"]
