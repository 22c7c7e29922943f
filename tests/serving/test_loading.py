"""Versions on one base share it in memory; what cannot share answers by the static engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import serving.loading
from regraft.models import load_tokenizer, prompt_ids
from regraft.records import Message, ModelVersion
from serving.engines.base import EngineClosedError, EngineLimits, GenerationRequest, TextDelta
from serving.engines.slots import SlotEngine
from serving.engines.static import StaticEngine

LIMITS = EngineLimits(max_batch=4)


@pytest.fixture
def load(
    base_folder: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    make_version: Callable[..., ModelVersion],
) -> Callable[[str], Any]:
    def of(kind: str, limits: EngineLimits = LIMITS) -> Any:
        version = make_version(1, base_folder, method_settings[kind])
        return serving.loading.load_engine(
            version, adapters[kind], dtype="float32", device="cpu", limits=limits
        )

    return of


def said(engine: Any, base_folder: Path) -> str:
    prompt = prompt_ids(load_tokenizer(base_folder), [Message(role="user", content="When is it due?")])

    async def ask() -> str:
        events = [event async for event in engine.submit(GenerationRequest(tuple(prompt), 8))]
        return "".join(e.text for e in events if isinstance(e, TextDelta))

    return asyncio.run(ask())


def test_versions_on_one_base_share_it_and_the_last_frees_it(
    load: Callable[..., Any], base_folder: Path
) -> None:
    lora, ia3 = load("lora"), load("ia3")
    assert isinstance(lora, SlotEngine)
    assert lora._shared is ia3._shared
    assert len({said(lora, base_folder), said(ia3, base_folder)}) == 2
    shared = lora._shared
    lora.close()
    lora.close()  # a second time changes nothing
    assert said(ia3, base_folder)
    with pytest.raises(EngineClosedError):
        said(lora, base_folder)
    ia3.close()
    assert not hasattr(shared, "base")
    assert not serving.loading._BASES._held
    fresh = load("lora")
    assert fresh._shared is not shared
    fresh.close()


def test_a_base_in_four_bits_is_another_base(load: Callable[..., Any]) -> None:
    lora, qlora = load("lora"), load("qlora")
    assert isinstance(qlora, SlotEngine)
    assert lora._shared is not qlora._shared
    lora.close()
    qlora.close()


def test_what_cannot_share_answers_by_the_static_engine_and_the_log_says_why(
    load: Callable[..., Any], base_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="serving.loading")
    engine = load("oft")
    assert isinstance(engine, StaticEngine)
    assert said(engine, base_folder)
    assert "is served by the static engine: OFT changes its layers in a way of its own" in caplog.text
    assert not serving.loading._BASES._held  # nothing is kept for it
    engine.close()


def test_a_base_that_asks_for_more_than_likely_tokens_is_not_put_in_slots(
    load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="serving.loading")
    from regraft.methods import base

    real = base.load_causal_lm

    def with_penalty(*args: Any, **kwargs: Any) -> Any:
        model = real(*args, **kwargs)
        model.generation_config.repetition_penalty = 1.3
        return model

    monkeypatch.setattr(base, "load_causal_lm", with_penalty)
    engine = load("lora")
    assert isinstance(engine, StaticEngine)
    assert "asks for more than likely tokens" in caplog.text
    engine.close()
