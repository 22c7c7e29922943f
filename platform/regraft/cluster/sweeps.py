"""Sweeps on one cluster: how many there are, that each runs once, and what dead ones left behind.

A sweep is announced by a named actor, which ends with its driver, however that ends: nobody has to clean up.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from regraft.cluster.locks import NAMESPACE, claim
from regraft.errors import ServiceError

_PREFIX = "sweep:"
#: Ray notices that a driver is gone a moment after it is.
_PATIENCE = 30.0


class _Sweep:
    """Stands for a sweep as long as its driver lives."""

    def __init__(self, by: str) -> None:
        self._by = by

    def by(self) -> str:
        """Who runs it."""
        return self._by


@contextmanager
def announced(sweep: str, say: Callable[[str], None]) -> Iterator[Callable[[], int]]:
    """Make a sweep known to the others on the connected cluster while open.

    Args:
        sweep: What tells it from all others.
        say: Called if the same sweep has to end first.

    Yields:
        A function that says how many sweeps there are, this one among them.

    Raises:
        ServiceError: If the same sweep runs already.
    """
    import ray

    _wait_until_gone(sweep, say)
    context = ray.get_runtime_context()
    by = f"process {os.getpid()} on {socket.gethostname()} (Ray job {context.get_job_id()})"
    sign = claim(_PREFIX + sweep, _Sweep, by, max_restarts=-1)
    if sign is None:
        raise ServiceError(f"the sweep {sweep} runs already", "wait for it, or end it")
    if others := _count() - 1:
        say(f"this sweep shares the cluster with {others} other{'s' * (others > 1)}")
    try:
        yield _count
    finally:
        ray.kill(sign)


def _count() -> int:
    """How many sweeps there are; at least the one that asks."""
    import ray

    names: list[str] = [found["name"] for found in ray.util.list_named_actors(all_namespaces=True)]
    return max(1, sum(name.startswith(_PREFIX) for name in names))


def _wait_until_gone(sweep: str, say: Callable[[str], None]) -> None:
    """Wait for what an earlier driver of a sweep left to go; refuse if it stays."""
    import ray

    deadline, told = time.monotonic() + _PATIENCE, False
    while True:
        try:
            other = ray.get_actor(_PREFIX + sweep, namespace=NAMESPACE)
            by = ray.get(other.by.remote(), timeout=5)
        except (ValueError, ray.exceptions.RayError):
            return
        if time.monotonic() > deadline:
            raise ServiceError(
                f"the sweep {sweep} runs already: {by}",
                "follow that one, or end it and start again: it goes on where it was",
            )
        if not told:
            say(f"this sweep is run by {by}; waiting {_PATIENCE:.0f} s for it to end")
            told = True
        time.sleep(0.5)


def remove_leftovers(say: Callable[[str], None]) -> int:
    """Remove the placement groups of jobs that are dead; gives how many there were.

    Ray does so itself when a job ends, but a Ray Train controller that outlives a killed driver for a moment
    may ask for a group after that (Ray 2.60), and nobody would ever give its resources back.
    """
    import ray
    from ray.util.placement_group import PlacementGroup, remove_placement_group
    from ray.util.state import list_placement_groups
    from ray.util.state.exception import RayStateApiException

    # Unless told, Ray asks whichever cluster was last started on this machine.
    address = ray.get_runtime_context().gcs_address
    try:
        found = list_placement_groups(address=address, detail=True, limit=1000)
        groups = [g for g in found if g.state != "REMOVED"]
        dead = _dead_jobs(address) if groups else set()
    except (RayStateApiException, ray.exceptions.RayError, OSError) as error:
        say(f"cannot look for what dead jobs have left: {str(error).splitlines()[0]}")
        return 0
    left = [g for g in groups if g.creator_job_id in dead and not g.is_detached]
    for group in left:
        remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(group.placement_group_id))))
    if left:
        say(f"gave back what {len(left)} placement groups of dead jobs held")
    return len(left)


def _dead_jobs(address: str) -> set[str]:
    from ray.util.state import list_jobs

    ended = {"SUCCEEDED", "FAILED", "STOPPED"}
    jobs: list[Any] = list_jobs(address=address, detail=True, limit=10000)
    return {job.job_id for job in jobs if str(job.status) in ended and job.job_id}
