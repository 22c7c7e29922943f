"""Start, check and stop an MLflow server of our own on SQLite."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil

from regraft.errors import ServiceError

START_SECONDS = 90
STOP_SECONDS = 10


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
    port = _free_port(host, port)
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
        _wait_healthy(process, url, log)
    except BaseException:
        stop_server(process.pid)
        raise
    return Server(process.pid, url)


def stop_server(pid: int) -> None:
    """Stop a server and all of its workers; does nothing if it is gone already.

    Args:
        pid: The process id that `start_server` gave.
    """
    members = _group(pid)
    # The system gives process ids out again: one that is not MLflow's any more is somebody else's.
    if not any("mlflow" in part for p in members for part in _command(p)):
        return
    _signal_group(pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(members, timeout=STOP_SECONDS)
    if alive:
        _signal_group(pid, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=STOP_SECONDS)


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


def _free_port(host: str, port: int) -> int:
    """Check that a port can be listened on, or pick one for 0."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            # As the server will: a port whose last connections are still winding down is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServiceError(
                f"port {port} on {host} is already in use",
                "stop what listens there, or set tracking.port to another port (0 picks a free one)",
            ) from error
        raise ServiceError(
            f"cannot listen on {host}:{port}: {error.strerror}", "mend tracking.host and tracking.port"
        ) from error


def _wait_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if not _unhealthy(url, timeout=2):
            return
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        problem = f"the MLflow server ended with status {process.returncode}"
        break
    else:
        problem = f"the MLflow server did not answer at {url} within {START_SECONDS} s"
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise ServiceError(f"{problem}; the end of {log}:\n{last}", "mend what the log says and start again")


def _group(pid: int) -> list[psutil.Process]:
    members = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid:
                members.append(process)
        except OSError:  # ended since
            continue
    return members


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _signal_group(pid: int, number: signal.Signals) -> None:
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return
