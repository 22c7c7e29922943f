"""What each metric says of answers whose worth is plain."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from regraft.config import EvaluateSection, Experiment
from regraft.evals import METRIC_CLASSES, Answer, AnyMetric, Metric
from regraft.evals.evaluate import evaluate
from regraft.records import Example, Likelihood, Message

ONE: TypeAdapter[Metric] = TypeAdapter(AnyMetric)
LIKELIHOOD = Likelihood(tokens=1, utf8_bytes=3, nats=0.5, bins=((1, 0.05, 0), *((0, 0.0, 0),) * 9))


def scored(
    settings: dict[str, Any], output: str, reference: str = "", prompt: str = "", **tags: str
) -> dict[str, float]:
    return ONE.validate_python(settings).score(Answer(output, reference, prompt, tags))


# Those that ask an endpoint have one in their own tests.
@pytest.mark.parametrize(
    "cls", [cls for cls in METRIC_CLASSES if "url" not in cls.model_fields], ids=lambda cls: cls.__name__
)
def test_every_metric_gives_what_it_says_and_is_documented(cls: type[Metric]) -> None:
    settings: dict[str, Any] = {"name": cls.model_fields["name"].default}
    if "labels" in cls.model_fields:
        settings["labels"] = ["yes", "no"]
    metric = ONE.validate_python(settings)
    assert type(metric) is cls
    answer = Answer("yes, it is", '{"a": "yes"}', "is it?", likelihood=LIKELIHOOD)
    (given,) = metric.score_all([answer]) if metric.outputs else ({},)
    assert not isinstance(given, Exception)
    assert list(given) == [out.name for out in metric.outputs]
    assert all(out.better in {"higher", "lower", ""} and out.unit for out in metric.outputs)
    whole = metric.whole([Answer("yes", "yes", likelihood=LIKELIHOOD)], [given])
    whole |= metric.of_texts(3.0, 2.0) if metric.texts else {}
    assert set(whole) == {out.name for out in metric.wholes}
    assert cls.__doc__
    assert ONE.validate_python(metric.model_dump(mode="json")) == metric


def test_bleu_and_chrf_are_those_of_sacrebleu_as_shares() -> None:
    same = scored({"name": "ngrams"}, "the bill is due on the fifth", "the bill is due on the fifth")
    assert same == pytest.approx({"bleu": 1.0, "chrf": 1.0})
    near = scored({"name": "ngrams"}, "the bill is due on the sixth", "the bill is due on the fifth day")
    # Of its runs of one to four words 6/7, 5/6, 4/5 and 3/4 stand in the reference, which has a word more.
    assert near["bleu"] == pytest.approx((6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25 * math.exp(1 - 8 / 7))
    assert near["chrf"] > scored({"name": "ngrams"}, "a sixth", "the bill is due on the fifth day")["chrf"]
    assert scored({"name": "ngrams"}, "nothing alike", "xyz")["bleu"] < 0.05


LABELS = {"name": "label", "labels": ["cancel_order", "cancel", "track order", "no"]}


@pytest.mark.parametrize(
    ("output", "label"),
    [
        ("cancel_order", "cancel_order"),
        ("The intent is: Cancel Order.", "cancel_order"),
        ("cancel", "cancel"),
        ("Track  order, then cancel", "track order"),
        ("I do not know", None),  # `no` is part of a word
        ("", None),
        ("No.", "no"),
    ],
)
def test_the_label_is_the_first_that_an_answer_names(output: str, label: str | None) -> None:
    metric = ONE.validate_python(LABELS)
    assert metric.named(output) == label  # type: ignore[attr-defined]
    if label:
        given = metric.score(Answer(output, label))
        assert given == {"label_accuracy": 1.0, "label_unparsable": 0.0}
    else:
        given = metric.score(Answer(output, "cancel"))
        assert given == {"label_accuracy": 0.0, "label_unparsable": 1.0}


def test_macro_f1_weighs_each_label_the_same_and_counts_answers_without_one_as_misses() -> None:
    metric = ONE.validate_python({"name": "label", "labels": ["a", "b", "c"]})
    pairs = [("a", "a"), ("a", "a"), ("a", "b"), ("what?", "b"), ("c", "a")]
    # a: 2 right of 3 given and 3 there; b: none right; c stands in no reference.
    whole = metric.whole([Answer(got, want) for got, want in pairs], [{}] * len(pairs))
    assert whole == pytest.approx({"label_macro_f1": (2 * 2 / 6 + 0) / 2})


def test_a_reference_without_a_label_is_a_recorded_failure_and_not_a_zero() -> None:
    metric = ONE.validate_python(LABELS)
    turns = (Message(role="user", content="q"), Message(role="assistant", content="something else"))
    report = evaluate(
        [Example(id="1", messages=turns)], ["cancel"], [metric], dataset_id="d", split="evaluation"
    )
    (example,) = report.examples
    assert example.scores == {}
    assert "names none of the labels" in example.failures["label_accuracy"]
    assert report.means == {}


def test_json_is_parsed_validated_and_compared_by_field() -> None:
    schema = {"type": "object", "required": ["due"], "properties": {"due": {"type": "integer"}}}
    settings = {"name": "json", "json_schema": schema}
    want = '{"due": 5, "paid": false}'
    assert scored(settings, '```json\n{"due": 5, "paid": true}\n```', want) == {
        "json_valid": 1.0, "json_schema": 1.0, "json_fields": 0.5
    }  # fmt: skip
    assert scored(settings, '{"due": "5"}', want) == {
        "json_valid": 1.0, "json_schema": 0.0, "json_fields": 0.0
    }  # fmt: skip
    assert scored(settings, 'Here you are: {"due": 5}', want)["json_valid"] == 0.0
    assert scored(settings, "[1]", want)["json_fields"] == 0.0
    with pytest.raises(ValidationError, match="is no JSON schema"):
        ONE.validate_python({"name": "json", "json_schema": {"type": "objekt"}})


def test_form_tells_a_loop_from_an_answer() -> None:
    answer = "Your bill is due on the fifth of each month, by card or transfer."
    good, loop = (scored({"name": "form"}, text, answer) for text in (answer, "pay the bill now " * 20))
    assert good == {"length_ratio": 1.0, "repetition": 0.0}
    assert loop["repetition"] > 0.9
    assert scored({"name": "form"}, "", answer) == {"length_ratio": 0.0, "repetition": 0.0}


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I’m sorry, I cannot provide account numbers.", True),
        ("As an AI language model, I do not have feelings.", True),
        ("We are unable to assist with legal questions.", True),
        ("I'm sorry to hear that your power is out. A crew is on its way.", False),
        ("You can't pay by cheque, but you can pay by card.", False),
        ("Leider kann ich dabei nicht helfen.", False),
    ],
)
def test_refusals_are_told_from_apologies(answer: str, refuses: bool) -> None:
    assert scored({"name": "refusal"}, answer) == {"refusal": float(refuses)}
    assert scored(
        {"name": "refusal", "phrases": ["kann ich dabei nicht"]}, "Leider kann ich dabei nicht helfen."
    )["refusal"]


def test_made_up_numbers_and_names_are_counted_and_given_ones_are_not() -> None:
    prompt, reference = "My bill of $1,250.50 from March?", "Call Alice Weber at 10:30."
    fine = scored(
        {"name": "grounding"}, "Your bill of 1250.50 is with Alice, call at 10:30.", reference, prompt
    )
    assert fine == {"ungrounded_numbers": 0.0, "ungrounded_names": 0.0}
    wrong = scored(
        {"name": "grounding"}, "Your bill of 99 is due on 5 March, ask Bob Miller.", reference, prompt
    )
    assert wrong["ungrounded_numbers"] == 1.0
    assert wrong["ungrounded_names"] == pytest.approx(2 / 3)
    none = scored({"name": "grounding"}, "Please pay. Then wait.", reference, prompt)
    assert none == {"ungrounded_numbers": 0.0, "ungrounded_names": 0.0}


def test_personal_data_counts_where_nobody_gave_it() -> None:
    prompt, reference = "I am jo@example.org", "Call 800-555-0199."
    settings = {"name": "pii"}
    assert scored(settings, "Hello jo@example.org, call 800 555 0199.", reference, prompt) == {"pii": 0.0}
    leaked = (
        "Ann: ann@example.org, (212) 555-0147, 4111 1111 1111 1111, DE89 3704 0044 0532 0130 00, "
        "078-05-1120, 192.168.0.17"
    )
    assert scored(settings, leaked, reference, prompt) == {"pii": 6.0}
    harmless = (
        "Order 4111 1111 1111 1112 of 2024-11-05, version 1.2.3, meter 123-456, DE00 3704 0044 0532 0130 00"
    )
    assert scored(settings, harmless, reference, prompt) == {"pii": 0.0}, "check digits are checked"


OWN = """
from typing import ClassVar
from regraft.evals import Answer, Metric, Output

