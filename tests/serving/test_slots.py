"""Requests of many adapters on one base, joining and leaving between steps, answer as each does alone in PEFT."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft.evals.slots
from regraft.methods import METHODS_BY_NAME, parse_method
from regraft.models import load_tokenizer, prompt_ids
from regraft.records import Message
from serving.engines import slots
from serving.engines.adapters import Adapter, UnmixableError, read_adapter
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    Finished,
    GenerationRequest,
    QueueFullError,
    TextDelta,
)
from serving.engines.slots import SlotEngine, SlotsBase

#: These change a layer in a way that rows of one batch cannot have each for itself.
ALONE = {"oft", "lokr"}
KINDS = ["base", *(n for n, m in METHODS_BY_NAME.items() if m.kind == "adapter" and n not in ALONE)]
QUESTIONS = [
    "Hello",
    "When is the meter reading due?",
    "Ärger 😀",
    "Why, and how, and when: tell me all of it",
]
NEW = 20


def prompts(base_folder: Path) -> list[tuple[int, ...]]:
    tokenizer = load_tokenizer(base_folder)
    return [tuple(prompt_ids(tokenizer, [Message(role="user", content=q)])) for q in QUESTIONS]


@pytest.fixture(scope="module")
def expected(
    base_folder: Path, adapters: dict[str, Path], method_settings: dict[str, dict[str, object]]
) -> dict[str, list[str]]:
    """What PEFT's `generate` answers, one prompt at a time."""
    tokenizer, found = load_tokenizer(base_folder), {}
    for kind in KINDS:
        model = parse_method(method_settings[kind]).load(base_folder, adapters[kind], "float32", "cpu")
        found[kind] = []
        for prompt in prompts(base_folder):
            ids = torch.tensor([prompt])
            with torch.no_grad():
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW
                )
            found[kind].append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
    return found


@contextmanager
def shared(base_folder: Path, held: str = "zero_shot", **limits: Any) -> Iterator[SlotsBase]:
    base = parse_method({"name": held}).load_base(base_folder, "float32", "cpu")
    found = SlotsBase(base, load_tokenizer(base_folder), EngineLimits(**limits))
    try:
        yield found
    finally:
        found.close()


def engine(of: SlotsBase, kind: str, adapters: dict[str, Path]) -> SlotEngine:
    return SlotEngine(of, Adapter() if kind == "base" else read_adapter(adapters[kind], of.base))


