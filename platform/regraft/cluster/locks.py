"""One at a time on a whole cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from regraft.errors import ServiceError

NAMESPACE = "regraft"
_LOOK_EVERY = 0.2


class _Lock:
    """Stands for who holds it, as long as that process lives."""


def claim(name: str, kind: type[Any], *args: Any, **options: Any) -> Any | None:
    """Start an actor by a name of which a cluster has one; None if there is one already.

    It ends with its process, however that ends.

    Args:
        name: The name, on the connected cluster.
        kind: The actor's class.
        args: Its arguments.
        options: More options for Ray.
    """
    import ray

    actor = ray.remote(kind).options(name=name, namespace=NAMESPACE, num_cpus=0, **options)
    try:
        started = actor.remote(*args)
        ray.get(started.__ray_ready__.remote())
    except (ValueError, ray.exceptions.RayActorError):  # another was quicker
        return None
    return started


@contextmanager
def cluster_lock(name: str, *, patience: float = 600.0) -> Iterator[None]:
    """Hold a lock of the connected cluster while open.

    It is a named actor, of which a cluster has one: it ends with its process, however that ends, so that
    nobody finds a lock that a dead process left behind.

    Args:
        name: What is locked.
        patience: Seconds to wait for another holder.

    Raises:
        ServiceError: If another holds it for longer.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    deadline = time.monotonic() + patience
    # On another node it could die before its holder does, and let a second one in.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    while (lock := claim(f"lock:{name}", _Lock, scheduling_strategy=here)) is None:
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{name} has been locked for {patience:.0f} s by another process of the cluster",
                "see which job promotes in Ray's dashboard, and end it if it hangs",
            )
        time.sleep(_LOOK_EVERY)
    try:
        yield
    finally:
        ray.kill(lock)
