"""Steps of fixed shapes mix adapters as plain steps do; here they are done on the CPU and not recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from regraft.evals import graphs
from regraft.evals import slots as slots_module
from regraft.evals.graphs import Fixed
from regraft.evals.slots import Slots
from regraft.methods import parse_method
from regraft.models import load_tokenizer
from serving.engines import mixed
from serving.engines import slots as slots_engine
from serving.engines.adapters import Adapter, read_adapter
from serving.engines.base import EngineError, EngineLimits, Finished, GenerationRequest, TextDelta
from serving.engines.slots import SlotEngine, SlotsBase

KINDS = ["base", "lora", "dora", "ia3", "vera", "loha", "prompt_tuning", "prefix_tuning"]


def crowd(base_folder: Path, adapters: dict[str, Path]) -> list[str]:
    """Answers of many lengths, three to each kind, in five slots."""
    base = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    shared = SlotsBase(base, load_tokenizer(base_folder), EngineLimits(max_batch=5, max_queued=100))

    async def answer(of: SlotEngine, request: GenerationRequest) -> str:
        events = [event async for event in of.submit(request)]
        assert isinstance(events[-1], Finished)
        return "".join(e.text for e in events if isinstance(e, TextDelta))

    async def all_at_once() -> list[str]:
        engines = [
            SlotEngine(shared, Adapter() if kind == "base" else read_adapter(adapters[kind], base))
            for kind in KINDS
        ]
        asked = [(of, i, n) for i, of in enumerate(engines) for n in (20, 3 + i, 12)]
        return await asyncio.gather(
            *(answer(of, GenerationRequest(tuple(range(5 + i, 9 + i + n)), n)) for of, i, n in asked)
        )

    found = asyncio.run(all_at_once())
    shared.close()
    return found


@pytest.mark.parametrize("few", [0, 16])
def test_rows_of_all_kinds_are_answered_the_same(
    few: int, base_folder: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the tables of those adapters that rows have, and by those of all, as on a GPU."""
    expected = crowd(base_folder, adapters)
    steps: list[Fixed] = []
    step = Slots.step_fixed

    def counted(self: Slots, fixed: Fixed) -> torch.Tensor:
        steps.append(fixed)
        return step(self, fixed)

    monkeypatch.setattr(slots_module, "wanted", lambda _: True)
    monkeypatch.setattr(graphs, "_STEPS_BEFORE", 0)
    for module in (slots_module, graphs):
        monkeypatch.setattr(module, "COLUMNS", 32)
    followed: list[bool] = []
    follow = Slots.follow

    def noted(self: Slots) -> bool:
        followed.append(follow(self))
        return followed[-1]

    monkeypatch.setattr(Slots, "step_fixed", counted)
    monkeypatch.setattr(Slots, "follow", noted)
    monkeypatch.setitem(mixed._FEW_ADAPTERS, "cpu", few)
    assert crowd(base_folder, adapters) == expected
    assert {fixed.rows for fixed in steps} >= {4, 5}
    assert sum(followed) > 10, "steps that began before the tokens of those before them were read"


def test_prompts_that_fail_cost_nobody_the_tokens_on_their_way(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_module, "wanted", lambda _: True)
    monkeypatch.setattr(graphs, "_STEPS_BEFORE", 0)
    together = slots_engine.put_together
    ahead: list[bool] = []

    def refuses(
        base: object, prompts: Sequence[Sequence[int]], adapters: Sequence[Adapter]
    ) -> dict[str, Any]:
        if any(len(prompt) == 3 for prompt in prompts):
            ahead.append(shared._said is not None)
            raise RuntimeError("such prompts fail")
        return together(base, prompts, adapters)

    monkeypatch.setattr(slots_engine, "put_together", refuses)
    base = parse_method({"name": "zero_shot"}).load_base(base_folder, "float32", "cpu")
    shared = SlotsBase(base, load_tokenizer(base_folder), EngineLimits(max_batch=4, max_queued=9))
    shared._eos = frozenset()
    engine = SlotEngine(shared, Adapter())

    async def long(begun: asyncio.Event) -> str:
        text = ""
        async for event in engine.submit(GenerationRequest(tuple(range(5, 25)), 60)):
            begun.set()
            text += event.text if isinstance(event, TextDelta) else ""
        return text

    async def with_others(others: bool) -> str:
        begun = asyncio.Event()
        asked = asyncio.create_task(long(begun))
        await begun.wait()
        while others and not asked.done():
            with pytest.raises(EngineError, match="such prompts fail"):
                [_ async for _ in engine.submit(GenerationRequest((5, 6, 7), 4))]
        return await asked

    expected = asyncio.run(with_others(False))
    assert asyncio.run(with_others(True)) == expected and any(ahead)
    shared.close()
