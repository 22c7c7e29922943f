"""How many tokens a CPU-second vLLM answers with: `benchmarks/serving.py` sets it beside the engines here.

vLLM runs in its own environment, bound to one core, and its whole process tree is counted: API server, engine
and worker. Answers are asked for whole, so that it writes no events; it keeps no prefixes, as Regraft's slots
keep none; the base is measured on a server without adapters, whose layers take longer.

    python benchmarks/vllm_side.py --python ~/vllm/bin/python
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from serving.engines.vllm_process import VllmProcess

DATA = Path(__file__).parents[1] / "examples/utility-support/data"
#: Of the adapters that the script makes for itself.
RANKS = (4, 16, 8)


class VllmRates(NamedTuple):
    """New tokens a CPU-second, the median of the rounds.

    Attributes:
        base: Of the base alone.
        lora: Of requests that take the adapters by turns; None if there are none.
    """

    base: float
    lora: float | None


def vllm_rates(
    python: Path,
    model: Path,
    prompts: Sequence[Sequence[int]],
    adapters: Sequence[Path],
    *,
    tokens: int,
    streams: int,
    rounds: int = 3,
    say: Callable[[str], None] = lambda _: None,
) -> VllmRates:
    """Measure vLLM on one core, in bf16.

    Args:
        python: The interpreter that has it.
        model: Folder of the base model.
        prompts: Token ids; taken by turns.
        adapters: Folders of LoRA adapters; taken by turns.
        tokens: Of each answer; no answer ends earlier.
        streams: Requests at once.
        rounds: How often, after one to warm up.
        say: Told of every round.

    Raises:
        ServiceError: If vLLM does not come up.
    """
    from serving.engines.vllm import BASE

    names = [f"adapter-{n}" for n in range(len(adapters))]
    base = _measured(python, model, prompts, {}, [BASE], tokens, streams, rounds, say)
    if not adapters:
        return VllmRates(base, None)
    loaded = dict(zip(names, adapters, strict=True))
    return VllmRates(base, _measured(python, model, prompts, loaded, names, tokens, streams, rounds, say))


def _measured(
    python: Path,
    model: Path,
    prompts: Sequence[Sequence[int]],
    adapters: dict[str, Path],
    names: Sequence[str],
    tokens: int,
    streams: int,
    rounds: int,
    say: Callable[[str], None],
) -> float:
    from serving.engines.vllm import BASE
    from serving.engines.vllm_process import Bound, VllmProcess

    arguments = [f"--model={model}", f"--served-model-name={BASE}", "--dtype=bfloat16"]
    arguments += [f"--max-num-seqs={streams}", f"--kv-cache-memory-bytes={2**30}", "--generation-config=vllm"]
    arguments += ["--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    if adapters:
        rank = max(json.loads((f / "adapter_config.json").read_text())["r"] for f in adapters.values())
        held = next(r for r in (8, 16, 32, 64) if r >= rank)
        arguments += ["--enable-lora", f"--max-lora-rank={held}", f"--max-loras={len(adapters)}"]
    cores = os.sched_getaffinity(0)
    core = min(cores)
    asked = [(names[i % len(names)], prompts[i % len(prompts)]) for i in range(streams)]
    with tempfile.TemporaryDirectory() as folder:
        os.sched_setaffinity(0, {core})  # which a child takes over, with all of its own
        try:
            server = VllmProcess(
                python, arguments, Bound(1, "cpu", str(core)), Path(folder) / "vllm.log", 600, lambda: None
            )
        finally:
            os.sched_setaffinity(0, cores)
        try:
            for name, files in adapters.items():
                server.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(files.resolve())})
            rates = []
            for number in range(rounds + 1):
                before, started = _cpu_seconds(server.pid), time.perf_counter()
                made = asyncio.run(_at_once(server, asked, tokens))
                spent, passed = _cpu_seconds(server.pid) - before, time.perf_counter() - started
                rates.append(made / spent)
                what = "adapters" if adapters else "base"
                say(f"vLLM, {what}, round {number}: {made} tokens in {spent:.1f} CPU-s, {passed:.1f} s")
        finally:
            server.close()
    return statistics.median(rates[1:])


async def _at_once(server: VllmProcess, asked: Sequence[tuple[str, Sequence[int]]], tokens: int) -> int:
    async def one(name: str, prompt: Sequence[int]) -> int:
        body = {"model": name, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0}
        answer = await client.post("/v1/completions", json=body | {"ignore_eos": True})
        answer.raise_for_status()
        made: int = answer.json()["usage"]["completion_tokens"]
        return made

    async with server.client() as client:
        return sum(await asyncio.gather(*(one(*pair) for pair in asked)))


def _cpu_seconds(pid: int) -> float:
    """Of a process and all that it started, in user and system mode."""
    import psutil

    head = psutil.Process(pid)
    return sum(sum(p.cpu_times()[:2]) for p in (head, *head.children(recursive=True)))


def main() -> None:
    """Measure with the examples' chats and adapters made on the spot; the last line is one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--python", type=Path, required=True, help="the interpreter that has vLLM")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct")
    words.add_argument("--streams", type=int, default=32)
    words.add_argument("--tokens", type=int, default=64)
    settings = words.parse_args()

    sys.path.remove(str(Path(__file__).parent))  # a file beside this one bears the name of a package
    from regraft.data.chats import read_chats
    from regraft.models import load_tokenizer, prompt_ids, resolve

    found = resolve(settings.model, None, _say)
    tokenizer = load_tokenizer(found.path)
    prompts = [prompt_ids(tokenizer, e.prompt) for e in read_chats(DATA / "evaluation.jsonl")]
    with tempfile.TemporaryDirectory() as folder:
        files = [_make(rank, found.path, Path(folder) / str(rank)) for rank in RANKS]
        rates = vllm_rates(
            settings.python, found.path, prompts, files,
            tokens=settings.tokens, streams=settings.streams, say=_say,
        )  # fmt: skip
    _say(json.dumps(rates._asdict()))


def _make(rank: int, base: Path, folder: Path) -> Path:
    """A LoRA adapter with small random weights, saved as a trial saves it."""
    import torch

    from regraft.methods import parse_method
    from regraft.methods.base import trainable_parameters

    method = parse_method({"name": "lora", "rank": rank})
    torch.manual_seed(1)
    model: Any = method.apply(method.load_base(base, "bfloat16", "cpu"))
    with torch.no_grad():
        for weights in trainable_parameters(model):
            weights.add_(torch.randn_like(weights) * 0.005)
    method.save(model, folder)
    return folder


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
