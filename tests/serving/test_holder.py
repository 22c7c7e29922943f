"""The process that holds a replica's models: what it says when something is wrong, and that none is left behind."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from serving.engines.base import EngineError, GenerationRequest
from serving.holder_process import HolderProcess
from serving.lines import LineLostError
from serving.settings import EndpointSettings
from serving.shelf import UnavailableError
from serving.wire import Failed

REQUEST = GenerationRequest((1, 2, 3), 4)
#: A replica that waits to be killed, as Ray would kill it.
PARENT = """
import asyncio, sys
from serving.holder_process import HolderProcess
from serving.settings import EndpointSettings

async def run():
    holder = await HolderProcess.start(EndpointSettings.model_validate_json(sys.argv[1]))
    print(holder.pid, await holder.call("state"), flush=True)
    await holder.ended()

asyncio.run(run())
"""


@pytest.fixture
def settings(mlflow_url: str, tmp_path: Path) -> EndpointSettings:
    return EndpointSettings(
        name="nobody", tracking_uri=mlflow_url, cache=tmp_path / "cache", captures=tmp_path / "captures"
    )


def test_it_says_what_is_wrong_and_ends_when_it_is_told_to(settings: EndpointSettings) -> None:
    async def run() -> None:
        holder = await HolderProcess.start(settings)
        assert await holder.call("load_those_with_a_role") == {}  # there is no such model
        with pytest.raises(UnavailableError, match="version 7 is not known here"):
            await holder.call("prepare", 7, [])
        with pytest.raises(EngineError, match="TypeError"):
            await holder.call("prepare")
        with pytest.raises(EngineError, match="KeyError"):
            await holder.call("__init__")
        (said,) = [said async for said in holder.ask(7, REQUEST, [7])]
        (event,) = said
        assert isinstance(event, Failed) and event.kind == "unavailable" and "version 7" in event.message
        state = await holder.call("state")
        assert (state["loaded"], state["asked_directly"]) == ({}, 0), "the replica's own do not count"
        process = psutil.Process(holder.pid)
        await holder.end()
        assert await holder.ended() == 0 and not process.is_running()

    asyncio.run(run())


def test_who_waits_for_one_that_is_killed_hears_of_it(settings: EndpointSettings) -> None:
    async def run() -> None:
        holder = await HolderProcess.start(settings)
        await holder.call("state")
        process = psutil.Process(holder.pid)
        process.suspend()
        waiting = asyncio.create_task(holder.call("state"))
        asked = holder.ask(7, REQUEST, [7])
        await asyncio.sleep(0)
        process.kill()
        with pytest.raises(ConnectionResetError):
            await waiting
        with pytest.raises(LineLostError):
            await anext(asked)
        assert await holder.ended() == -9
        with pytest.raises(LineLostError):
            await anext(holder.ask(7, REQUEST, [7]))
        with pytest.raises(ConnectionResetError):
            await holder.call("state")
        await holder.end()  # as Ray does in any case

    asyncio.run(run())


def test_it_ends_with_a_replica_that_is_killed(settings: EndpointSettings) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, settings.model_dump_json()], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout
    with parent:
        holder = psutil.Process(int(parent.stdout.readline().split()[0]))
        parent.kill()
    _, alive = psutil.wait_procs([holder], 60)
    assert not alive
