"""Asks an OpenAI-compatible endpoint for chat completions: bounded retries, several at once, or timed.

It knows no examples and no metrics. The key stands in the header of each request and nowhere else: not in
an error, not in a log, even where the endpoint says it back.
"""

from __future__ import annotations

import json
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from regraft.errors import ServiceError

if TYPE_CHECKING:
    import httpx

#: One turn: `role` and `content`.
Turn = Mapping[str, str]

#: The longest pause before a request is made again; an endpoint that asks for more is given up.
LONGEST_WAIT_SECONDS = 120.0
#: Where so many requests failed of the endpoint and none had an answer, the others are not made.
GIVE_UP_AFTER = 20
_REASON_CHARACTERS = 500


class Reply(NamedTuple):
    """An answer and what it took. Tokens are as the endpoint counts them, None where it does not say.

    `first_token_seconds` is known of a streamed answer alone; `pieces` are the parts it came in.
    """

    text: str
    prompt_tokens: int | None
    completion_tokens: int | None
    seconds: float
    first_token_seconds: float | None = None
    pieces: int = 1


class NoAnswerError(ServiceError):
    """A request that came to nothing; `everywhere` if others would too: it lies with the endpoint."""

    def __init__(self, problem: str, *, away: bool = False, everywhere: bool = False) -> None:
        super().__init__(problem, away=away)
        self.everywhere = everywhere


class _RefusedError(Exception):
    """One try that came to nothing; `again` if another may do better, after `wait` seconds."""

    def __init__(
        self, problem: str, *, again: bool = False, wait: float | None = None, everywhere: bool = False
    ) -> None:
        super().__init__(problem)
        self.again, self.wait, self.everywhere = again, wait, again or everywhere


def endpoint_url(value: str) -> str:
    """The URL of an endpoint without its last slash, if it is one.

    Raises:
        ValueError: If it is none, or has what belongs elsewhere; the message does not repeat it.
    """
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("is no http(s) URL; write for instance https://api.openai.com/v1")
    if parts.username is not None or parts.password is not None:
        raise ValueError("holds a user name or a password: keep the key in an environment variable")
    if parts.query or parts.fragment:
        raise ValueError("has a query or a fragment: give the address alone, such as https://host/v1")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError("ends in /completions: leave out /chat/completions, which is put behind it")
    return value.rstrip("/")


def read_key(variable: str | None) -> str:
    """The key in an environment variable; empty if there is no variable, or nothing in it."""
    return os.environ.get(variable, "").strip() if variable else ""


