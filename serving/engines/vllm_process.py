"""vLLM's server as a child of this process, in an environment of its own.

This module starts it, asks it and ends it; what a request or an adapter is, it does not know.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.errors import ServiceError
from regraft.processes import end_process, free_port, wait_until_it_answers, with_large_pages
from serving.engines.base import EngineClosedError, EngineError

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

#: Loading an adapter reads its file; so long may that take, in seconds.
_ADMIN_SECONDS = 120.0
#: A child outlives a parent that is killed. This one hears the pipe of its standard input close, which no
#: parent can prevent, and ends in order.
_CHILD = """
import os, runpy, signal, threading
def watch():
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
if __name__ == "__main__":
    threading.Thread(target=watch, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
"""
#: What the server gets of this process's environment: it needs no secrets, and this project's packages are
#: not the ones it was built for.
_PASSED = ("PATH", "HOME", "USER", "TMPDIR", "TZ", "LANG", "LD_LIBRARY_PATH", "CC", "CXX")
_PASSED_BEGIN = ("LC_", "CUDA_", "NVIDIA_", "NCCL_", "VLLM_CPU_", "OMP_", "XDG_", "TORCHINDUCTOR_", "TRITON_")


class Bound(NamedTuple):
    """What the server may take of the machine.

    Attributes:
        threads: Of a CPU.
        device: "cpu" or "cuda".
        cores: Cores to pin its threads to, as vLLM takes them; a replica that has its share needs none.
    """

    threads: int
    device: str
    cores: str = "nobind"


class VllmProcess:
    """A running server.

    Args:
        python: The interpreter that has vLLM.
        arguments: Of vLLM's server, without those that say where to listen.
        bound: What it may take of the machine.
        log: File that it writes to, added to if it is there.
        start_seconds: How long it may take until it is ready.
        died: Called, in a thread of its own, when it ends without having been asked to.

    Raises:
        ServiceError: If it does not come up; the message ends with what it last wrote.
    """

    def __init__(
        self,
        python: Path,
        arguments: Sequence[str],
        bound: Bound,
        log: Path,
        start_seconds: float,
        died: Callable[[], None],
    ) -> None:
        if not (python.is_file() and os.access(python, os.X_OK)):
            raise ServiceError(
                f"serve.vllm.python: {python} is no program", "name the interpreter of vLLM's environment"
            )
        self.log, self._died = log, died
        self._key = secrets.token_urlsafe(32)
        port = free_port(0, "serve.vllm")
        self.url = f"http://127.0.0.1:{port}"
        self._ended = threading.Event()
        self._asked_to_end = False
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [str(python), "-P", "-c", _CHILD, "--host", "127.0.0.1", "--port", str(port), *arguments]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=with_large_pages(_environment(bound)) | {"VLLM_API_KEY": self._key},
                cwd=log.parent,
                start_new_session=True,
            )
        try:
            wait_until_it_answers("vLLM", self._process, self.url, log, self._problem, start_seconds)
        except BaseException:
            self._end()
            raise
        threading.Thread(target=self._watch, name="regraft-vllm", daemon=True).start()

    @property
    def pid(self) -> int:
        """The process id; also that of its group."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def client(self) -> httpx.AsyncClient:
        """For one request: a connection of its own is closed with it, and belongs to no other event loop."""
        import httpx

        # An answer takes as long as it takes; that the server has died shows on the connection.
        transport = httpx.AsyncHTTPTransport(verify=False, trust_env=False)
        return httpx.AsyncClient(
            transport=transport, base_url=self.url, headers=self._headers, timeout=None, trust_env=False
        )

    def post(self, path: str, body: dict[str, Any]) -> None:
        """Ask for something that is done when it answers.

        Raises:
            EngineError: If the server refuses.
            EngineClosedError: If it has ended.
        """
        import httpx

        try:
            with httpx.Client(trust_env=False, headers=self._headers, timeout=_ADMIN_SECONDS) as client:
                answer = client.post(f"{self.url}{path}", json=body)
        except httpx.TransportError as error:
            raise EngineClosedError(f"vLLM does not answer: {type(error).__name__}") from error
        if answer.status_code != 200:
            raise error_of(answer.status_code, answer.content)

    def close(self) -> None:
        """End it with all that it started, and wait until it has."""
        self._asked_to_end = True
        self._end()
        self._ended.wait()

    @property
    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._key}"}

    def _problem(self) -> str:
        import httpx

        try:
            status = httpx.get(f"{self.url}/health", timeout=2, trust_env=False).status_code
        except httpx.TransportError as error:
            return type(error).__name__
        return "" if status == 200 else f"status {status}"

    def _watch(self) -> None:
        self._process.wait()
        if not self._asked_to_end:
            logger.error("vLLM ended with status %s; see %s", self._process.returncode, self.log)
            self._died()
            # What it had started is still there, hears no order to end without it, and has nothing to save.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            end_process(self.pid)
        self._ended.set()

    def _end(self) -> None:
        end_process(self.pid)
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()


def error_of(status: int, body: bytes) -> EngineError:
    """What an answer that is no success says, in one line."""
    try:
        error = json.loads(body)["error"]
        said = str(error["message"]) if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        said = body[:200].decode("utf-8", errors="replace")
    line = f"vLLM answered with status {status}: {said.strip().partition(chr(10))[0][:500]}"
    # Its own word for an engine process that has died: the server that said it ends soon after.
    return EngineClosedError(line) if "EngineCore encountered" in said else EngineError(line)


def _environment(bound: Bound) -> dict[str, str]:
    passed = {k: v for k, v in os.environ.items() if k in _PASSED or k.startswith(_PASSED_BEGIN)}
    return {
        # Left to itself, every server of a machine pins its threads to the same cores.
        "VLLM_CPU_OMP_THREADS_BIND": bound.cores,
        **passed,
        **({"OMP_NUM_THREADS": str(bound.threads)} if bound.device == "cpu" else {}),
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "true",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
