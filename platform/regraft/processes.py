"""Local services: a port to listen on, waiting until one answers, and ending it with all that it started."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from regraft.errors import ServiceError

_END_SECONDS = 15.0
#: Settings of glibc: memory comes in huge pages, where the system gives them to those who ask, and from one
#: arena, as the arenas of threads are in small pages. Read by a process when it starts, ignored elsewhere.
_TUNABLES, _LARGE_PAGES, _ARENAS = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1", "MALLOC_ARENA_MAX"


def with_large_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment for a process that answers with a model on a CPU.

    A decoding step reads all weights. From huge pages SmolLM2-135M said 7 % more tokens a second to one
    client, and to 32 as many as before (one core with AMX, Linux 6 with `transparent_hugepage` at `madvise`).
    To compare, run `benchmarks/serving.py --parts engine --streams 1` with
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0`.

    Args:
        environment: What it would get; settings of glibc that somebody made are kept.
    """
    made = [part for part in environment.get(_TUNABLES, "").split(":") if part]
    if not any(part.startswith("glibc.malloc.hugetlb=") for part in made):
        made.append(_LARGE_PAGES)
    return {**environment, _TUNABLES: ":".join(made), _ARENAS: "1"}


def free_port(port: int, field: str, host: str = "127.0.0.1") -> int:
    """The port if it is free, or any free one for 0.

    Args:
        port: Which one, or 0.
        field: The key of the configuration that names it, for the message.
        host: The address it is wanted on.

    Raises:
        ServiceError: If it is in use, or the address is none of this machine's.
    """
    # Below the range that the system hands out by itself: a port from there may be another process's by the
    # time the service opens it.
    for candidate in [port] if port else random.sample(range(20000, 32000), 50):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, candidate, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                # As servers do: a port whose last connections are still winding down is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
                return candidate
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ServiceError(
                    f"cannot listen on {host}:{candidate}: {error.strerror}",
                    f"mend {field} and the host beside it",
                ) from error
    raise ServiceError(
        f"port {port or 'of any number tried'} on {host} is already in use",
        f"stop what listens there, or set {field} to another port (0 picks a free one)",
    )


def wait_until_it_answers(
    name: str,
    process: subprocess.Popen[bytes],
    url: str,
    log: Path,
    problem: Callable[[], str],
    seconds: float,
) -> None:
    """Wait for a service that was just started.

    Args:
        name: What it is called in a message.
        process: Its process.
        url: Where it will answer, for a message.
        log: Where it writes.
        problem: What is still wrong with it; empty once it answers.
        seconds: How long to wait.

    Raises:
        ServiceError: If it ends or does not answer in time, with the end of its log.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not problem():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
            what = f"{name} ended with status {process.returncode} while starting"
            break
    else:
        what = f"{name} did not answer at {url} within {seconds:.0f} s"
    last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    raise ServiceError(f"{what}; the end of {log}:\n{last}", "mend what the log says and start again")


def end_process(pid: int, named: str = "") -> None:
    """Ask a service to end, wait for it and all that it started, and kill what is left after 15 s.

    Args:
        pid: The process that was started, the leader of its own group.
        named: A word that its command line holds, for a caller who knows no more than the id. The system
            gives ids out again: a process without the word is somebody else's, and is left alone.
    """
    try:
        head = psutil.Process(pid)
        family = {head, *head.children(recursive=True)}
    except psutil.NoSuchProcess:
        head, family = None, set()
    # A worker whose parent died first is a child of init, but still of the group.
    family |= set(_group(pid))
    # One that is about to end has no command line any more.
    if named and not any(named in part for p in family for part in _command(p)):
        return
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        # The head ends its own in order; without one, nobody else will.
        if head is not None:
            head.send_signal(signal.SIGTERM)
        else:
            os.killpg(pid, signal.SIGTERM)
    _, alive = psutil.wait_procs(list(family), timeout=_END_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


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
