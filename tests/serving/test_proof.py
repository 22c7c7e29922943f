"""What the gate compared is asked again wherever a version is loaded, before it answers anybody."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.parity import check_parity
from regraft.records import Example, Message, ModelVersion, PromotionDecision
from serving.engines.base import Engine, EngineLimits
from serving.loading import load_engine
from serving.router import VersionTable
from serving.shelf import Shelf, in_process

ASKED = tuple(
    Example(
        id=f"e{n}",
        messages=(
            Message(role="user", content=f"What about {n} things?"),
            Message(role="assistant", content="a"),
        ),
    )
    for n in range(3)
)


@pytest.mark.parametrize("kind", ["lora", "prompt_tuning"])
def test_what_answers_otherwise_than_at_the_gate_takes_no_traffic(
    kind: str,
    base_folder: Path,
    adapters: dict[str, Path],
    method_settings: dict[str, dict[str, object]],
    make_version: Any,
    make_registry: Any,
) -> None:
    one, two, three = (make_version(n, base_folder, method_settings[kind]) for n in (1, 2, 3))
    parity = check_parity(one, adapters[kind], ASKED, dtype="float32", device="cpu", max_new_tokens=12)
    assert parity.ok and len(parity.probes) == 3

    def decision(number: int, **changes: Any) -> PromotionDecision:
        return PromotionDecision(
            id=str(number), challenger=f"support/{number}", incumbent="", outcome="promote",
            reason="", evidence=(), parity=parity.model_copy(update=changes),
        )  # fmt: skip

    others = {"lora": "rslora", "prompt_tuning": "p_tuning"}
    registry = make_registry(
        one, two, three, folders={1: adapters[kind], 2: adapters[kind], 3: adapters[kind]}
    )
    failed = parity.paths["served"].model_copy(update={"equal": 0, "ties": 0})
    registry.decisions = {
        1: decision(1),
        2: decision(2, paths={"served": failed}),
        3: decision(3),
    }
    limits = EngineLimits(max_batch=4, max_queued=4)

    def load(version: ModelVersion, folder: Path) -> Engine:
        # The third version's files are another adapter's: as if the store or an engine had mixed them up.
        if version.version == 3:
            folder, version = (
                adapters[others[kind]],
                make_version(3, base_folder, method_settings[others[kind]]),
            )
        return load_engine(version, folder, dtype="float32", device="cpu", limits=limits)

    async def run() -> None:
        shelf = Shelf(in_process(registry, partial(load)), retry_seconds=60)
        table = VersionTable(registry, shelf, name="support")
        for number in (1, 2, 3):
            registry.champion = number
            await table.poll()
        assert table.champion == one
        errors = table.health()["load_errors"]
        assert "failed the parity check" in errors["support/2"]
        assert "nats" in errors["support/3"]
        await table.stop()

    asyncio.run(run())
