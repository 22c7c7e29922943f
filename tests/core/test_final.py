"""A candidate measured alone: loaded as serving does, on examples it was not chosen by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.config import EvaluateSection, ModelSection
from regraft.errors import ModelError
from regraft.evals.generation import generate
from regraft.methods import parse_method
from regraft.methods.base import trainable_parameters
from regraft.models import load_tokenizer, prompt_ids, resolve
from regraft.records import Example, Message
from regraft.training.candidate import BaseCache
from regraft.training.final import Entry, Measured, measure

SETTINGS = EvaluateSection(max_new_tokens=8, latency_prompts=1)


def example(number: int, prompt: str, answer: str) -> Example:
    turns = (Message(role="user", content=prompt), Message(role="assistant", content=answer))
    return Example(id=f"e{number}", messages=turns)


EXAMPLES = [example(i, f"When is bill {i} due?", f"On day {i}.") for i in range(3)]
TRAIN = [example(9, "hello", "hi")]


def measured(
    tiny_model: Path, method: dict[str, Any], folder: Path | None, bases: BaseCache, **more: Any
) -> Measured:
    entry = Entry(
        label="it", method=parse_method(method).model_dump(mode="json"), base_model=str(tiny_model),
        base_revision=more.pop("revision", resolve(str(tiny_model)).revision),
    )  # fmt: skip
    held = ModelSection(source=str(tiny_model), dtype="float32", device="cpu")
    return measure(entry, EXAMPLES, TRAIN, SETTINGS, held, dataset_id="d", folder=folder, bases=bases, **more)


@pytest.mark.parametrize(
    "method", [{"name": "lora", "rank": 2}, {"name": "full"}, {"name": "prefix_tuning"}], ids=str
)
def test_what_is_measured_is_what_was_saved_and_the_base_stays_clean(
    method: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer, bases = load_tokenizer(tiny_model), BaseCache()
    own = parse_method(method)
    torch.manual_seed(1)
    model = own.apply(own.load_base(tiny_model, "float32", "cpu"))
    with torch.no_grad():
        for weights in trainable_parameters(model):
            weights.add_(torch.randn_like(weights) * 0.1)
    own.save(model, tmp_path)
    before = measured(tiny_model, {"name": "zero_shot"}, None, bases)
    found = measured(tiny_model, method, tmp_path, bases, where="in a test")
    loaded = own.load(tiny_model, tmp_path, "float32", "cpu").eval()
    prompts = [prompt_ids(tokenizer, e.prompt) for e in EXAMPLES]
    wanted = generate(loaded, tokenizer, prompts, max_new_tokens=8, batch_size=4)
    assert [e.output for e in found.report.examples] == wanted
    assert wanted != [e.output for e in before.report.examples]
    assert found.report.split == "final"
    assert not found.report.failure_count
    assert found.report.whole["forgetting"] == pytest.approx(
        found.report.whole["general_nats"] - before.report.whole["general_nats"], abs=1e-5
    )
    assert found.speed is not None
    assert found.speed.how.endswith("; in a test")
    assert found.speed.token_p50_ms is not None
    again = measured(tiny_model, {"name": "zero_shot"}, None, bases)
    assert again.report == before.report


def test_known_answers_are_not_asked_again(tiny_model: Path) -> None:
    bases = BaseCache()
    first = measured(tiny_model, {"name": "zero_shot"}, None, bases)
    marked = [
        e.model_copy(update={"output": "known", "scores": {"rougeL": 0.25}})
        for e in first.report.examples[:2]
    ]
    again = measured(tiny_model, {"name": "zero_shot"}, None, bases, known=marked)
    assert [e.output for e in again.report.examples] == ["known", "known", first.report.examples[2].output]
    assert again.report.whole["forgetting"] == 0


def test_another_base_than_it_was_trained_on_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"was trained on .* at other, but here it is at local-"):
        measured(tiny_model, {"name": "zero_shot"}, None, BaseCache(), revision="other")
