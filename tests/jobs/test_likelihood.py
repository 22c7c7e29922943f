from __future__ import annotations

import math
from pathlib import Path

import pytest

from jobs import likelihood
from jobs.likelihood import answer_logprobs
from regraft.config import Experiment
from regraft.errors import DataError
from regraft.methods import parse_method
from regraft.models import load_tokenizer, resolve
from regraft.records import CapturedExchange, Message, ModelVersion

LORA = {"name": "lora", "rank": 2}


def exchange(number: int, output: str, **changes: object) -> CapturedExchange:
    return CapturedExchange.model_validate(
        {
            "id": f"e{number}",
            "created": "2026-01-01T00:00:00.000000+00:00",
            "model": "shop",
            "model_version": 1,
            "messages": (Message(role="user", content=f"question {number}"),),
            "output": output,
            "finish_reason": "stop",
            "prompt_tokens": 1,
            "completion_tokens": 1,
            "latency_ms": 1.0,
            **changes,
        }
    )


@pytest.fixture
def version(tiny_model: Path, tmp_path: Path) -> tuple[ModelVersion, Path]:
    import torch

    method = parse_method(LORA)
    model = method.apply(method.load_base(tiny_model, "float32", "cpu"))
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    method.save(model, tmp_path / "adapter")
    made = ModelVersion(
        name="shop",
        version=1,
        logged_model_id="m-1",
        run_id="run",
        method=LORA,
        base_model=str(tiny_model),
        base_revision=resolve(str(tiny_model)).revision,
        dataset_id="d",
    )
    return made, tmp_path / "adapter"


def test_answers_are_scored_by_the_version_once(version, experiment, tmp_path, monkeypatch, tiny_model):
    import torch

    made, folder = version
    given = [
        exchange(1, "Hello, how can I help you?"),
        exchange(2, "zq#"),
        exchange(3, "cut", finish_reason="length"),
    ]
    found = answer_logprobs(experiment, made, given, 10, folder=folder, cache=tmp_path / "kept")
    assert set(found) == {"e1", "e2"}
    tokenizer = load_tokenizer(tiny_model)
    model = parse_method(LORA).load(tiny_model, folder, "float32", "cpu")
    said = [{"role": "user", "content": "question 1"}, {"role": "assistant", "content": given[0].output}]
    start = tokenizer.apply_chat_template(said[:1], add_generation_prompt=True, return_dict=False)
    answer = tokenizer(f"{given[0].output}<|im_end|>", add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logs = model(torch.tensor([[*start, *answer]])).logits.log_softmax(-1)[0]
    told = [float(logs[len(start) - 1 + i, token]) for i, token in enumerate(answer)]
    assert found["e1"] == pytest.approx(sum(told) / len(told), abs=1e-4)
    assert all(math.isfinite(value) and value < 0 for value in found.values())

    scored: list[str] = []
    real = likelihood._score

    def counting(experiment, version, folder, exchanges):
        scored.extend(e.id for e in exchanges)
        return real(experiment, version, folder, exchanges)

    monkeypatch.setattr(likelihood, "_score", counting)
    more = [*given, exchange(4, "Rechnung")]
    again = answer_logprobs(experiment, made, more, 10, folder=folder, cache=tmp_path / "kept")
    assert scored == ["e4"]
    assert {name: again[name] for name in found} == found
    other = made.model_copy(update={"logged_model_id": "m-2"})
    answer_logprobs(experiment, other, given, 1, folder=folder, cache=tmp_path / "kept")
    assert len(scored) == 2, "another version scores for itself, and no more than the limit"


def test_an_endpoint_elsewhere_is_refused(version, experiment, tmp_path):
    method = {"name": "endpoint", "url": "http://127.0.0.1:1/v1", "model": "m"}
    elsewhere = version[0].model_copy(update={"method": method})
    with pytest.raises(DataError, match="shop/1 is an endpoint elsewhere"):
        answer_logprobs(experiment, elsewhere, [exchange(1, "x")], 1, folder=tmp_path, cache=tmp_path)


@pytest.fixture
def experiment(tiny_experiment: Path) -> Experiment:
    return Experiment.load(tiny_experiment)
