"""vLLM as an engine: versions on a server that they share, each an adapter or the base alone.

Token ids go to the server and come back from it: chats are rendered, and answers become text and stop, by the
same code as in this project's own engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regraft.methods import Method
from regraft.methods.base import DTypeName
from regraft.serve_sections import VllmSection
from serving.engines.base import (
    EngineClosedError,
    EngineError,
    EngineLimits,
    GenerationRequest,
    QueueFullError,
    Stream,
)
from serving.engines.rows import OwnEngine, Row
from serving.engines.vllm_process import Bound, VllmProcess, error_of
from serving.engines.vllm_prompts import VirtualTokens
from serving.engines.vllm_support import NotForVllmError, Takes, require_plain_lora, vllm_serves, vllm_takes
from serving.engines.vllm_wire import body, choices, take

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: What the server calls its base model.
BASE = "base"
#: Names of adapters: the server would take any text, a path too.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class VllmServer:
    """A vLLM server with one model, on which versions are loaded and answer together.

    Slow to start, so meant for a thread.

    Args:
        model: Folder of the base model, or of a full fine-tune.
        tokenizer_folder: Folder of the base's tokenizer.
        section: Which interpreter, and its settings.
        limits: How much to take on, for all versions together.
        dtype: Type of the weights.
        device: "cpu" or "cuda".
        log: File that the server writes to.
        takes: What its versions add to the model.
        died: Called, in some thread, if the server ends by itself; those in flight have failed by then.

    Raises:
        ServiceError: If it does not come up.
    """

    def __init__(
        self,
        model: Path,
        tokenizer_folder: Path,
        section: VllmSection,
        limits: EngineLimits,
        *,
        dtype: DTypeName,
        device: str,
        log: Path,
        takes: Takes,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        from regraft.models import load_tokenizer

        if section.python is None:
            raise NotForVllmError("serve.vllm.python names no interpreter")
        self.model, self.limits, self.dtype, self.section = model, limits, dtype, section
        self.tokenizer = load_tokenizer(tokenizer_folder)
        self.encoding = threading.Lock()
        self._died = died
        self._lock = threading.Lock()
        self._flying: dict[Row, asyncio.Task[None]] = {}
        self._loading = threading.Lock()
        self._names: dict[str, int] = {}
        self._closed = False
        config = _configuration(model)
        self.vocabulary = int(config["vocab_size"])
        self.context_length = int(config.get("max_position_embeddings", 4096))
        self.end_ids = _end_ids(model, self.tokenizer)
        self.takes = takes
        arguments = [f"--model={model}", f"--tokenizer={tokenizer_folder}", f"--served-model-name={BASE}"]
        # The model's own settings of sampling would change what a request asks for.
        arguments += [f"--dtype={dtype}", f"--max-num-seqs={limits.max_batch}", "--generation-config=vllm"]
        arguments += ["--disable-uvicorn-access-log"]
        if device == "cpu":
            arguments += [f"--kv-cache-memory-bytes={int(section.kv_cache_gib * 2**30)}"]
        else:
            arguments += [f"--gpu-memory-utilization={section.gpu_memory_utilization}"]
        if takes == "lora":
            arguments += ["--enable-lora", f"--max-lora-rank={section.max_lora_rank}"]
            arguments += [f"--max-loras={section.max_loras}"]
        if takes == "embeddings":
            arguments += ["--enable-prompt-embeds"]
        arguments += section.arguments
        bound = Bound(limits.threads, device)
        self.process = VllmProcess(section.python, arguments, bound, log, section.start_seconds, self._fell)

    @property
    def alive(self) -> bool:
        """Whether it answers requests."""
        return not self._closed and self.process.alive

    def load(self, name: str, folder: Path) -> None:
        """Load a LoRA adapter under a name that never means another one; undone by as many `unload`s.

        Args:
            name: The id of the version's logged model.
            folder: Its files, which must stay: the server reads an adapter again that it had put out.

        Raises:
            ValueError: If the name is none for an adapter.
            EngineError: If the server refuses.
        """
        if not _NAME.fullmatch(name) or name == BASE:
            raise ValueError(f"{name!r} is no name for an adapter: it takes {_NAME.pattern}, and not {BASE}")
        with self._loading:
            if not self._names.get(name):
                body = {"lora_name": name, "lora_path": str(folder.resolve())}
                self.process.post("/v1/load_lora_adapter", body)
            self._names[name] = self._names.get(name, 0) + 1

    def unload(self, name: str) -> None:
        """Let an adapter go."""
        with self._loading:
            self._names[name] -= 1
            if not self._names[name] and self.alive:
                with contextlib.suppress(EngineClosedError):  # what has ended holds nothing
                    self.process.post("/v1/unload_lora_adapter", {"lora_name": name})

    def submit(self, request: GenerationRequest, name: str, virtual: VirtualTokens | None) -> Row:
        """Take on a request; see `Engine.submit`."""
        row = Row(request, self.tokenizer, self._cancel)
        with self._lock:
            if not self.alive:
                raise EngineClosedError("vLLM has ended")
            busy = sum(not row.done for row in self._flying)
            if busy >= self.limits.max_batch + self.limits.max_queued:
                raise QueueFullError(f"{busy} requests are being answered or wait; try again later")
            task = asyncio.get_running_loop().create_task(self._answer(row, name, virtual))
            self._flying[row] = task
        task.add_done_callback(lambda _: self._landed(row))
        return row

    def fail(self, rows: set[Row], error: EngineError) -> None:
        """End requests with an error; from any thread."""
        for row in rows:
            row.fail(error)
            self._cancel(row)

    def close(self) -> None:
        """Fail what is in flight and end the server; blocks until it has."""
        with self._lock:
            self._closed = True
            rows = set(self._flying)
        self.fail(rows, EngineClosedError("this model version was unloaded"))
        self.process.close()

    def _fell(self) -> None:
        with self._lock:
            self._closed = True
            rows = set(self._flying)
        self.fail(rows, EngineClosedError("vLLM has ended"))
        self._died()

    def _cancel(self, row: Row) -> None:
        row.done = True
        task = self._flying.get(row)
        if task is not None:
            try:
                task.get_loop().call_soon_threadsafe(task.cancel)
            except RuntimeError:  # the loop has closed, and its tasks with it
                self._landed(row)

    def _landed(self, row: Row) -> None:
        with self._lock:
            self._flying.pop(row, None)

    async def _answer(self, row: Row, name: str, virtual: VirtualTokens | None) -> None:
        import httpx

        try:
            asked = body(row.request, name, self.end_ids)
            if virtual is not None:
                encoded = await asyncio.to_thread(virtual.before, row.request.prompt_ids)
                asked |= {"prompt": None, "prompt_embeds": encoded}
            # Leaving the connection before its end is how vLLM hears that nobody wants the rest.
            async with (
                self.process.client() as client,
                client.stream("POST", "/v1/completions", json=asked) as answer,
            ):
                if answer.status_code != 200:
                    raise error_of(answer.status_code, await answer.aread())  # noqa: TRY301
                async for choice in choices(answer.aiter_lines()):
                    take(row, choice, self.end_ids, self.vocabulary)
                    if row.done:
                        return
            raise EngineError("vLLM ended its answer without saying why")  # noqa: TRY301
        except httpx.TransportError as error:
            row.fail(EngineClosedError(f"vLLM has ended: {type(error).__name__}"))
        except EngineError as error:
            row.fail(error)
        except Exception as error:
            row.fail(EngineError(f"generation failed: {type(error).__name__}: {error}"))


class VllmEngine(OwnEngine):
    """One version on a server: the server's own model, an adapter, or virtual tokens before its prompts.

    Args:
        server: That it shares.
        method: The version's.
        name: The id of its logged model.
        folder: Its files.
        release: Called when the version is unloaded.

    Raises:
        NotForVllmError: If vLLM cannot answer as the version was evaluated.
        EngineError: If the server refuses the adapter.
    """

    def __init__(
        self,
        server: VllmServer,
        method: Method,
        name: str,
        folder: Path,
        release: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(server.tokenizer, server.encoding)
        why = vllm_serves(method)
        if why is not None:
            raise NotForVllmError(why)
        self._server, self._release = server, release
        self._name, self._virtual = BASE, None
        self._rows: set[Row] = set()
        self._closed = False
        takes = vllm_takes(method)
        if takes != server.takes and (takes, server.takes) != ("plain", "embeddings"):
            raise NotForVllmError(f"it takes a server for {takes}, and this one is for {server.takes}")
        if takes == "lora":
            require_plain_lora(folder, server.section.max_lora_rank)
            server.load(name, folder)
            self._name = name
        elif takes == "embeddings":
            self._virtual = VirtualTokens(folder, server.model, server.dtype)
        self.vocabulary = server.vocabulary
        self.context_length = server.context_length - (self._virtual.count if self._virtual else 0)

    @property
    def alive(self) -> bool:
        """Whether its server runs."""
        return not self._closed and self._server.alive

    def submit(self, request: GenerationRequest) -> Stream:
        """Take on a request; see `Engine.submit`."""
        if self._closed:
            raise EngineClosedError("this model version is being unloaded")
        self._rows = {row for row in self._rows if not row.done}
        row = self._server.submit(request, self._name, self._virtual)
        self._rows.add(row)
        return row

    def close(self) -> None:
        """Fail what is in flight of this version; the server stays for others."""
        if self._closed:
            return
        self._closed = True
        self._server.fail(set(self._rows), EngineClosedError("this model version was unloaded"))
        try:
            if self._name != BASE:
                self._server.unload(self._name)
        finally:
            self._release()


def _configuration(model: Path) -> dict[str, Any]:
    """What `config.json` says of the part that reads text."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config.get("text_config") or config


def _end_ids(model: Path, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """As `regraft.evals.generation.end_ids`, of a model that is not in this process."""
    file = model / "generation_config.json"
    config = json.loads((file if file.is_file() else model / "config.json").read_text())
    own = config.get("eos_token_id")
    found = {own} if isinstance(own, int) else set(own or ())
    return frozenset(found | {int(tokenizer.eos_token_id)})
