"""The processes that `benchmarks/serving.py` measures.

They run in Python's safe mode, as a file beside this one bears the name of the package `serving`.

    python -P benchmarks/serving_child.py endpoint SETTINGS.json
    python -P benchmarks/serving_child.py bare SETTINGS.json VERSION

`endpoint` puts the endpoint up on a Ray of its own and ends with its standard input. `bare` holds one version
in an engine without an endpoint, and answers lines of JSON (`ids`, `tokens`, `count`, `whole`) with lines of
pairs: seconds to the first text, and to the end.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

from serving.settings import EndpointSettings


def endpoint(settings: EndpointSettings) -> None:
    """Serve until standard input ends."""
    import ray
    from ray import serve

    from serving.app import deploy

    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    deploy(settings, host=settings.serve.host, port=settings.serve.port)
    say("deployed")
    sys.stdin.read()
    serve.shutdown()
    ray.shutdown()


def bare(settings: EndpointSettings, number: int) -> None:
    """Answer with the engine alone until standard input ends."""
    from regraft.tracking.registry import Registry
    from serving.loading import load_engine

    registry = Registry(settings.tracking_uri, settings.cache)
    version = registry.version(settings.name, number)
    engine = load_engine(
        version, registry.fetch(version.logged_model_id),
        dtype=settings.dtype, device=settings.device, limits=settings.limits,
    )  # fmt: skip
    say("loaded")
    with asyncio.Runner() as runner:
        for line in sys.stdin:
            asked = json.loads(line)
            say(json.dumps([runner.run(_timed(engine, asked)) for _ in range(asked["count"])]))
    engine.close()


async def _timed(engine: Any, asked: dict[str, Any]) -> tuple[float, float]:
    from serving.engines.base import GenerationRequest

    begun, first = time.perf_counter(), 0.0
    request = GenerationRequest(tuple(asked["ids"]), asked["tokens"], whole=asked["whole"])
    async for _ in engine.submit(request):
        first = first or time.perf_counter() - begun
    return first, time.perf_counter() - begun


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    given = EndpointSettings.model_validate_json(Path(sys.argv[2]).read_text())
    if sys.argv[1] == "endpoint":
        endpoint(given)
    else:
        bare(given, int(sys.argv[3]))
