"""What HTTP, the gateway and the way to the engine's replica add to an answer, and what its capture does."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
from serving_endpoint import Asker, Registered, child, pin, read, running

#: Cores of the engine, and of all else that takes part.
ENGINE_CORE, OTHER_CORE = 0, 1
TURNS = [{"role": "user", "content": "How do I read my meter?"}]


def added_latency(
    model: Registered,
    *,
    tokens: int,
    rounds: int,
    each: int,
    environment: Mapping[str, str],
    serve: Mapping[str, Any],
    say: Callable[[str], None],
) -> dict[str, float]:
    """One client at a time over HTTP, and the same requests to the bare engine in a process, by turns.

    Both engines have one thread, the same priority and the same core; client, proxy and gateway have another
    core. Ray gives its workers a low priority, which would count what else runs on the machine.

    Args:
        model: Its first version answers.
        tokens: Of an answer, at most.
        rounds: How often either side has its turn.
        each: Requests of a turn, half of them streams.
        environment: Of Ray, for trials of its settings.
        serve: Of the endpoint, for trials of its own.
        say: Told the figures.

    Returns:
        Milliseconds: what is added to whole answers (`added_latency_p50_ms`, the median over turns of the
        difference of both sides' medians; `added_latency_p95_ms`), and to streams and their first text;
        `hop_p50_ms`, the part of it between the gateway and the engine's replica and back;
        `round_trip_p50_ms`, that of a request which no engine answers; the CPU time that Ray's proxy, where
        there is one, and the gateway spend on an answer, with what they do beside it; what the endpoint's
        answers and first texts take; and `capture_cost_ms`, the time of one capture.
    """
    from regraft.data.captures import CaptureStore
    from regraft.models import load_tokenizer, prompt_ids, resolve
    from regraft.records import Message

    version = model.registry.version(model.name, model.versions[0])
    ids = prompt_ids(load_tokenizer(resolve(version.base_model).path), [Message(**t) for t in TURNS])
    settings = model.settings(serve)
    found: dict[str, list[float]] = {
        name: []
        for name in (
            *("http", "bare", "http, stream", "bare, stream", "http, first", "bare, first"),
            *("round trip", "captured"),
        )
    }
    # Of each turn: a machine that is slower now than before is so for both.
    apart: dict[str, list[float]] = {"": [], ", stream": [], ", first": []}
    with (
        running(settings, {"RAY_worker_niceness": "0", **environment}) as endpoint,
        Asker(OTHER_CORE) as asker,
    ):
        alone = child(["bare", str(_written(settings)), str(version.version)], core=ENGINE_CORE)
        read(alone)
        for process in endpoint.family():
            pin(process, OTHER_CORE)
        pin(endpoint.actor("Holder"), ENGINE_CORE)
        proxied = settings.serve.ingress == "proxy"
        spent = {name: 0.0 for name in (*(["ProxyActor"] if proxied else []), "Gateway", "Engines", "Holder")}
        asked_whole = 0
        for number in range(rounds + 1):
            for stream in (False, True):
                of = ", stream" if stream else ""
                body = {"model": model.name, "messages": TURNS, "max_tokens": tokens, "temperature": 0}
                load = {"url": endpoint.url, "bodies": [body | {"stream": stream}], "count": each // 2}
                before = {name: _cpu_seconds(endpoint.actor(name)) for name in spent}
                told = asker.ask(load | {"warm": 0 if number else 4})
                if number and not stream:
                    asked_whole += len(told)
                    for name, start in before.items():
                        spent[name] += _cpu_seconds(endpoint.actor(name)) - start
                asked = {"ids": ids, "tokens": tokens, "count": each // 2, "whole": not stream}
                alone.stdin.write(json.dumps(asked) + "\n")
                alone.stdin.flush()
                took = json.loads(read(alone))
                if wrong := [t for t in told if t["error"]]:
                    raise RuntimeError(f"the endpoint failed: {wrong[0]}")
                if number:  # the first round warms up
                    found[f"http{of}"] += [t["seconds"] for t in told]
                    found[f"bare{of}"] += [end for _, end in took]
                    firsts = [t["first"] for t in told if t["first"] is not None]
                    if stream:
                        found["http, first"] += firsts
                        found["bare, first"] += [first for first, _ in took]
                        apart[", first"].append(_middle(firsts) - _middle([first for first, _ in took]))
                    apart[of].append(_middle([t["seconds"] for t in told]) - _middle([e for _, e in took]))
            if number:
                found["round trip"] += round_trips(settings.serve.port, each // 2)
        alone.stdin.close()
        alone.wait(60)
    exchanges = [e for e in CaptureStore(settings.captures).read() if not e.stream]
    found["captured"] = [e.latency_ms / 1000 for e in exchanges[-len(found["http"]) :]]
    for name, values in found.items():
        say(
            f"{model.name}, {name}: p50 {1000 * _p(values, 50):.1f} ms, p95 {1000 * _p(values, 95):.1f} ms"
            f" of {len(values)}"
        )

    cpu = {name: 1000 * seconds / asked_whole for name, seconds in spent.items()}
    say(f"{model.name}, CPU of a whole answer: " + ", ".join(f"{n} {ms:.1f} ms" for n, ms in cpu.items()))

    def added(name: str) -> float:
        return round(1000 * _middle(apart[name]), 2)

    return {
        "added_latency_p50_ms": added(""),
        "added_latency_p95_ms": round(1000 * (_p(found["http"], 95) - _p(found["bare"], 95)), 2),
        "added_first_token_p50_ms": added(", first"),
        "added_stream_p50_ms": added(", stream"),
        "hop_p50_ms": round(1000 * (_p(found["captured"], 50) - _p(found["bare"], 50)), 2),
        "proxy_cpu_ms": round(cpu.get("ProxyActor", 0.0), 2),
        "gateway_cpu_ms": round(cpu["Gateway"], 2),
        "round_trip_p50_ms": round(1000 * _p(found["round trip"], 50), 2),
        "answer_p50_ms": round(1000 * _p(found["http"], 50), 2),
        "first_token_p50_ms": round(1000 * _p(found["http, first"], 50), 2),
        "first_token_p95_ms": round(1000 * _p(found["http, first"], 95), 2),
        "capture_cost_ms": round(1000 * capture_cost(settings.captures), 3),
    }


def round_trips(port: int, count: int) -> list[float]:
    """Seconds of requests that the gateway answers by itself, on one connection."""
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    seconds = []
    for _ in range(count):
        begun = time.perf_counter()
        connection.request("GET", "/v1/models")
        connection.getresponse().read()
        seconds.append(time.perf_counter() - begun)
    connection.close()
    return seconds


def capture_cost(captures: Path) -> float:
    """Seconds that capturing one exchange takes, the median over those that an endpoint captured."""
    from regraft.data.captures import CaptureStore
    from regraft.serve_sections import CaptureSection
    from serving.exchange import CaptureLog

    exchanges = CaptureStore(captures).read()
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        log = CaptureLog(CaptureStore.of(Path(folder) / "captures", CaptureSection()))
        for exchange in exchanges * (1 + 500 // len(exchanges)):
            begun = time.perf_counter()
            log.append(exchange)
            seconds.append(time.perf_counter() - begun)
        log.close()
    return statistics.median(seconds)


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _written(settings: Any) -> Path:
    file: Path = settings.captures.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    return file


def _middle(values: list[float]) -> float:
    return float(statistics.median(values))


def _p(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
