"""Asks the judge's endpoint from several threads, and keeps verdicts on disk.

Knows nothing of rubrics: a question is a text, and a verdict is whatever the caller read in the answer.
"""

from __future__ import annotations

import fcntl
import logging
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from regraft.chat_client import ChatClient, NoAnswerError, Reply, read_key
from regraft.errors import ServiceError
from regraft.packages import home

#: How often a question is asked at most.
TRIES = 4
#: After so many questions in a row that failed for what others would fail for too, no more are asked.
GIVES_UP = 3
_log = logging.getLogger(__name__)


class Endpoint:
    """Where the judge is asked; several threads may ask at once.

    Args:
        url: The base, such as https://host/v1.
        model: Which of its models.
        key_env: The environment variable that holds the key; None for an endpoint without one. It is looked
            up at the first question: who finds all verdicts kept needs no key.
        timeout_s: How long to wait for an answer, in seconds.
        max_tokens: The most an answer may have.
    """

    def __init__(self, url: str, model: str, key_env: str | None, timeout_s: float, max_tokens: int) -> None:
        self._url, self._model, self._timeout_s = url, model, timeout_s
        self._key_env, self._key, self._max_tokens = key_env, "", max_tokens
        self._client: ChatClient | None = None
        self._lock = threading.Lock()
        self._failed, self._last = 0, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.close()

    def ask(self, question: str) -> Reply:
        """Ask a question as the one user turn of a chat: some models take no system turn.

        Raises:
            ServiceError: If the endpoint gives no answer, or has given none to the last few questions.
        """
        with self._lock:
            if self._failed >= GIVES_UP:
                raise ServiceError(f"not asked, as {GIVES_UP} questions in a row failed: {self._last}")
            self._client = client = self._client or self._open()
        try:
            reply = client.ask([{"role": "user", "content": question}], max_tokens=self._max_tokens)
        except NoAnswerError as error:
            if error.everywhere:
                with self._lock:
                    self._failed, self._last = self._failed + 1, error.problem
            raise
        with self._lock:
            self._failed = 0
        # A judge that says the key back must not bring it into a verdict.
        return reply._replace(text=reply.text.replace(self._key, "***")) if self._key else reply

    def cut(self, reply: Reply) -> bool:
        """Whether an answer used up its tokens."""
        return reply.completion_tokens is not None and reply.completion_tokens >= self._max_tokens

    def _open(self) -> ChatClient:
        self._key = read_key(self._key_env)
        if self._key_env is not None and not self._key:
            raise ServiceError(
                f"the environment variable {self._key_env} is not set",
                "set it wherever trials run, or mend api_key_env of the judge",
            )
        return ChatClient(self._url, self._model, key=self._key, timeout_seconds=self._timeout_s, tries=TRIES)


class Verdict(BaseModel):
    """What an answer of the judge was read as, and the tokens it took; None where nobody told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: float
    why: str
    prompt_tokens: int | None
    completion_tokens: int | None


def kept(key: str, make: Callable[[], Verdict]) -> tuple[Verdict, bool]:
    """The verdict kept under a key, or a new one, kept from now on; and whether it is new.

    Who wants the same meanwhile waits for it, in this process or another: no question is paid twice.

    Args:
        key: Hexadecimal hash of all that decides the verdict.
        make: Gives the verdict; if it raises, nothing is kept.
    """
    file = home() / "judge" / key[:2] / f"{key}.json"
    if found := _read(file):
        return found, False
    file.parent.mkdir(parents=True, exist_ok=True)
    # One lock for a few keys: a file for each would lie about for ever.
    with (file.parent / f".{key[:3]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also if this process dies
        if found := _read(file):
            return found, False
        verdict = make()
        scratch = file.with_name(f".{key}.{uuid.uuid4().hex}.part")
        scratch.write_text(verdict.model_dump_json(), encoding="utf-8")
        scratch.replace(file)
    return verdict, True


def _read(file: Path) -> Verdict | None:
    try:
        return Verdict.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError:
        _log.warning("%s is no verdict; the judge is asked again", file)
        return None
