"""How quickly the endpoint answers and what it loses, each beside a baseline in the same run.

    engine  new tokens a CPU-second of the slots, beside transformers' `generate` with one request at a time
    vllm    the same beside vLLM, where --vllm-python names an interpreter that has it
    http    an endpoint on Ray Serve beside the bare engine in a process of its own
    switch  requests at a steady rate while the champion changes there and back
    kill    requests in flight while the gateway, and then everything, is killed

    python benchmarks/serving.py --quick
    python benchmarks/serving.py --parts engine --streams 8,32,64

All sides answer on one machine with one thread, by turns, and speed is that of the median round. On CUDA,
where tokens a second are counted instead, `--shape llama-1b` takes a model that is large enough for a GPU.
Work of vLLM counts with its own HTTP server, the slots' without one. `switch` and `kill` ask a small model
with random weights, so that two cores can follow 50 requests a second; `http` asks both models.

The last line is one JSON object; a part that is not measured is null in it. `tokens_per_s_vs_*` are slots
over the other side at 32 streams, `mixed_adapters_cost` the base alone over adapters of several kinds and
ranks mixed (1 would be no cost), `added_latency_p50_ms` what a client with one request at a time waits longer
for a whole answer than at the bare engine; figures that end in `_tiny` are those of the small model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from serving_endpoint import Registered, held_to, register
from serving_engines import Engines
from serving_faults import kill, switch
from serving_http import OTHER_CORE, added_latency
from serving_models import SHAPES, make_shaped, make_tiny

DATA = Path(__file__).parents[1] / "examples/utility-support/data"
PARTS = ("engine", "vllm", "http", "switch", "kill")
SUMMARY = (
    "tokens_per_s_vs_sequential",
    "tokens_per_s_vs_vllm",
    "tokens_per_s_vs_vllm_lora",
    "added_latency_p50_ms",
    "mixed_adapters_cost",
    "failed_requests_on_switch",
)


def main() -> None:
    """Measure the parts, print what they find and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--quick",
        action="store_true",
        help="fewer rounds: under five minutes on two cores, or seven with vLLM",
    )
    words.add_argument("--parts", default=",".join(PARTS), help="which to measure, by commas")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct")
    words.add_argument(
        "--shape", choices=SHAPES, help="in engine and vllm a model of random weights of this shape instead"
    )
    words.add_argument("--streams", default="32", help="requests at once; several by commas")
    words.add_argument("--tokens", type=int, help="of each answer in engine and vllm; 64, with --quick 32")
    words.add_argument(
        "--vllm-python", type=Path, default=os.environ.get("REGRAFT_VLLM_PYTHON"),
        help="the interpreter that has vLLM; else REGRAFT_VLLM_PYTHON names it",
    )  # fmt: skip
    words.add_argument(
        "--ray-env", action="append", default=[], metavar="NAME=VALUE", help="of the endpoint in http"
    )
    words.add_argument(
        "--serve", action="append", default=[], metavar="KEY=VALUE", help="of the endpoint's section in http"
    )
    settings = words.parse_args()
    parts = settings.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        words.error(f"--parts: there is no part {min(unknown)!r}; there are {', '.join(PARTS)}")
    sys.path.remove(str(Path(__file__).parent))  # this file bears the name of the package that it measures

    from regraft.processes import with_large_pages

    # The memory that an endpoint's engines have, for all sides; it is settled when a process starts.
    if (wanted := with_large_pages(os.environ)) != os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], wanted)
    began = time.monotonic()
    summary: dict[str, Any] = dict.fromkeys(SUMMARY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"engine", "vllm"} & set(parts):
            summary |= engines(settings, parts, folder)
        if {"http", "switch", "kill"} & set(parts):
            summary |= endpoints(settings, parts, folder)
    say(f"measured in {time.monotonic() - began:.0f} s")
    say(json.dumps(summary))


def engines(settings: argparse.Namespace, parts: list[str], folder: Path) -> dict[str, Any]:
    """Measure the engines alone."""
    from regraft.data.chats import read_chats
    from regraft.models import load_tokenizer, pick_device, prompt_ids, resolve

    device = pick_device("auto")
    if settings.shape:
        model = make_shaped(settings.shape, folder / settings.shape, device)
    else:
        model = resolve(settings.model, None, say).path
    words = load_tokenizer(model)
    prompts = [prompt_ids(words, e.prompt) for e in read_chats(DATA / "evaluation.jsonl")]
    counts = [int(n) for n in settings.streams.split(",")]
    tokens = settings.tokens or (32 if settings.quick else 64)
    rounds = 2 if settings.quick else 5
    measured: dict[str, Any] = {}
    sides = Engines(model, folder, device, prompts, tokens=tokens, most=max(counts), say=say)
    for count in counts:
        whole = count == 32 or len(counts) == 1
        if "engine" in parts:
            made = sides.beside_generate(count, few=4 if settings.quick else 8, rounds=rounds)
            if whole:
                measured |= {
                    "tokens_per_s_vs_sequential": round(made["slots"] / made["sequential"], 2),
                    "mixed_adapters_cost": round(made["slots"] / made["mixed"], 3),
                    "tokens_per_s": round(made["slots"], 1),
                }
        if "vllm" in parts and whole and settings.vllm_python:
            made = sides.beside_vllm(Path(settings.vllm_python), count, 1 if settings.quick else 3)
            for key, what in {"": "base", "_lora": "lora"}.items():
                ratio = made[f"slots, {what}"] / made[f"vllm, {what}"]
                measured[f"tokens_per_s_vs_vllm{key}"] = round(ratio, 2)
    sides.close()
    return measured


def endpoints(settings: argparse.Namespace, parts: list[str], folder: Path) -> dict[str, Any]:
    """Measure endpoints on Ray Serve, of versions in a real registry."""
    from regraft.tracking.server import start_server, stop_server

    quick = settings.quick
    measured: dict[str, Any] = {}
    server = start_server(folder / "mlflow", "127.0.0.1", 0)
    try:
        adapters: list[dict[str, Any]] = [
            {"name": "lora", "rank": 8},
            {"name": "prompt_tuning", "virtual_tokens": 5, "initial_text": None},
        ]
        tiny = register(server.url, folder, "tiny", str(make_tiny(folder / "tiny")), adapters, spread=0.3)
        if "http" in parts:
            environment, serve = (
                dict(pair.split("=", 1) for pair in pairs) for pairs in (settings.ray_env, settings.serve)
            )

            def latency(model: Registered, rounds: int, each: int) -> dict[str, float]:
                return added_latency(
                    model, tokens=8, rounds=rounds, each=each, environment=environment, serve=serve, say=say
                )

            real = register(server.url, folder, "smollm2", settings.model, adapters[:1], spread=0.005)
            with held_to(server.pid, OTHER_CORE):  # gateways ask it for aliases: it is none of the engine's
                small = latency(tiny, 3 if quick else 10, 40)
                measured |= {f"{name}_tiny": value for name, value in small.items()}
                # One answer each by turns: what it takes drifts by more than what is added.
                measured |= latency(real, 36 if quick else 150, 2)
        if "switch" in parts:
            measured |= switch(tiny, rate=50, seconds=12 if quick else 18, say=say)
        if "kill" in parts:
            measured |= kill(tiny, rounds=1 if quick else 3, say=say)
    finally:
        stop_server(server.pid)
    return measured


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