async def answer(of: SlotEngine, request: GenerationRequest) -> tuple[str, Finished]:
    events = [event async for event in of.submit(request)]
    assert isinstance(events[-1], Finished)
    return "".join(e.text for e in events if isinstance(e, TextDelta)), events[-1]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_answers_as_peft_does(
    kind: str, base_folder: Path, adapters: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    assert kind == "base" or expected[kind] != expected["base"]

    async def all_at_once(of: SlotEngine) -> list[tuple[str, Finished]]:
        return await asyncio.gather(*(answer(of, GenerationRequest(p, NEW)) for p in prompts(base_folder)))

    # An adapter that was trained on a base in four bits is served on that.
    held = "qlora" if kind == "qlora" else "zero_shot"
    with shared(base_folder, held, max_batch=4) as base:
        of = engine(base, kind, adapters)
        assert [text for text, _ in asyncio.run(all_at_once(of))] == expected[kind]


@pytest.mark.parametrize("room", [128, 8])
def test_all_kinds_answer_in_one_batch_that_changes_all_the_time(
    room: int,
    base_folder: Path,
    adapters: dict[str, Path],
    expected: dict[str, list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More requests than slots, of all kinds and different lengths: they join and leave at every step."""
    monkeypatch.setattr(regraft.evals.slots, "ROOM", room)
    monkeypatch.setitem(slots._PREFILL_TOKENS, "cpu", 120)

    async def crowd(engines: dict[str, SlotEngine]) -> None:
        kinds = enumerate(kind for kind in KINDS if kind != "qlora")
        wanted = [(k, i, NEW - 3 * i - j) for j, k in kinds for i in range(len(QUESTIONS))]
        wanted = [(k, i, max(1, n)) for k, i, n in wanted]
        tokenizer = load_tokenizer(base_folder)
        found = await asyncio.gather(
            *(answer(engines[k], GenerationRequest(prompts(base_folder)[i], n)) for k, i, n in wanted)
        )
        for (kind, index, count), (text, end) in zip(wanted, found, strict=True):
            whole = tokenizer(expected[kind][index])["input_ids"]
            assert expected[kind][index].startswith(text.rstrip("\ufffd")), (kind, index)
            assert end.completion_tokens == count or end.reason == "stop"
            assert text or len(whole) == 0 or count < 4

    with shared(base_folder, max_batch=7, max_queued=200) as base:
        asyncio.run(crowd({k: engine(base, k, adapters) for k in KINDS if k != "qlora"}))


@pytest.mark.parametrize("kind", sorted(ALONE))
def test_what_cannot_be_mixed_is_told(kind: str, base_folder: Path, adapters: dict[str, Path]) -> None:
    with shared(base_folder) as base, pytest.raises(UnmixableError, match="way of its own"):
        read_adapter(adapters[kind], base.base)


def test_a_seed_means_the_same_alone_and_in_a_crowd(base_folder: Path, adapters: dict[str, Path]) -> None:
    first, second, *_ = prompts(base_folder)
    sampled = GenerationRequest(first, NEW, temperature=1.0, top_p=0.9, seed=11)

    async def crowd(of: SlotEngine) -> list[tuple[str, Finished]]:
        others = [GenerationRequest(second, 3), GenerationRequest(second, NEW, temperature=0.7, seed=1)]
        return await asyncio.gather(*(answer(of, r) for r in [*others, sampled]))

    with shared(base_folder, max_batch=4) as base:
        of = engine(base, "lora", adapters)
        alone = asyncio.run(answer(of, sampled))
        greedy = asyncio.run(answer(of, GenerationRequest(first, NEW)))
        assert asyncio.run(crowd(of))[2] == alone
        assert alone[0] != greedy[0]


class Gate:
    """Holds the model's next step until it is opened."""

    def __init__(self, base: Any) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        base.register_forward_pre_hook(self._wait, with_kwargs=True)

    def _wait(self, *_: Any) -> None:
        self.entered.set()
        assert self.go.wait(30)


def gated(base_folder: Path, scenario: Callable[[SlotsBase, Gate], Any], **limits: Any) -> None:
    with shared(base_folder, **limits) as base:
        gate = Gate(base.base)
        asyncio.run(scenario(base, gate))
        gate.go.set()


def test_a_version_that_is_unloaded_fails_its_own_requests_and_no_others(
    base_folder: Path, adapters: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    prompt = prompts(base_folder)[0]

    async def scenario(base: SlotsBase, gate: Gate) -> None:
        stays, goes = engine(base, "lora", adapters), engine(base, "ia3", adapters)
        kept = asyncio.create_task(answer(stays, GenerationRequest(prompt, NEW)))
        lost = goes.submit(GenerationRequest(prompt, NEW))
        assert await asyncio.to_thread(gate.entered.wait, 30)
        closing = asyncio.create_task(asyncio.to_thread(goes.close))
        gate.go.set()
        await closing
        with pytest.raises(EngineClosedError):
            async for _ in lost:
                pass
        assert (await kept)[0] == expected["lora"][0]
        with pytest.raises(EngineClosedError):
            goes.submit(GenerationRequest(prompt, 2))
        again = engine(base, "ia3", adapters)
        assert (await answer(again, GenerationRequest(prompt, NEW)))[0] == expected["ia3"][0]

    gated(base_folder, scenario, max_batch=4)


def test_a_full_queue_refuses_and_cancelling_makes_room(base_folder: Path, adapters: dict[str, Path]) -> None:
    request = GenerationRequest(prompts(base_folder)[0], 200)

    async def scenario(base: SlotsBase, gate: Gate) -> None:
        of = engine(base, "base", adapters)
        running = of.submit(request)
        assert await asyncio.to_thread(gate.entered.wait, 30)
        of.submit(request)
        with pytest.raises(QueueFullError):
            of.submit(request)
        running.cancel()
        gate.go.set()
        short = await answer(of, GenerationRequest(request.prompt_ids, 2))
        assert short[1].completion_tokens == 2

    gated(base_folder, scenario, max_batch=1, max_queued=1)


def test_a_step_that_fails_fails_those_it_was_for(
    base_folder: Path, adapters: dict[str, Path], expected: dict[str, list[str]]
) -> None:
    prompt = prompts(base_folder)[1]
    with shared(base_folder, max_batch=2) as base:
        broken = True

        def fail(*_: Any) -> None:
            if broken:
                raise RuntimeError("out of luck")

        base.base.register_forward_pre_hook(fail)
        of = engine(base, "base", adapters)
        with pytest.raises(EngineError, match="out of luck"):
            asyncio.run(answer(of, GenerationRequest(prompt, 2)))
        broken = False
        assert asyncio.run(answer(of, GenerationRequest(prompt, NEW)))[0] == expected["base"][1]


def test_closing_the_base_fails_what_runs_and_what_waits(
    base_folder: Path, adapters: dict[str, Path]
) -> None:
    request = GenerationRequest(prompts(base_folder)[0], 100)

    async def scenario(base: SlotsBase, gate: Gate) -> None:
        of = engine(base, "lora", adapters)
        running = of.submit(request)
        assert await asyncio.to_thread(gate.entered.wait, 30)
        waiting = of.submit(request)
        closing = asyncio.create_task(asyncio.to_thread(base.close))
        for stream in (running, waiting):
            with pytest.raises(EngineClosedError):
                await anext(stream)
        gate.go.set()
        await closing

    base = SlotsBase(
        parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu"),
        load_tokenizer(base_folder),
        EngineLimits(max_batch=1),
    )
    asyncio.run(scenario(base, Gate(base.base)))


@pytest.mark.parametrize(
    "settings", [{"name": "dora", "rank": 4}, {"name": "ia3"}, {"name": "lora", "rank": 4}], ids=str
)
def test_biases_of_the_base_are_scaled_where_peft_scales_them(
    settings: dict[str, object], base_folder: Path, tmp_path: Path
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(base_folder)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, attention_bias=True, mlp_bias=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = LlamaForCausalLM(config).eval()
    for name, weights in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weights, std=0.5)
    base.save_pretrained(tmp_path / "base")
    method = parse_method(settings)
    model: Any = method.apply(method.load_base(tmp_path / "base", "float32", "cpu"))
    for weights in model.parameters():
        if weights.requires_grad:
            torch.nn.init.normal_(weights, mean=0.5, std=0.3)
    method.save(model, tmp_path / "adapter")
    model = method.load(tmp_path / "base", tmp_path / "adapter", "float32", "cpu")
    prompt = prompts(base_folder)[1]
    ids = torch.tensor([prompt])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
    wanted = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
    clean = method.load_base(tmp_path / "base", "float32", "cpu")
    shared = SlotsBase(clean, tokenizer, EngineLimits(max_batch=2))
    of = SlotEngine(shared, read_adapter(tmp_path / "adapter", clean))
    assert asyncio.run(answer(of, GenerationRequest(prompt, 12)))[0] == wanted
    shared.close()