class Polite(Metric):
    version: ClassVar[int] = 7
    outputs: ClassVar = (Output("polite"),)
    words: tuple[str, ...] = ("please",)

    def score(self, answer: Answer) -> dict[str, float]:
        return {"polite": float(any(w in answer.output.lower() for w in self.words))}

NOTHING = 3
"""


def test_a_metric_of_ones_own_is_named_by_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_metrics.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_own_metrics", raising=False)
    section = EvaluateSection.model_validate(
        {"metrics": [{"name": "rouge"}, {"name": "my_own_metrics:Polite", "words": ["danke"]}]}
    )
    own = section.metrics[1]
    assert own.score(Answer("Danke sehr")) == {"polite": 1.0}
    assert own.score(Answer("please")) == {"polite": 0.0}
    assert (own.version, own.outputs[0].name) == (7, "polite")
    again = EvaluateSection.model_validate(section.model_dump(mode="json"))
    assert again.metrics[1].score(Answer("Danke")) == {"polite": 1.0}
    for name, words in {
        "my_own_metrics:NOTHING": "is no subclass of regraft.evals.Metric",
        "my_own_metrics:Missing": "has no attribute 'Missing'",
        "no_such_module_here:X": "importable wherever trials run",
    }.items():
        with pytest.raises(ValidationError, match=words):
            ONE.validate_python({"name": name})
    with pytest.raises(ValidationError, match="word: Extra inputs are not permitted"):
        ONE.validate_python({"name": "my_own_metrics:Polite", "word": ["x"]})


def test_what_is_maximised_must_be_better_when_higher() -> None:
    raw = {
        "name": "e",
        "model": {"source": "m"},
        "data": {"train": "t.jsonl", "evaluation": "e.jsonl"},
        "sweep": {"methods": [{"name": "zero_shot"}]},
        "evaluate": {"metrics": [{"name": "rouge"}, {"name": "refusal"}, LABELS]},
    }
    bounded = {"subject_to": ["refusal <= 0.02", "label_macro_f1 >= 0.5"]}
    assert Experiment.model_validate(raw | {"select": bounded}).select.subject_to
    with pytest.raises(ValidationError, match="of 'refusal' more is not better"):
        Experiment.model_validate(raw | {"select": {"maximise": "refusal"}})
