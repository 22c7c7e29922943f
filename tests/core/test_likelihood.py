"""Likelihoods of references and of general text, held against full logits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from regraft.config import EvaluateSection
from regraft.evals import Answer
from regraft.evals.calibration import Calibration
from regraft.evals.forgetting import Forgetting, passages
from regraft.evals.perplexity import Perplexity
from regraft.methods import parse_method
from regraft.models import load_tokenizer
from regraft.records import Example, Likelihood, Message
from regraft.training.batches import IGNORED
from regraft.training.candidate import nats_of_texts, score
from regraft.training.encoding import encode
from regraft.training.likelihood import reference_likelihoods, text_nats


def example(number: int, *turns: str) -> Example:
    roles = ["user", "assistant"] * len(turns)
    messages = tuple(Message(role=role, content=text) for role, text in zip(roles, turns, strict=False))
    return Example(id=f"e{number}", messages=messages)


EXAMPLES = [
    example(0, "When is my bill due?", "On the first of the month."),
    example(1, "hi", "hello", "and the meter, please, which of the two do I read?", "Ärger → 😀"),
    example(2, "x", "y"),
]
METHODS = [
    {"name": "zero_shot"},
    {"name": "lora", "rank": 4},
    {"name": "prompt_tuning", "virtual_tokens": 5},
    {"name": "prefix_tuning", "virtual_tokens": 5},
]


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: str(s["name"]))
def test_likelihoods_are_those_of_the_full_logits(settings: dict[str, object], tiny_model: Path) -> None:
    method = parse_method(settings)
    tokenizer = load_tokenizer(tiny_model)
    torch.manual_seed(0)
    model = method.apply(method.load_base(tiny_model, "float32", "cpu")).eval()
    found = reference_likelihoods(model, tokenizer, EXAMPLES, "cpu")
    for known, one in zip(found, EXAMPLES, strict=True):
        row = encode(tokenizer, one, 1 << 20)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row.ids])).logits[0]
        logits = logits[-len(row.ids) :]  # what stands for virtual tokens goes before
        last = len(row.ids) - len(tokenizer(one.reference)["input_ids"]) - 1
        logs = logits[last - 1 : -1].log_softmax(-1)
        targets = torch.tensor(row.ids[last:])
        assert known is not None
        assert known.tokens == len(targets)
        assert known.utf8_bytes == len(one.reference.encode())
        assert known.nats == pytest.approx(float(-logs.gather(1, targets[:, None]).sum()), rel=1e-4)
        assert sum(n for n, _, _ in known.bins) == known.tokens
        assert sum(h for *_, h in known.bins) == int((logs.argmax(-1) == targets).sum())
        assert sum(s for _, s, _ in known.bins) == pytest.approx(float(logs.max(-1)[0].exp().sum()), rel=1e-4)


def test_only_the_last_turn_counts(tiny_model: Path) -> None:
    row = encode(load_tokenizer(tiny_model), EXAMPLES[1], 1 << 20)
    all_turns = sum(label != IGNORED for label in row.labels)
    base = parse_method({"name": "zero_shot"}).load_base(tiny_model, "float32", "cpu")
    (found,) = reference_likelihoods(base, load_tokenizer(tiny_model), EXAMPLES[1:2], "cpu")
    assert found is not None
    assert 0 < found.tokens < all_turns


def likelihood(nats: float, tokens: int, utf8_bytes: int, *bins: tuple[int, float, int]) -> Likelihood:
    whole = bins + ((0, 0.0, 0),) * (10 - len(bins))
    return Likelihood(tokens=tokens, utf8_bytes=utf8_bytes, nats=nats, bins=whole)


def test_perplexity_weighs_tokens_and_bits_are_by_byte() -> None:
    answers = [
        Answer("", likelihood=likelihood(2 * math.log(2), 2, 4)),
        Answer("", likelihood=likelihood(8 * math.log(8), 8, 8)),
    ]
    assert Perplexity().score(answers[0]) == pytest.approx(
        {"reference_nats": math.log(2), "bits_per_byte": 0.5}
    )
    whole = Perplexity().whole(answers, [{}, {}])
    assert whole["perplexity"] == pytest.approx(math.exp((2 * math.log(2) + 8 * math.log(8)) / 10))
    with pytest.raises(ValueError, match="says no probabilities"):
        Perplexity().score(Answer("x"))


def test_calibration_error_is_the_gap_between_being_sure_and_being_right() -> None:
    sure_and_wrong = likelihood(1.0, 4, 4, (0, 0.0, 0), (4, 0.8, 0))
    right_as_often = likelihood(1.0, 4, 4, (4, 0.2, 1))
    whole = Calibration().whole(
        [Answer("", likelihood=k) for k in (sure_and_wrong, right_as_often)], [{}, {}]
    )
    assert whole == pytest.approx({"calibration_error": (0.8 + 0.8) / 8})
    assert Calibration().score(Answer("", likelihood=right_as_often)) == {"token_accuracy": 0.25}


def test_forgetting_is_nothing_for_the_base_and_a_change_shows(tiny_model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The meter reading is due on the first of the month.\n\nWir helfen gern.\n")
    settings = EvaluateSection(metrics=(Forgetting(text=text), Perplexity()), max_new_tokens=2)
    tokenizer = load_tokenizer(tiny_model)
    method = parse_method({"name": "lora", "rank": 4})
    base = method.load_base(tiny_model, "float32", "cpu")
    before = nats_of_texts(base, tokenizer, settings)
    assert before["forgetting"] == pytest.approx(text_nats(base, tokenizer, passages(text), "cpu"))
    torch.manual_seed(0)
    model = method.apply(base).eval()  # LoRA begins as the base

    def figures() -> dict[str, float]:
        report = score(model, tokenizer, EXAMPLES[:1], settings, dataset_id="d", split="s", base_nats=before)
        assert not report.whole_failures
        return report.whole

    assert figures()["forgetting"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    damaged = figures()
    assert abs(damaged["forgetting"]) > 0.1  # of a random model, damage may go either way
    assert damaged["general_nats"] == pytest.approx(before["forgetting"] + damaged["forgetting"])
    unasked = score(model, tokenizer, EXAMPLES[:1], settings, dataset_id="d", split="s")
    assert "not a model that was loaded" in unasked.whole_failures["forgetting"]


def test_the_passages_of_the_package_are_many_and_a_file_without_text_is_refused(tmp_path: Path) -> None:
    assert len(passages()) >= 30
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no text"):
        passages(tmp_path / "empty.txt")
