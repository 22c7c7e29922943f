"""Jobs on a cluster: submitted exactly once, followed to their end, cancelled cleanly."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from regraft.cluster.local import set_environment
from regraft.errors import ServiceError

_SUBMIT_SECONDS = 60.0


def client(url: str) -> Any:
    """Connect to a cluster's job server.

    Raises:
        ServiceError: If there is none at the URL.
    """
    set_environment()
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(url)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"no Ray job server at {url}: {error}", "check cluster.jobs or the address"
        ) from error


def submit_once(
    url: str,
    job_id: str,
    entrypoint: str,
    *,
    runtime_env: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> bool:
    """Submit a job unless one of that id is there already.

    Args:
        url: The job server.
        job_id: Derived from what the job does, so that a second submission is recognised.
        entrypoint: A shell command.
        runtime_env: Ray's runtime environment.
        metadata: Shown beside the job.

    Returns:
        Whether it was this call that submitted it.

    Raises:
        ServiceError: If the cluster takes no jobs.
    """
    jobs = client(url)
    deadline = time.monotonic() + _SUBMIT_SECONDS
    while True:
        try:
            jobs.submit_job(
                submission_id=job_id,
                entrypoint=entrypoint,
                runtime_env=runtime_env or {},
                metadata=metadata or {},
            )
        except RuntimeError as error:
            if "already exists" in str(error):
                return False
            # A head that has just come up has no agent yet.
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise ServiceError(
                    f"the job server at {url} refused {job_id}: {error}", "see its dashboard"
                ) from error
            time.sleep(0.5)
        else:
            return True


def follow(url: str, job_id: str, say: Callable[[str], None]) -> str:
    """Hand a job's log on, line by line, until it ends.

    Returns:
        `SUCCEEDED`, `FAILED` or `STOPPED`.
    """
    jobs = client(url)

    async def tail() -> None:
        rest = ""
        async for chunk in jobs.tail_job_logs(job_id):
            *lines, rest = (rest + chunk).split("\n")
            for line in lines:
                say(line)
        if rest:
            say(rest)

    asyncio.run(tail())
    while not (status := jobs.get_job_status(job_id)).is_terminal():
        time.sleep(0.2)  # the log closes a moment before the status is written
    return str(status.value)


def cancel(url: str, job_id: str) -> bool:
    """Stop a job; whether there was anything to stop."""
    return bool(client(url).stop_job(job_id))
