"""A worker with a node to itself, for what is measured and must not share it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from regraft.errors import ServiceError

#: How long a node may take to become free. A sweep's own actors are gone within seconds.
_PATIENCE = 60.0


class QuietWorker(NamedTuple):
    """An actor, and how quiet it is where it runs, in words."""

    actor: Any
    where: str


@contextmanager
def quiet_worker(
    cls: type[Any],
    *args: Any,
    cpus: float,
    gpus: float,
    say: Callable[[str], None],
    patience: float = _PATIENCE,
) -> Iterator[QuietWorker]:
    """An actor on a node that nothing else computes on while open, where there is one.

    All cores of a node are asked for, so that Ray puts nothing beside it. What holds no cores by Ray's books,
    such as an endpoint that shares them, is not seen. Where no node becomes free in time, the actor holds
    what is needed alone and says that it is not quiet.

    Args:
        cls: The actor's class.
        args: Its arguments.
        cpus: Cores that are needed.
        gpus: GPUs that are needed; a fraction takes one whole.
        say: Called if it has to wait.
        patience: Seconds until a shared node will do.

    Raises:
        ServiceError: If not even a part of a node can be had.
    """
    import ray

    remote = ray.remote(cls)
    whole = _whole_node(cpus, gpus)
    actor = remote.options(num_cpus=whole, num_gpus=math.ceil(gpus), max_restarts=-1).remote(*args)
    where = f"nothing else on its node's {whole:g} cores by Ray's books"
    try:
        if not _ready(actor, patience):
            ray.kill(actor)
            say(f"no node was free for {patience:.0f} s: what is measured now shares one, and says so")
            actor = remote.options(num_cpus=cpus, num_gpus=gpus, max_restarts=-1).remote(*args)
            where = "beside other work on its node"
            if not _ready(actor, 10 * patience):
                raise ServiceError(
                    f"no node has {cpus:g} cores and {gpus:g} GPUs free to measure the candidates on",
                    "end what holds them, and start the same again: finished trials are found",
                )
        yield QuietWorker(actor, where)
    finally:
        ray.kill(actor)


def _ready(actor: Any, seconds: float) -> bool:
    import ray

    done, _ = ray.wait([actor.__ray_ready__.remote()], timeout=seconds)
    return bool(done)


def _whole_node(cpus: float, gpus: float) -> float:
    """Cores of the smallest node that has what is needed."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fit = [
        n.get("CPU", 0.0) for n in nodes if n.get("CPU", 0.0) >= cpus and n.get("GPU", 0.0) >= math.ceil(gpus)
    ]
    return float(min(fit, default=cpus))
