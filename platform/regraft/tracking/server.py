"""Start, check and stop an MLflow server of our own on SQLite."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from regraft.errors import ServiceError
from regraft.processes import end_process, free_port, wait_until_it_answers

START_SECONDS = 90


@dataclass(frozen=True)
class Server:
    """A running server: the leader of its process group, and where it answers."""

    pid: int
    url: str


def start_server(folder: Path, host: str, port: int) -> Server:
    """Start an MLflow server that outlives this process, and wait until it answers.

    Args:
        folder: Where `mlflow.db`, `artifacts/` and `server.log` are kept; made if missing.
        host: Address to listen on.
        port: Port to listen on; 0 picks a free one.

    Returns:
        The server's process id and URL.

    Raises:
        ServiceError: If the port is taken, or the server does not come up. Nothing is left running then.
    """
    port = free_port(port, "tracking.port", host)
    folder = folder.resolve()
    (folder / "artifacts").mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        host,
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    # The job runner is for MLflow's own GenAI evaluations: without it the server takes a fifth of the memory.
    environment = os.environ | {
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }
    # The folder is the working directory, so that no `mlflow` or `types` module lying about is imported.
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
        )
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{reachable}:{port}"
    try:
        wait_until_it_answers(
            "the MLflow server", process, url, log, lambda: _unhealthy(url, timeout=2), START_SECONDS
        )
    except BaseException:
        stop_server(process.pid)
        raise
    return Server(process.pid, url)


def stop_server(pid: int) -> None:
    """Stop a server and all of its workers; does nothing if it is gone already.

    Args:
        pid: The process id that `start_server` gave.
    """
    end_process(pid, named="mlflow")


def check_server(url: str) -> None:
    """See that an MLflow server answers.

    Raises:
        ServiceError: If nothing healthy answers at `url` within 5 seconds.
    """
    problem = _unhealthy(url, timeout=5)
    if problem:
        raise ServiceError(
            f"no MLflow server answers at {url}: {problem}",
            "start it, or mend tracking.uri; without tracking.uri Regraft starts a server of its own",
        )


def _unhealthy(url: str, timeout: float) -> str:
    """Why the server is not healthy; empty if it is."""
    if not url.startswith(("http://", "https://")):
        return "it is not an http(s) URL"
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=timeout):
            return ""
    except OSError as error:  # URLError, HTTPError and timeouts all are
        return str(getattr(error, "reason", error))
    except Exception as error:  # something else than HTTP listens there
        return f"{type(error).__name__}: {error}"
