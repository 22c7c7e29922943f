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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from serving_models import make_adapter

if TYPE_CHECKING:
    from serving.engines.vllm_process import VllmProcess

DATA = Path(__file__).parents[1] / "examples/utility-support/data"
#: Of the adapters that the script makes for itself.
RANKS = (4, 16, 8)


class Round(NamedTuple):
    """What one round made.

    Attributes:
        tokens: New ones.
        cpu_seconds: Of all of the server's processes.
        seconds: That passed.
    """

    tokens: int
    cpu_seconds: float
    seconds: float


class VllmSide:
    """A vLLM on one core, or on CUDA, in bf16.

    Args:
        python: The interpreter that has it.
        model: Folder of the base model.
        adapters: Folders of LoRA adapters, which requests take by turns; none for the base alone.
        core: To bind it to; None for CUDA.
        streams: Requests at once.

    Raises:
        ServiceError: If vLLM does not come up.
    """

    def __init__(
        self, python: Path, model: Path, adapters: Sequence[Path], *, core: int | None, streams: int
    ) -> None:
        from serving.engines.vllm import BASE
        from serving.engines.vllm_process import Bound, VllmProcess

        arguments = [f"--model={model}", f"--served-model-name={BASE}", "--dtype=bfloat16"]
        # On CUDA the other side is in the same memory: no share of it, but as much as the requests need.
        room = 2**30 if core is not None else 8 * 2**30
        arguments += [f"--max-num-seqs={streams}", f"--kv-cache-memory-bytes={room}", "--max-model-len=2048"]
        if core is None:  # it asks for so much to be free before it starts
            arguments += ["--gpu-memory-utilization=0.3"]
        arguments += [
            "--generation-config=vllm",
            "--no-enable-prefix-caching",
            "--disable-uvicorn-access-log",
        ]
        if adapters:
            rank = max(json.loads((f / "adapter_config.json").read_text())["r"] for f in adapters)
            held = next(r for r in (8, 16, 32, 64) if r >= rank)
            arguments += ["--enable-lora", f"--max-lora-rank={held}", f"--max-loras={len(adapters)}"]
        self._folder = tempfile.TemporaryDirectory()
        log = Path(self._folder.name) / "vllm.log"
        bound = Bound(1, "cuda") if core is None else Bound(1, "cpu", str(core))
        with bound_to(core):  # which a child takes over, with all of its own
            self._server = VllmProcess(python, arguments, bound, log, 600, lambda: None)
        self._names = [f"adapter-{n}" for n in range(len(adapters))] or [BASE]
        for name, files in zip(self._names, adapters, strict=False):
            body = {"lora_name": name, "lora_path": str(files.resolve())}
            self._server.post("/v1/load_lora_adapter", body)

    def __enter__(self) -> VllmSide:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()
        self._folder.cleanup()

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Round:
        """Answer prompts together, each with so many tokens."""
        asked = [(self._names[i % len(self._names)], prompt) for i, prompt in enumerate(prompts)]
        before, started = _cpu_seconds(self._server.pid), time.perf_counter()
        made = asyncio.run(_at_once(self._server, asked, tokens))
        return Round(made, _cpu_seconds(self._server.pid) - before, time.perf_counter() - started)


@contextmanager
def bound_to(core: int | None) -> Iterator[None]:
    """Bind this thread, and what it starts meanwhile, to one core if it is named."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores if core is None else {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


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
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        files = [
            make_adapter({"name": "lora", "rank": rank}, found.path, Path(folder) / str(rank))
            for rank in RANKS
        ]
        for what, adapters in {"base": [], "lora": files}.items():
            core = min(os.sched_getaffinity(0))
            asked = [prompts[i % len(prompts)] for i in range(settings.streams)]
            with VllmSide(settings.python, found.path, adapters, core=core, streams=settings.streams) as side:
                rounds = [side.answer(asked, settings.tokens) for _ in range(4)]
            for made in rounds:
                _say(f"{what}: {made.tokens} tokens in {made.cpu_seconds:.1f} CPU-s, {made.seconds:.1f} s")
            rates[what] = statistics.median(r.tokens / r.cpu_seconds for r in rounds[1:])
    _say(json.dumps(rates))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
