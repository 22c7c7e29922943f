"""A local Ray cluster of Regraft's own, and joining one that is there."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from regraft.errors import ServiceError
from regraft.processes import end_process, free_port, wait_until_it_answers

_START_SECONDS = 90.0

#: Ray reports usage to its makers and Tune writes three files a trial unless told otherwise. Tune starts one
#: actor at a time for a searcher (the conductor bounds what is handed out) and keeps a state that nobody
#: restores. Train's reports are throttled by its health interval: at the default of 2 s, ten take 20 s.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_MAX_PENDING_TRIALS_PG": "64",
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Each thread's own arena keeps what it freed. (Trimming early as well doubled a trial's time.)
    "MALLOC_ARENA_MAX": "2",
}


class LocalRay(NamedTuple):
    """A running local cluster."""

    pid: int
    address: str
    dashboard_url: str


def set_environment() -> None:
    """Set Ray's environment for this process and what it starts; what the user has set stays."""
    for key, value in RAY_ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def start_local_ray(
    folder: Path,
    *,
    num_cpus: int | None,
    num_gpus: int | None,
    dashboard_port: int,
    environment: dict[str, str],
) -> LocalRay:
    """Start a head node that outlives this process, on loopback, with its dashboard and job server.

    Args:
        folder: For the log.
        num_cpus: Cores to offer; all if None.
        num_gpus: GPUs to offer; those found if None.
        dashboard_port: Port of dashboard and job server; 0 picks a free one.
        environment: More variables for every worker.

    Raises:
        ServiceError: If a port is in use or Ray does not come up; nothing is left running.
    """
    set_environment()
    dashboard_port = free_port(dashboard_port, "cluster.dashboard_port")
    gcs_port = free_port(0, "")
    command = [
        sys.executable, "-c", "from ray.scripts.scripts import main; main()", "start", "--head", "--block",
        "--node-ip-address=127.0.0.1", f"--port={gcs_port}", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard_port}",
        f"--ray-client-server-port={free_port(0, '')}",
        f"--dashboard-agent-listen-port={free_port(0, '')}", "--object-store-memory=300000000",
        "--disable-usage-stats",
    ]  # fmt: skip
    if num_cpus is not None:
        command.append(f"--num-cpus={num_cpus}")
    if num_gpus is not None:
        command.append(f"--num-gpus={num_gpus}")
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "ray.log"
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            # Jobs say `python` and must find this environment's.
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
                **environment,
            },
        )
    url = f"http://127.0.0.1:{dashboard_port}"
    try:
        wait_until_it_answers(
            "the local Ray cluster", process, url, log, lambda: _no_jobs_api(url), _START_SECONDS
        )
    except BaseException:
        stop_local_ray(process.pid)
        raise
    return LocalRay(process.pid, f"127.0.0.1:{gcs_port}", url)


def _no_jobs_api(url: str) -> str:
    """Why Ray's job server takes no jobs yet; empty once it does."""
    try:
        answer = httpx.get(f"{url}/api/jobs/", timeout=5)
    except httpx.HTTPError as error:
        return str(error) or type(error).__name__
    return "" if answer.status_code == httpx.codes.OK else f"status {answer.status_code}"


def stop_local_ray(pid: int) -> None:
    """End a cluster that `start_local_ray` started: its own processes alone, whatever else runs Ray here."""
    end_process(pid, named="ray")


def join(address: str) -> None:
    """Connect this process to a cluster.

    Raises:
        ServiceError: If there is none at the address.
    """
    set_environment()
    import ray

    if ray.is_initialized():
        return
    if address != "auto" and not address.startswith("ray://"):
        _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ServiceError(
            f"no Ray cluster at {address}: {error}", "check cluster.address, or leave it out"
        ) from error


def _check_reachable(address: str) -> None:
    """Fail at once where Ray itself would try for half a minute."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return
    except (OSError, ValueError) as error:
        raise ServiceError(
            f"cluster.address: no Ray cluster answers at {address}: {error}",
            "start it, correct the address (host:port of the head's GCS), or leave cluster.address out",
        ) from error


def summary() -> dict[str, Any]:
    """What the connected cluster has, for a line of text."""
    import ray

    have = ray.cluster_resources()
    return {"nodes": len(ray.nodes()), "CPU": have.get("CPU", 0), "GPU": have.get("GPU", 0)}
