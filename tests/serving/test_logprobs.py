"""Both engines tell the log-probabilities that the model itself gives, and of the tokens of the answer alone."""

from __future__ import annotations

import asyncio
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.methods import parse_method
from regraft.models import load_tokenizer, prompt_ids
from regraft.records import Message
from serving.engines.adapters import Adapter
from serving.engines.base import Engine, EngineLimits, Finished, GenerationRequest, TextDelta, TokenLogprob
from serving.engines.slots import SlotEngine, SlotsBase
from serving.engines.static import StaticEngine
from serving.engines.text import Spelling

NEW = 16


@pytest.fixture(scope="module", params=["slots", "static"])
def engine(request: pytest.FixtureRequest, base_folder: Path) -> Iterator[Engine]:
    base = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    limits = EngineLimits(gather_seconds=0.2)
    if request.param == "slots":
        shared = SlotsBase(base, load_tokenizer(base_folder), limits)
        yield SlotEngine(shared, Adapter())
        shared.close()
    else:
        engine = StaticEngine(base, load_tokenizer(base_folder), limits)
        yield engine
        engine.close()


@pytest.fixture(scope="module")
def expected(base_folder: Path) -> Callable[[tuple[int, ...], list[int]], torch.Tensor]:
    """Log-probabilities at the place of each answered token, from one pass over the whole."""
    model = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")

    def of(prompt: tuple[int, ...], answer: list[int]) -> torch.Tensor:
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]])).logits[0]  # type: ignore[operator]
        return torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)

    return of


def asked(base_folder: Path, question: str, **settings: Any) -> GenerationRequest:
    ids = prompt_ids(load_tokenizer(base_folder), [Message(role="user", content=question)])
    return GenerationRequest(**{"prompt_ids": tuple(ids), "max_new_tokens": NEW, **settings})


async def _events(engine: Engine, requests: list[GenerationRequest]) -> list[list[Any]]:
    async def one(request: GenerationRequest) -> list[Any]:
        return [event async for event in engine.submit(request)]

    return list(await asyncio.gather(*map(one, requests)))


def answers(engine: Engine, *requests: GenerationRequest) -> list[tuple[str, list[TokenLogprob], Finished]]:
    found = []
    for *deltas, end in asyncio.run(_events(engine, list(requests))):
        assert isinstance(end, Finished) and all(isinstance(d, TextDelta) for d in deltas)
        assert pickle.loads(pickle.dumps(deltas)) == deltas
        found.append(("".join(d.text for d in deltas), [t for d in deltas for t in d.tokens], end))
    return found


def test_they_are_the_models_own_for_each_row_of_a_batch(
    engine: Engine, base_folder: Path, expected: Any
) -> None:
    requests = [
        asked(base_folder, "Hello", logprobs=3),
        asked(base_folder, "When is the meter reading due?", logprobs=0, temperature=1.5, top_p=0.9, seed=3),
        asked(base_folder, "Why, and how?"),
    ]
    (text, tokens, end), (_, drawn, _), (_, untold, _) = answers(engine, *requests)
    assert len(tokens) == end.completion_tokens == NEW and untold == []
    for request, told in zip(requests, (tokens, drawn), strict=False):
        scores = expected(request.prompt_ids, [t.id for t in told])
        for row, token in zip(scores, told, strict=True):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-3)
            assert token.logprob <= 0
    for row, token in zip(expected(requests[0].prompt_ids, [t.id for t in tokens]), tokens, strict=True):
        assert token.id == token.top[0].id == int(row.argmax())
        assert [t.id for t in token.top] == row.topk(3).indices.tolist()
    assert all(t.top == () for t in drawn)
    assert any(t.logprob < math.log(0.5) for t in drawn)
    assert b"".join(t.spelling for t in tokens).decode(errors="replace") == text
    assert [t.offset for t in tokens] == sorted(t.offset for t in tokens)


def test_tokens_after_the_cut_of_a_stop_string_are_left_out(engine: Engine, base_folder: Path) -> None:
    ((text, tokens, _),) = answers(engine, asked(base_folder, "Hello", logprobs=0))
    begins = [t.offset for t in tokens]
    place = next(
        i
        for i in range(4, NEW)
        if begins[i] > begins[i - 1] and text.find(text[begins[i] :][:2]) == begins[i]
    )
    stop = text[begins[place] :][:2]
    ((cut, told, end),) = answers(engine, asked(base_folder, "Hello", logprobs=0, stop=(stop,)))
    assert cut == text[: begins[place]] and end.reason == "stop"
    assert [t.id for t in told] == [t.id for t in tokens[:place]]
    ((_, held, end),) = answers(engine, asked(base_folder, "Hello", logprobs=0, stop=(text[-2:] + "never",)))
    assert [t.id for t in held] == [t.id for t in tokens] and end.reason == "length"


def test_the_token_that_ends_an_answer_is_not_told(engine: Engine, base_folder: Path) -> None:
    request = asked(base_folder, "Hello", logprobs=0, temperature=2.0, max_new_tokens=60)
    for seed in range(40):
        ((_, tokens, end),) = answers(engine, GenerationRequest(**{**vars(request), "seed": seed}))
        if end.reason == "stop":
            break
    assert end.reason == "stop" and len(tokens) == end.completion_tokens - 1


def test_nothing_is_computed_when_nobody_asks(
    engine: Engine, base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("log-probabilities were computed")

    monkeypatch.setattr("serving.engines.rows._logprob", refuse)
    ((_, tokens, end),) = answers(engine, asked(base_folder, "Hello"))
    assert tokens == [] and end.completion_tokens == NEW


def test_tokens_are_spelled_in_the_forms_that_vocabularies_have(tiny_tokenizer: Any) -> None:
    spell = Spelling(tiny_tokenizer)
    for text in ("Ärger 😀 über", " a\tb\n", "<|im_end|>"):
        ids = tiny_tokenizer(text)["input_ids"]
        assert b"".join(map(spell, ids)) == text.encode()
    assert spell(len(tiny_tokenizer) + 5) == b""


def test_sentencepiece_vocabularies_are_spelled_too() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "\N{LOWER ONE EIGHTH BLOCK}Hello": 1, "<0x0A>": 2, "<0xF0>": 3, "ü": 4}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    spell = Spelling(PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>"))
    assert [spell(n) for n in range(5)] == [b"<unk>", b" Hello", b"\n", b"\xf0", "ü".encode()]
