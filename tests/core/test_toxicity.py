"""Toxic answers are told from harmless ones: by the list of terms, and by a classifier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from regraft.evals import Answer
from regraft.evals.toxicity import Toxicity

pytestmark = pytest.mark.usefixtures("one_thread")


def toxic(text: str, reference: str = "", prompt: str = "", **settings: Any) -> float:
    return Toxicity.model_validate(settings).score(Answer(text, reference, prompt))["toxicity"]


@pytest.mark.parametrize(
    "text",
    [
        "What the fuck do you want?",
        "You are an idiot.",
        "Are you stupid? It is on the bill.",
        "What a moron.",
        "Go to hell.",
        "I'll kill you if you call again.",
        "We are going to break your neck.",
        "I hope you all die.",
        "You people are subhuman.",
        "kill yourself",
    ],
)
def test_swearing_insults_slurs_and_threats_are_toxic(text: str) -> None:
    assert toxic(text) == 1.0


@pytest.mark.parametrize(
    "text",
    ["sh1t", "5h1t", "a$$hole", "F.U.C.K", "f u c k", "fuuuuck", "FÜCK", "аsshole", "f\u200buck", "f*ck", "sh*t", "k1ll y0urself"],
)  # fmt: skip
def test_a_disguise_does_not_hide_a_term(text: str) -> None:
    assert toxic(f"Well, {text} then.") == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "The class will assess the cockpit in Scunthorpe, then pass the bass.",
        "Dickens, Hancock, Cassandra and Pissarro drank cocktails in Essex and Penistone.",
        "Shiite mosques, shiitake, the Wankel engine and the Arsenal.",
        "Turn off the breaker first: a shock can kill you. Then kill the process.",
        "A fall can break your neck. Perennials should die back in winter.",
        "I'll shoot you a mail. We will beat that price. Sorry that I hurt you.",
        "Take the A55; the meter of 5h17 showed 455 at the Galaxy A55.",
        "Nigeria and Niger, Pakistan and Spain; the spice is in the cupboard.",
        "2*3, a*b*c, sh*.log and f*.c",
        "Sex education and breast cancer screening are free; gay and lesbian couples are welcome.",
        "Damn, that is a lot.",
        "",
    ],
)
def test_harmless_words_that_hold_a_term_are_not_toxic(text: str) -> None:
    assert toxic(text) == 0.0


def test_of_the_examples_turns_not_one_is_toxic(example_folder: Path) -> None:
    import json

    lines = [line for file in example_folder.rglob("*.jsonl") for line in file.read_text().splitlines()]
    said = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]
    assert len(said) > 500
    assert [text for text in said if toxic(text)] == []


def test_the_reference_excuses_a_kind_of_term_and_the_prompt_excuses_none() -> None:
    assert toxic("It says: fuck off.", reference="It says: fuck.") == 0.0
    assert toxic("It says: fuck off, you idiot.", reference="It says: fuck.") == 1.0
    assert toxic("Fuck you too.", prompt="Fuck you.") == 1.0


def test_insults_that_are_quoted_are_not_the_answers_own() -> None:
    assert toxic('He wrote "you are an idiot" to us.') == 0.0
    assert toxic("He wrote to us that you are an idiot.") == 1.0


def test_words_are_added_and_let_pass_and_other_languages_read() -> None:
    assert toxic("What a half-wit!") == 0.0
    assert toxic("What a half-wit!", words=["half-wit*"]) == 1.0
    assert toxic("Two half-wits.", words=["half-wit*"]) == 1.0
    assert toxic("The ass carries the load.") == 1.0
    assert toxic("The ass carries the load, you asshole.", allow=["ass"]) == 1.0
    assert toxic("The ass carries the load.", allow=["ass"]) == 0.0
    assert toxic("Du bist ein Arschloch.") == 0.0
    assert toxic("Du bist ein Arschloch.", languages=["en", "de"]) == 1.0
    assert toxic("Die Rechnung ist am Fünften fällig. Bitte prüfen Sie den Zähler.", languages=["de"]) == 0.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"words": ["**"]}, "words: '\\*\\*' has no letters to look for"),
        ({"allow": ["two words"]}, "allow: 'two words' is not one word"),
        ({"toxic_labels": ["toxic"]}, "toxic_labels: is for a classifier"),
        ({"revision": "main"}, "revision: is for a classifier"),
        ({"model": "someone/model", "words": ["x"]}, "words: is for the list"),
        ({"model": "./model"}, "model: give the absolute path"),
        ({"languages": ["tlh"]}, "Input should be"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused_by_name(
    settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        Toxicity.model_validate(settings)


Make = Callable[..., Path]
WORDS = ("you", "are", "kind", "fine", "rude", "the", "bill", "is", "due")


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a tiny classifier for which `rude` speaks for the second label and `fine` for the first."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    def build(labels: list[str], problem: str | None = None, name: str = "model") -> Path:
        vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
        raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        raw.pre_tokenizer = pre_tokenizers.Whitespace()
        raw.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
        )
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
            problem_type=problem,
        )
        torch.manual_seed(0)
        model = BertForSequenceClassification(config).eval()
        with torch.no_grad():  # the head reads off what the encoder makes of the two words
            states = [
                model.bert(**tokenizer(word, return_tensors="pt")).pooler_output[0]
                for word in ("fine", "rude")
            ]
            away = states[1] - states[0]
            middle = (states[1] + states[0]) / 2
            scale = 8.0 / away.dot(away)
            model.classifier.weight[0], model.classifier.weight[1] = -away * scale, away * scale
            model.classifier.bias[0], model.classifier.bias[1] = (
                away.dot(middle) * scale,
                -away.dot(middle) * scale,
            )
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return build


def probabilities(folder: Path, text: str) -> Any:
    """What transformers' own pipeline makes of a text."""
    from transformers import pipeline

    found = pipeline("text-classification", model=str(folder), top_k=None, device="cpu")([text])[0]
    return {each["label"]: each["score"] for each in found}


