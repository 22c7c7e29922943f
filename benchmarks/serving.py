"""How many tokens the slots answer with, beside transformers' `generate` with one request at a time.

All sides answer the same chats with the same base in the same process, by turns; their speed is the median of
the rounds, in new tokens a CPU-second of one thread, as other work on the machine disturbs that least, or a
second on CUDA.

    sequential  `generate`, one request after another
    slots       all requests at once, of the base alone
    mixed       all at once, of the base and of adapters of several kinds and ranks, by turns

    python benchmarks/serving.py --quick
    python benchmarks/serving.py --streams 8,32,64

The last line is one JSON object: `tokens_per_s_vs_sequential` is slots over sequential at 32 streams,
`mixed_adapters_cost` slots over mixed (1 would be no cost). `tokens_per_s_vs_vllm` and
`tokens_per_s_vs_vllm_lora` are null where vLLM is not installed beside Regraft.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "examples/utility-support/data"
ADAPTERS: tuple[dict[str, Any], ...] = (
    {"name": "lora", "rank": 4},
    {"name": "lora", "rank": 16},
    {"name": "dora", "rank": 8},
    {"name": "ia3"},
    {"name": "prompt_tuning", "virtual_tokens": 16},
)
Prompt = Sequence[int]


def main() -> None:
    """Time the contenders, print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="fewer rounds: under five minutes on two cores")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct")
    words.add_argument("--streams", default="32", help="requests at once; several by commas")
    words.add_argument("--tokens", type=int, default=64, help="of each answer")
    settings = words.parse_args()

    sys.path.remove(str(Path(__file__).parent))  # this file bears the name of the package that it measures
    import torch

    from regraft.data.chats import read_chats
    from regraft.methods import parse_method
    from regraft.models import load_tokenizer, pick_device, prompt_ids, resolve
    from serving.engines.adapters import Adapter, read_adapter
    from serving.engines.base import EngineLimits
    from serving.engines.slots import SlotEngine, SlotsBase

    torch.set_num_threads(1)
    device = pick_device("auto")
    found = resolve(settings.model, None, say)
    tokenizer = load_tokenizer(found.path)
    prompts = [prompt_ids(tokenizer, e.prompt) for e in read_chats(DATA / "evaluation.jsonl")]
    counts = [int(n) for n in settings.streams.split(",")]
    base = parse_method({"name": "zero_shot"}).load_base(found.path, "bfloat16", device)
    limits = EngineLimits(max_batch=max(counts), max_queued=max(counts), threads=1)
    with tempfile.TemporaryDirectory() as folder:
        files = [make(settings_, found.path, Path(folder) / str(n)) for n, settings_ in enumerate(ADAPTERS)]
        slots = SlotsBase(base, tokenizer, limits)
        alone = SlotEngine(slots, Adapter())
        mixed = [alone, *(SlotEngine(slots, read_adapter(file, base)) for file in files)]
    plain = parse_method({"name": "zero_shot"}).load_base(found.path, "bfloat16", device)
    rounds = 2 if settings.quick else 5
    summary: dict[str, Any] = {}
    for count in counts:
        asked = [prompts[i % len(prompts)] for i in range(count)]
        few = asked[:4] if settings.quick else asked[:8]
        sides: dict[str, Callable[[], int]] = {
            "sequential": lambda few=few: sequential(plain, tokenizer, few, settings.tokens),  # type: ignore[misc]
            "slots": lambda asked=asked: at_once([alone], asked, settings.tokens),  # type: ignore[misc]
            "mixed": lambda asked=asked: at_once(mixed, asked, settings.tokens),  # type: ignore[misc]
        }
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, work in sides.items():
                rates[name].append(rate(work, device))
        middle = {name: statistics.median(own) for name, own in rates.items()}
        say(
            f"{count} streams: " + ", ".join(f"{name} {value:.1f} tokens/s" for name, value in middle.items())
        )
        if count == 32 or len(counts) == 1:
            summary = {
                "tokens_per_s_vs_sequential": round(middle["slots"] / middle["sequential"], 2),
                "mixed_adapters_cost": round(middle["slots"] / middle["mixed"], 3),
                "tokens_per_s": round(middle["slots"], 1),
            }
    slots.close()
    summary |= {"tokens_per_s_vs_vllm": None, "tokens_per_s_vs_vllm_lora": None}
    sys.stdout.write(json.dumps(summary) + "\n")


def make(settings: dict[str, Any], base: Path, folder: Path) -> Path:
    """An adapter with small random weights, saved as a trial saves it."""
    import torch

    from regraft.methods import parse_method
    from regraft.methods.base import trainable_parameters

    method = parse_method(settings)
    torch.manual_seed(1)
    model = method.apply(method.load_base(base, "bfloat16", "cpu"))
    with torch.no_grad():
        for weights in trainable_parameters(model):
            weights.add_(torch.randn_like(weights) * 0.005)
    method.save(model, folder)
    return folder


def sequential(model: Any, tokenizer: Any, prompts: Sequence[Prompt], tokens: int) -> int:
    """Answer one after another; gives how many tokens."""
    import torch

    from regraft.evals.generation import contiguous_head

    total = 0
    # transformers is spared torch's slow product with the strided last position: it is not what is measured.
    with torch.inference_mode(), contiguous_head(model):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            total += out.shape[1] - ids.shape[1]
    return total


def at_once(engines: Sequence[Any], prompts: Sequence[Prompt], tokens: int) -> int:
    """Answer all together, of one version after another; gives how many tokens."""
    from serving.engines.base import Finished, GenerationRequest

    async def one(engine: Any, prompt: Prompt) -> int:
        count = 0
        async for event in engine.submit(GenerationRequest(tuple(prompt), tokens)):
            if isinstance(event, Finished):
                count = event.completion_tokens
        return count

    async def all_of_them() -> list[int]:
        asked = (one(engines[i % len(engines)], p) for i, p in enumerate(prompts))
        return await asyncio.gather(*asked)

    return sum(asyncio.run(all_of_them()))


def rate(work: Callable[[], int], device: str) -> float:
    """Tokens a CPU-second of this process, or a second on CUDA."""
    clock = time.perf_counter if device.startswith("cuda") else time.process_time
    started = clock()
    tokens = work()
    return tokens / (clock() - started)


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
