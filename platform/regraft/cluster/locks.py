"""One at a time on a whole cluster."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from regraft.errors import ServiceError

_NAMESPACE = "regraft"
_LOOK_EVERY = 0.2


class _Lock:
    """Stands for who holds it, as long as that process lives."""


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

    kind = ray.remote(_Lock).options(name=f"lock:{name}", namespace=_NAMESPACE, num_cpus=0)
    deadline = time.monotonic() + patience
    while True:
        try:
            lock = kind.remote()
            ray.get(lock.__ray_ready__.remote())
            break
        except (ValueError, ray.exceptions.RayActorError) as error:  # another was there first
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{name} has been locked for {patience:.0f} s by another process of the cluster",
                    "see which job promotes in Ray's dashboard, and end it if it hangs",
                ) from error
            time.sleep(_LOOK_EVERY)
    try:
        yield
    finally:
        ray.kill(lock)
