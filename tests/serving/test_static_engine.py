from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.methods import METHODS_BY_NAME, parse_method
from regraft.models import load_tokenizer, prompt_ids
from regraft.records import Message
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    Event,
    Finished,
    GenerationRequest,
    QueueFullError,
    TextDelta,
)
from serving.engines.static import StaticEngine
from serving.engines.text import Detokenizer, StopScanner

SETTINGS: dict[str, dict[str, object]] = {}
KINDS = ["base", *(name for name, method in METHODS_BY_NAME.items() if method.kind == "adapter")]
QUESTIONS = [
    "Hello",
    "When is the meter reading due?",
    "Ärger 😀",
    "Why, and how, and when: tell me all of it",
]
NEW = 24


@pytest.fixture(scope="module", autouse=True)
def _settings(method_settings: dict[str, dict[str, object]]) -> None:
    SETTINGS.update(method_settings)


def load(kind: str, base_folder: Path, adapters: dict[str, Path]) -> Any:
    return parse_method(SETTINGS[kind]).load(base_folder, adapters[kind], "float32", "cpu")


@contextmanager
def engine_for(model: Any, base_folder: Path, **limits: Any) -> Iterator[StaticEngine]:
    engine = StaticEngine(model, load_tokenizer(base_folder), EngineLimits(**limits))
    try:
        yield engine
    finally:
        engine.close()


async def answer(engine: StaticEngine, request: GenerationRequest) -> tuple[list[str], Finished]:
    events: list[Event] = [event async for event in engine.submit(request)]
    last = events[-1]
    assert isinstance(last, Finished)
    return [e.text for e in events if isinstance(e, TextDelta)], last


def prompts(base_folder: Path) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(base_folder)
    return [tuple(prompt_ids(tokenizer, [Message(role="user", content=q)])) for q in QUESTIONS]


def peft_answer(model: Any, prompt: tuple[int, ...], new: int = NEW) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new
        )
    generated: list[int] = out[0].tolist()
    return generated[len(prompt) :]


@pytest.mark.parametrize("kind", KINDS)
def test_padded_batch_answers_as_peft_does_one_by_one(
    kind: str, base_folder: Path, adapters: dict[str, Path]
) -> None:
    model = load(kind, base_folder, adapters)
    tokenizer = load_tokenizer(base_folder)
    expected = [peft_answer(model, p) for p in prompts(base_folder)]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]
    assert len(set(texts)) == len(texts)
    if kind != "base":
        base = load("base", base_folder, adapters)
        assert [peft_answer(base, p) for p in prompts(base_folder)] != expected

    async def all_at_once(engine: StaticEngine) -> list[tuple[list[str], Finished]]:
        return await asyncio.gather(
            *(answer(engine, GenerationRequest(p, NEW)) for p in prompts(base_folder))
        )

    with engine_for(model, base_folder, gather_seconds=0.5, max_batch=len(QUESTIONS)) as engine:
        together = asyncio.run(all_at_once(engine))
        alone = asyncio.run(answer(engine, GenerationRequest(prompts(base_folder)[1], NEW)))
    assert ["".join(deltas) for deltas, _ in together] == texts
    assert [end.completion_tokens for _, end in together] == [len(ids) for ids in expected]
    assert "".join(alone[0]) == texts[1]
    assert len(alone[0]) > 1  # handed out as it comes


def test_each_row_has_its_own_end_and_sampling(base_folder: Path, adapters: dict[str, Path]) -> None:
    first, second, *_ = prompts(base_folder)
    sampled = GenerationRequest(first, NEW, temperature=1.0, top_p=0.9, seed=11)
    narrow = GenerationRequest(first, NEW, temperature=1.0, top_p=1e-6, seed=2)

    async def run(engine: StaticEngine) -> list[tuple[list[str], Finished]]:
        requests = [GenerationRequest(first, 3), GenerationRequest(second, NEW), sampled, narrow]
        return await asyncio.gather(*(answer(engine, r) for r in requests))

    with engine_for(load("base", base_folder, adapters), base_folder, gather_seconds=0.3) as engine:
        short, long, drawn, nearly_greedy = asyncio.run(run(engine))
        again = asyncio.run(answer(engine, sampled))
        greedy = asyncio.run(answer(engine, GenerationRequest(first, NEW)))
    assert (short[1].reason, short[1].completion_tokens) == ("length", 3)
    assert long[1].completion_tokens == NEW
    assert "".join(drawn[0]) == "".join(again[0]) != "".join(greedy[0])
    assert "".join(nearly_greedy[0]) == "".join(greedy[0])


