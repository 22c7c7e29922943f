"""What clients lose when the champion changes under load, and when processes are killed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

from serving_endpoint import Endpoint, Registered, answers, loading, running
from serving_http import TURNS


def switch(
    model: Registered, *, rate: float, seconds: float, say: Callable[[str], None]
) -> dict[str, float | int]:
    """Move the champion's alias there and back while requests arrive at a steady rate.

    Args:
        model: With two versions that answer differently.
        rate: Requests a second, whole answers and streams by turns.
        seconds: For how long; the alias moves after a third and after two.
        say: Told the figures.

    Returns:
        `switch_requests`; `failed_requests_on_switch`, those without a whole answer;
        `mixed_answers_on_switch`, those whose text is not that of the version they name; and `converged_s`,
        the longest time from the call that moved the alias until the last request was sent that the old
        version answered. The first move loads a version, the second finds it loaded.
    """
    one, two = model.versions
    with running(model.settings()) as endpoint:
        bodies = [_body(model.name, stream=False), _body(model.name, stream=True)]
        begun = time.monotonic()
        load = loading({"url": endpoint.url, "bodies": bodies, "rate": rate, "seconds": seconds})
        moves: list[tuple[float, str]] = []
        for part, (old, new) in enumerate(((one, two), (two, one)), start=1):
            time.sleep(max(0.0, begun + seconds * part / 3 - time.monotonic()))
            moves.append((time.monotonic(), f"{model.name}/{old}"))
            model.registry.set_alias(model.name, "champion", new)
        told = answers(load)
        texts = {f"{model.name}/{n}": _text(endpoint, f"{model.name}/{n}") for n in model.versions}
    if len(set(texts.values())) == 1:
        raise RuntimeError("both versions say the same: mixed answers would not show")
    failed = [t for t in told if not t["id"]]
    mixed = [t for t in told if t["id"] and t["text"] != texts.get(t["version"])]
    converged = []
    for number, (when, old) in enumerate(moves):
        until = moves[number + 1][0] if number + 1 < len(moves) else float("inf")
        late = [t["begun"] - when for t in told if t["version"] == old and when <= t["begun"] < until]
        converged.append(max(late, default=0.0))
    slow = sorted(t["seconds"] for t in told)[int(0.95 * len(told))]
    say(
        f"switch: {len(told)} requests at {rate:g} a second, p95 {1000 * slow:.0f} ms, {len(failed)} failed, "
        f"{len(mixed)} mixed, converged in {', '.join(f'{c:.2f}' for c in converged)} s"
    )
    for problem in failed[:3]:
        say(f"  {problem['status']}: {problem['error']}")
    served = {t["version"] for t in told if t["id"]}
    if served != set(texts):
        raise RuntimeError(f"the alias moved, but only {served} answered")
    return {
        "switch_requests": len(told),
        "failed_requests_on_switch": len(failed),
        "mixed_answers_on_switch": len(mixed),
        "converged_s": round(max(converged), 2),
    }


def kill(model: Registered, *, rounds: int, say: Callable[[str], None]) -> dict[str, int]:
    """Kill the gateway, and then everything, at random moments while clients ask.

    Args:
        model: What answers.
        rounds: Endpoints that are put up, killed twice each.
        say: Told the figures.

    Returns:
        `answered_before_kill`, the answers that clients had got whole; and `captures_lost_on_kill`, those of
        them that are not in the spool.
    """
    from regraft.data.captures import CaptureStore

    answered = lost = 0
    for number in range(rounds):
        with running(model.settings()) as endpoint:
            bodies = [_body(model.name, stream=False), _body(model.name, stream=True)]
            load = loading({"url": endpoint.url, "bodies": bodies, "clients": 8, "timeout_s": 10})
            time.sleep(random.uniform(1, 2))
            gateway = endpoint.actor("Gateway")
            gateway.kill()
            killed = time.monotonic()
            while _gateway(endpoint) in (None, gateway.pid):
                time.sleep(0.05)
            endpoint.wait()
            _text(endpoint, model.name)
            back = time.monotonic() - killed
            time.sleep(random.uniform(1, 2))
            endpoint.kill()
        time.sleep(0.2)  # what had come whole by then is told
        load.terminate()
        told = answers(load)
        ids = {t["id"] for t in told if t["id"]}
        kept = {exchange.id for exchange in CaptureStore(endpoint.settings.captures).read()}
        after = sum(1 for t in told if t["id"] and t["begun"] + t["seconds"] > killed + back)
        answered, lost = answered + len(ids), lost + len(ids - kept)
        say(
            f"kill {number}: {len(ids)} whole answers, {len(ids - kept)} not captured; the gateway was back "
            f"after {back:.1f} s and gave {after} of them"
        )
    return {"answered_before_kill": answered, "captures_lost_on_kill": lost}


def _body(model: str, *, stream: bool) -> dict[str, Any]:
    return {"model": model, "messages": TURNS, "max_tokens": 4, "temperature": 0, "stream": stream}


def _text(endpoint: Endpoint, model: str) -> str:
    (told,) = answers(loading({"url": endpoint.url, "bodies": [_body(model, stream=False)], "count": 1}))
    if told["error"]:
        raise RuntimeError(f"{model} did not answer: {told['error']}")
    return str(told["text"])


def _gateway(endpoint: Endpoint) -> int | None:
    try:
        return endpoint.actor("Gateway").pid
    except LookupError:
        return None