class ChatClient:
    """One model at one endpoint. Close it, or use it in a `with`.

    Requests are greedy (temperature 0). What may pass (429, 5xx, no connection, no answer in time) is tried
    again after a pause that doubles, or is as long as the endpoint asks for; any other refusal is final.

    Args:
        url: Up to where `/chat/completions` follows, such as `https://api.openai.com/v1`.
        model: The model's name there.
        key: For the `Authorization` header; none if empty.
        timeout_seconds: Longest silence of the endpoint.
        tries: Requests for one answer, at most.
        pause_seconds: The first pause, and the least that doubles.

    Raises:
        ServiceError: If the key is none that a header takes.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        timeout_seconds: float = 60.0,
        tries: int = 6,
        pause_seconds: float = 1.0,
    ) -> None:
        import httpx

        if not re.fullmatch(r"[!-~]*", key):  # the library would name it in its own error
            raise ServiceError(f"the key for {url} has spaces or characters that no header takes")
        self.url, self.model = url.rstrip("/"), model
        self._key, self._tries, self._pause = key, tries, pause_seconds
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(headers=headers, timeout=timeout_seconds)

    def __enter__(self) -> ChatClient:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def ask(self, turns: Sequence[Turn], *, max_tokens: int, stream: bool = False) -> Reply:
        """One answer; streamed, if the time to its first token is wanted. Times are of the last try alone.

        Raises:
            NoAnswerError: If there is none; the message says why, without the key.
        """
        return self._ask(turns, max_tokens, stream, threading.Event())

    def ask_all(
        self,
        chats: Sequence[Sequence[Turn]],
        *,
        max_tokens: int,
        concurrency: int,
        came: Callable[[], None] = lambda: None,
    ) -> list[Reply | NoAnswerError]:
        """An answer for each chat, in order; where there is none, its error stands.

        Args:
            chats: What to ask.
            max_tokens: Longest answer.
            concurrency: Requests at once.
            came: Called in this thread whenever a request came to its end.
        """
        stop = threading.Event()
        pool = ThreadPoolExecutor(concurrency, thread_name_prefix="chat-client")
        try:
            made = [pool.submit(self._ask, chat, max_tokens, False, stop) for chat in chats]
            answered, in_vain = False, 0
            for future in as_completed(made):
                ended = _outcome(future)
                answered = answered or isinstance(ended, Reply)
                in_vain += isinstance(ended, NoAnswerError) and ended.everywhere
                came()
                if in_vain >= GIVE_UP_AFTER and not answered:
                    break
        finally:
            stop.set()  # who waits to try again does not
            pool.shutdown(cancel_futures=True)
        return [_outcome(future) for future in made]

    def _ask(self, turns: Sequence[Turn], max_tokens: int, stream: bool, stop: threading.Event) -> Reply:
        body: dict[str, Any] = {"model": self.model, "messages": [dict(turn) for turn in turns]}
        body |= {"temperature": 0, "max_tokens": max_tokens}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        tried = 0
        while True:
            try:
                return self._once(body, stream=stream)
            except _RefusedError as refused:
                tried += 1
                pause = min(self._pause * 2 ** (tried - 1) * random.uniform(1, 1.25), LONGEST_WAIT_SECONDS)
                pause = pause if refused.wait is None else refused.wait
                # The key goes before the end is cut off: a part of it would not be found.
                said = str(refused).replace(self._key, "***") if self._key else str(refused)
                problem = said[:_REASON_CHARACTERS] + (f"; tried {tried} times" if tried > 1 else "")
                if pause > LONGEST_WAIT_SECONDS:
                    problem += f"; it asks to wait {pause:.0f} s"
                if (
                    not refused.again
                    or tried >= self._tries
                    or pause > LONGEST_WAIT_SECONDS
                    or stop.wait(pause)
                ):
                    raise NoAnswerError(problem, away=refused.again, everywhere=refused.everywhere) from None

    def _once(self, body: dict[str, Any], *, stream: bool) -> Reply:
        import httpx

        url, began = f"{self.url}/chat/completions", time.perf_counter()
        try:
            with self._http.stream("POST", url, json=body) as answer:
                if answer.status_code != httpx.codes.OK:
                    raise _refusal(answer)
                return _streamed(answer, began) if stream else _whole(answer, began)
        except httpx.TransportError as error:
            problem = f"no answer: {type(error).__name__}: {error}"
            raise _RefusedError(problem, again=True) from None
        except httpx.RequestError as error:
            raise _RefusedError(f"{type(error).__name__}: {error}") from None


def _outcome(future: Future[Reply]) -> Reply | NoAnswerError:
    if future.cancelled():
        return NoAnswerError(f"not asked: {GIVE_UP_AFTER} others failed and none had an answer")
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, NoAnswerError):
        return error
    raise error


def _refusal(answer: httpx.Response) -> _RefusedError:
    """What a status other than 200 says."""
    answer.read()
    try:
        said = _said(answer.json())
    except ValueError:
        said = _said(answer.text)
    status = answer.status_code
    again = status == 429 or status >= 500
    return _RefusedError(
        f"status {status}" + (f": {said}" if said else ""),
        again=again,
        wait=_retry_after(answer) if again else None,
        everywhere=status in {401, 404},  # the key, the model or the address
    )


def _said(told: Any) -> str:
    """The message in an error's body: OpenAI's form, or those that others use; in one line."""
    while isinstance(told, dict):
        told = next((told[name] for name in ("error", "message", "detail") if told.get(name)), "")
    return " ".join(str(told).split())


def _retry_after(answer: httpx.Response) -> float | None:
    """Seconds that the endpoint asks to wait, given so or as a date (RFC 9110, 10.2.3)."""
    asked = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d+)?", asked):
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time())
    except ValueError:
        return None


def _whole(answer: httpx.Response, began: float) -> Reply:
    answer.read()
    seconds = time.perf_counter() - began
    try:
        told = answer.json()
        choice = told["choices"][0]
        text, reason = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError):
        problem = f"status 200, but no chat completion: {' '.join(answer.text.split())}"
        raise _RefusedError(problem) from None
    return Reply(_text(text, reason), *_tokens(told), seconds)


def _streamed(answer: httpx.Response, began: float) -> Reply:
    """Read server-sent events up to `[DONE]`, noting when the first text came."""
    if not answer.headers.get("content-type", "").startswith("text/event-stream"):
        raise _RefusedError("status 200, but the answer was not streamed")
    texts: list[str] = []
    first, reason, done = None, None, False
    counts: tuple[int | None, int | None] = (None, None)
    for line in answer.iter_lines():
        if not line.startswith("data:"):
            continue
        if (data := line[5:].strip()) == "[DONE]":
            done = True
            continue
        try:
            told = json.loads(data)
            if told.get("error"):
                raise _RefusedError(f"the answer broke off: {_said(told)}")
            for choice in told.get("choices") or ():
                if text := (choice.get("delta") or {}).get("content"):
                    first = first or time.perf_counter()
                    texts.append(str(text))
                reason = choice.get("finish_reason") or reason
            counts = _tokens(told) if told.get("usage") else counts
        except (ValueError, TypeError, AttributeError):
            raise _RefusedError(f"status 200, but no part of a chat completion: {data}") from None
    ended = time.perf_counter()
    if reason is None and not done:
        raise _RefusedError("the stream ended before the answer did", again=True)
    text = _text("".join(texts), reason)
    return Reply(text, *counts, ended - began, (first or ended) - began, len(texts))


def _text(text: Any, reason: Any) -> str:
    """The answer, stripped as those of loaded models are; one that is empty because it was cut is none."""
    if isinstance(text, str) and (text.strip() or reason == "stop"):
        return text.strip()
    problem = f"the answer has no text (finish_reason {reason})"
    if reason == "length":
        problem += ": a model that reasons first needs a higher evaluate.max_new_tokens"
    raise _RefusedError(problem)


def _tokens(told: dict[str, Any]) -> tuple[int | None, int | None]:
    usage = told.get("usage") or {}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    return prompt if isinstance(prompt, int) else None, completion if isinstance(completion, int) else None
