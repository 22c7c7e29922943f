"""Embeddings say how near texts are in meaning, and the metric holds answers against references by them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from regraft import embeddings
from regraft.embeddings import embedder
from regraft.errors import ModelError
from regraft.evals import Answer
from regraft.evals.similarity import Similarity

pytestmark = pytest.mark.usefixtures("one_thread")

BILL = "Your bill is due on the fifth of each month."


def similarity(output: str, reference: str) -> float:
    return Similarity().score(Answer(output, reference))["similarity"]


def test_vectors_are_those_of_sentence_transformers() -> None:
    # The figures of its documentation (sbert.net, "Quickstart") for this model.
    found = embedder().encode(
        ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]
    )
    assert found.shape == (3, 384)
    assert found.dtype == np.float32
    assert (found @ found.T)[np.triu_indices(3, 1)] == pytest.approx([0.6660, 0.1046, 0.1411], abs=1e-4)


def test_neither_order_nor_company_nor_padding_changes_a_vector() -> None:
    texts = [f"{BILL} " * (n % 4) + f"This is number {n}." for n in range(40)]
    texts += ["", "word " * 300]
    assert sum(map(len, texts)) > 4 * embeddings.BATCH_TOKENS
    together = embedder().encode(texts)
    assert np.linalg.norm(together, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)
    assert embedder().encode(texts[::-1])[::-1] == pytest.approx(together, abs=1e-5)
    for at in (0, 3, 33, len(texts) - 2, len(texts) - 1):
        assert embedder().encode([texts[at]])[0] == pytest.approx(together[at], abs=1e-5)
    assert embedder().encode([]).shape == (0, 384)


def test_bfloat16_gives_nearly_the_same_vectors_and_is_a_model_of_its_own() -> None:
    texts = [BILL, "You have to pay by the 5th every month.", "The weather is lovely.", "", "word " * 300]
    exact, quick = (embedder(precision=precision).encode(texts) for precision in ("float32", "bfloat16"))
    assert quick.dtype == np.float32
    assert np.linalg.norm(quick, axis=1) == pytest.approx(np.ones(len(texts)), abs=1e-5)
    assert (quick * exact).sum(axis=1).min() > 0.999
    assert np.abs(quick - exact).max() > 1e-5
    assert embedder(precision="bfloat16") is not embedder()
    assert embedder().encode(texts) == pytest.approx(exact, abs=1e-6)


def test_beyond_its_most_tokens_a_text_is_not_read() -> None:
    long = "bill " * (embedder().max_tokens - 2)  # two more are put around it
    assert embedder().max_tokens == 256
    same, other = embedder().encode([long + "meter", "meter " + long])
    whole = embedder().encode([long])[0]
    assert same == pytest.approx(whole, abs=1e-6)
    assert np.abs(other - whole).max() > 1e-3


def test_a_paraphrase_is_nearer_than_another_subject_and_the_same_text_is_one() -> None:
    assert similarity(BILL, BILL) == pytest.approx(1.0, abs=1e-6)
    assert similarity("You have to pay by the 5th every month.", BILL) > 0.7
    assert similarity("The cat sleeps on the sofa.", BILL) < 0.2


def test_an_empty_answer_scores_nothing_and_an_empty_reference_fails() -> None:
    answers = [Answer("", BILL), Answer(BILL, " "), Answer(BILL, BILL), Answer(" \n", BILL), Answer("", "")]
    empty, failed, same, blank, neither = Similarity().score_all(answers)
    assert empty == blank == {"similarity": 0.0}
    assert same == {"similarity": pytest.approx(1.0, abs=1e-6)}
    for found in (failed, neither):
        assert isinstance(found, ValueError)
        assert "the reference is empty" in str(found)
    with pytest.raises(ValueError, match="the reference is empty"):
        similarity(BILL, "")


@pytest.mark.parametrize(
    ("model", "words"),
    [("bundled:no-such", "there is bundled:all-minilm-l6-v2"), ("models/mine", "absolute path of a folder")],
)
def test_a_model_that_trials_could_not_find_is_refused_when_it_is_read(model: str, words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Similarity(model=model)


def test_a_model_that_is_not_there_fails_every_answer_with_the_mend(tmp_path: Path) -> None:
    found = Similarity(model=str(tmp_path)).score_all([Answer("a", "b"), Answer("c", "d")])
    assert [type(each) for each in found] == [ModelError, ModelError]
    assert "no folder with config.json and *.safetensors" in str(found[0])
    assert "bundled:all-minilm-l6-v2" in str(found[0])


def test_a_folder_of_ones_own_embeds_and_is_loaded_once(tiny_model: Path) -> None:
    own = embedder(str(tiny_model))
    assert own is embedder(str(tiny_model))
    vectors = own.encode(["The meter", "", "a reading that is longer than the meter"])
    assert vectors.shape == (3, 64)
    # Its tokenizer puts nothing around a text, so that an empty one has no tokens at all.
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 0, 1], abs=1e-5)


def test_a_model_that_pools_otherwise_is_refused_and_not_pooled_by_the_mean(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cls"
    shutil.copytree(tiny_model, folder)
    types = ("models.Transformer", "models.Pooling", "models.Normalize")
    modules = [{"idx": i, "path": p, "type": f"sentence_transformers.{t}"} for i, (p, t) in enumerate(
        zip(("", "1_Pooling", "2_Normalize"), types, strict=True)
    )]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    pooling = folder / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    with pytest.raises(ModelError, match=r"its pooling \['cls_token'\]"):
        embedder(str(folder))
    pooling.write_text(json.dumps({"pooling_mode": "mean"}))
    assert embedder(str(folder)).dimensions == 64
    modules.append({"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"})
    (folder / "modules.json").write_text(json.dumps(modules))
    shutil.copytree(folder, tmp_path / "dense")
    with pytest.raises(ModelError, match="Dense"):
        embedder(str(tmp_path / "dense"))


def test_weights_that_are_missing_are_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_model, tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if "layers.1." not in k}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"has no weights \['layers\.1\."):
        embedder(str(tmp_path / "part"))


def test_loading_leaves_the_random_numbers_of_training_alone(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    shutil.copytree(tiny_model, tmp_path / "copy")
    before = torch.get_rng_state()
    embedder(str(tmp_path / "copy")).encode(["text"])
    assert torch.equal(torch.get_rng_state(), before)