def test_stop_strings_cut_the_answer(base_folder: Path, adapters: dict[str, Path]) -> None:
    prompt = prompts(base_folder)[1]
    with engine_for(load("base", base_folder, adapters), base_folder) as engine:
        whole = "".join(asyncio.run(answer(engine, GenerationRequest(prompt, NEW)))[0])
        stop = whole[6:9]
        assert stop.strip("\ufffd")
        deltas, end = asyncio.run(answer(engine, GenerationRequest(prompt, NEW, stop=(stop, "never this"))))
    assert "".join(deltas) == whole[: whole.find(stop)]
    assert end.reason == "stop"
    assert end.completion_tokens < NEW


class Gate:
    """Holds the model at every forward pass until told to go on."""

    def __init__(self, model: Any) -> None:
        self.entered = threading.Event()
        self.go = threading.Event()
        self.passes = 0
        model.register_forward_pre_hook(self)

    def __call__(self, module: Any, args: Any) -> None:
        self.passes += 1
        self.entered.set()
        assert self.go.wait(30)


def run_gated(
    base_folder: Path,
    adapters: dict[str, Path],
    scenario: Callable[[StaticEngine, Gate], Awaitable[None]],
    **limits: Any,
) -> None:
    model = load("base", base_folder, adapters)
    gate = Gate(model)

    async def run() -> None:
        try:
            await scenario(engine, gate)
        finally:
            gate.go.set()

    with engine_for(model, base_folder, **limits) as engine:
        asyncio.run(run())


def test_a_full_queue_refuses_and_cancelling_makes_room(base_folder: Path, adapters: dict[str, Path]) -> None:
    request = GenerationRequest(prompts(base_folder)[0], NEW)

    async def scenario(engine: StaticEngine, gate: Gate) -> None:
        running = engine.submit(request)
        assert await asyncio.to_thread(gate.entered.wait, 30)
        waiting = engine.submit(request)
        with pytest.raises(QueueFullError):
            engine.submit(request)
        await waiting.aclose()
        other = engine.submit(GenerationRequest(request.prompt_ids, 2))
        running.cancel()
        passes = gate.passes
        gate.go.set()
        assert [e async for e in other][-1] == Finished("length", len(request.prompt_ids), 2)
        assert gate.passes - passes <= 3  # the cancelled row did not go on for its 24 tokens
        assert [e async for e in running] == []

    run_gated(base_folder, adapters, scenario, max_batch=1, max_queued=1)


def test_a_failing_batch_fails_alone(base_folder: Path, adapters: dict[str, Path]) -> None:
    model = load("base", base_folder, adapters)
    broken = True

    def fail(module: Any, args: Any) -> None:
        if broken:
            raise RuntimeError("out of luck")

    model.register_forward_pre_hook(fail)
    request = GenerationRequest(prompts(base_folder)[0], 2)
    with engine_for(model, base_folder) as engine:
        with pytest.raises(EngineError, match="out of luck"):
            asyncio.run(answer(engine, request))
        broken = False
        assert asyncio.run(answer(engine, request))[1].completion_tokens == 2


def test_closing_fails_what_runs_and_what_waits(base_folder: Path, adapters: dict[str, Path]) -> None:
    request = GenerationRequest(prompts(base_folder)[0], NEW)

    async def scenario(engine: StaticEngine, gate: Gate) -> None:
        running = engine.submit(request)
        assert await asyncio.to_thread(gate.entered.wait, 30)
        waiting = engine.submit(request)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        for stream in (running, waiting):
            with pytest.raises(EngineClosedError):
                await anext(stream)
        gate.go.set()
        await closing
        with pytest.raises(EngineClosedError):
            engine.submit(request)

    run_gated(base_folder, adapters, scenario, max_batch=1)


def test_the_output_layer_gets_contiguous_input(base_folder: Path, adapters: dict[str, Path]) -> None:
    model = load("lora", base_folder, adapters)
    seen: list[bool] = []
    with engine_for(model, base_folder) as engine:
        model.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: seen.append(args[0].is_contiguous())
        )
        asyncio.run(answer(engine, GenerationRequest(prompts(base_folder)[1], 3)))
    assert seen and all(seen)


def test_detokenizer_never_splits_a_character(base_folder: Path) -> None:
    tokenizer = load_tokenizer(base_folder)
    text = "Grüße 😀😀 → 日本語 ok"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) > len(text)
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(i) for i in ids]
    assert "".join(parts) == text
    assert not any("\ufffd" in p for p in parts)
    cut = Detokenizer(tokenizer)
    half = [cut.push(i) for i in ids[:-1]]
    assert "".join(half) + cut.flush() == tokenizer.decode(ids[:-1])


def test_stop_scanner_holds_back_only_what_may_be_a_stop() -> None:
    scanner = StopScanner(["\nUser:", "END"])
    assert scanner.push("Hi\nUs") == ("Hi", False)
    assert scanner.push("ing E") == ("\nUsing ", False)
    assert scanner.push("N") == ("", False)
    assert scanner.flush() == "EN"
    assert StopScanner(["b", "ab"]).push("xab") == ("x", True)