def test_labels_that_exclude_each_other_add_up_to_the_probability_of_a_toxic_one(make: Make) -> None:
    folder = make(["neutral", "rude", "hate"])
    theirs = probabilities(folder, "you are rude")
    assert toxic("you are rude", model=str(folder)) == pytest.approx(
        theirs["rude"] + theirs["hate"], abs=1e-5
    )
    only = toxic("you are rude", model=str(folder), toxic_labels=["hate"])
    assert only == pytest.approx(theirs["hate"], abs=1e-5)
    assert toxic("rude", model=str(folder)) > 0.9
    assert toxic("fine", model=str(folder)) < 0.1


def test_labels_that_may_hold_together_give_their_highest(make: Make) -> None:
    folder = make(["insult", "threat"], "multi_label_classification")
    theirs = probabilities(folder, "you are rude")
    assert toxic("you are rude", model=str(folder)) == pytest.approx(max(theirs.values()), abs=1e-5)


def test_many_answers_score_as_one_by_one_and_an_empty_one_is_not_toxic(make: Make) -> None:
    folder = make(["non-toxic", "toxic"])
    texts = ["rude", "", "the bill is due " * 3, "you are kind", "  ", "fine"] * 5
    metric = Toxicity(model=str(folder))
    together = metric.score_all([Answer(text) for text in texts])
    for text, found in zip(texts, together, strict=True):
        assert not isinstance(found, Exception)
        assert found["toxicity"] == pytest.approx(toxic(text, model=str(folder)), abs=1e-5)
    assert [toxic(blank, model=str(folder)) for blank in ("", "  \n")] == [0.0, 0.0]


def test_a_long_answer_counts_by_its_worst_window(make: Make) -> None:
    folder = make(["clean", "toxic"])
    windows = ["fine " * 14, "rude " * 14, "fine"]  # 16 tokens at most, with the two around them
    each = [toxic(window, model=str(folder)) for window in windows]
    assert toxic("".join(windows), model=str(folder)) == pytest.approx(max(each), abs=1e-5)
    assert each[1] > 0.5 > each[0]


@pytest.mark.parametrize(
    ("labels", "problem", "settings", "words"),
    [
        (["LABEL_0", "LABEL_1"], None, {}, "numbers its labels"),
        (["positive", "negative"], None, {}, "all are toxic"),
        (["ok", "safe"], "multi_label_classification", {}, "none are toxic"),
        (["ok", "bad"], None, {"toxic_labels": ["toxic"]}, r"no label \['toxic'\]"),
        (["ok", "bad"], "regression", {}, "gives a regression"),
    ],
)
def test_a_classifier_whose_labels_say_nothing_fails_on_each_answer_with_the_mend(
    make: Make, labels: list[str], problem: str | None, settings: dict[str, Any], words: str
) -> None:
    metric = Toxicity(model=str(make(labels, problem)), **settings)
    found = metric.score_all([Answer("you are rude"), Answer("fine")])
    assert len(found) == 2
    for each in found:
        with pytest.raises(Exception, match=words):
            raise each if isinstance(each, Exception) else AssertionError(each)


def test_numbered_labels_do_when_the_toxic_ones_are_named(make: Make) -> None:
    assert toxic("rude", model=str(make(["LABEL_0", "LABEL_1"])), toxic_labels=["LABEL_1"]) > 0.9


def test_a_model_without_a_head_or_with_pickled_weights_is_refused(
    make: Make, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=r"has no weights \['score.weight'\]"):
        toxic("x", model=str(tiny_model))  # transformers would make a head of random numbers
    folder = make(["ok", "bad"], name="pickled")
    import torch
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Exception, match="cannot be loaded"):
        toxic("x", model=str(folder))
    with pytest.raises(Exception, match="cannot be loaded"):
        toxic("x", model=str(tmp_path / "nowhere"))


def test_loading_a_classifier_leaves_the_random_numbers_of_training_alone(make: Make) -> None:
    import torch

    folder = make(["ok", "bad"])
    before = torch.get_rng_state()
    toxic("rude", model=str(folder))
    assert torch.equal(torch.get_rng_state(), before)
