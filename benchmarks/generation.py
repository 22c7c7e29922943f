"""How fast evaluation answers, beside transformers' `generate` with one prompt at a time and in batches.

A LoRA is trained on the example for a moment, so that answers end where they end and not all at the limit;
`base` is the model as it comes, whose answers mostly reach it. All contenders answer the example's evaluation
prompts with the same model in the same process, by turns, and their speed is the median of the rounds: new
tokens a CPU-second, as other work on the machine disturbs it least, or a second on CUDA. Before that, in
fp32, their answers must be the same to the token.

    alone    `generate`, one prompt at a time; of many prompts a part, as each takes its own time
    batched  `generate`, padded batches in the order of the file
    sorted   `generate`, padded batches of prompts of like length
    regraft  what a trial does

The peers are spared the slow product of torch on the CPU with the strided last position (`make_contiguous`).

    python benchmarks/generation.py --quick
    python benchmarks/generation.py --json result.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "examples/utility-support/data"
Prompts = Sequence[Sequence[int]]
Answers = list[list[int]]


def main() -> None:
    """Check the answers, time the contenders, print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="less of all: under five minutes on two cores")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct", help="as in regraft.yaml")
    words.add_argument("--batch-size", type=int, default=32, help="evaluate.batch_size")
    words.add_argument("--max-new-tokens", type=int, default=64, help="evaluate.max_new_tokens")
    words.add_argument("--rounds", type=int, help="of each contender; 5, with --quick 2")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--json", type=Path, help="also write the result here")
    settings = words.parse_args()
    rounds = settings.rounds or (2 if settings.quick else 5)
    import torch
    import transformers

    from regraft.data.chats import read_chats
    from regraft.models import load_tokenizer, pick_device, prompt_ids, resolve

    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    folder, device = resolve(settings.model).path, pick_device("auto")
    tokenizer = load_tokenizer(folder)
    prompts = [prompt_ids(tokenizer, e.prompt) for e in read_chats(DATA / "evaluation.jsonl")]
    few = prompts[:: 12 if settings.quick else 2]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as kept:
        method = train_lora(folder, tokenizer, Path(kept), device, steps=16 if settings.quick else 60)
        model = method.load(folder, Path(kept), "float32", device).eval()
        require_same(contend(model, tokenizer, settings.max_new_tokens, 4), few)
        say(f"in fp32 all contenders give the same answers to {len(few)} prompts")
        model = method.load(folder, Path(kept), "bfloat16", device).eval()
        contenders = contend(model, tokenizer, settings.max_new_tokens, settings.batch_size)
        results["lora"] = by_turns(contenders, prompts, few, rounds, device)
        model = method.load(folder, None, "bfloat16", device).eval()
        contenders = contend(model, tokenizer, settings.max_new_tokens, settings.batch_size)
        some, turns = prompts, rounds
        if settings.quick:
            del contenders["alone"]
            some, turns = prompts[: 2 * settings.batch_size], 1
        results["base"] = by_turns(contenders, some, few, turns, device)
    ours, base = results["lora"], results["base"]

    def times(found: dict[str, Any], peer: str) -> float:
        return round(found["regraft"]["speed"] / found[peer]["speed"], 3)

    summary = {
        "tokens_per_s": round(ours["regraft"]["speed"], 1),
        "tokens_per_s_vs_generate": times(ours, "alone"),
        "tokens_per_s_vs_batched_generate": times(ours, "batched"),
        "tokens_per_s_vs_sorted_generate": times(ours, "sorted"),
        "base_tokens_per_s_vs_batched_generate": times(base, "batched"),
        "base_tokens_per_s_vs_sorted_generate": times(base, "sorted"),
        "seconds": "of the device" if device != "cpu" else "of the processor",
        "prompts": len(prompts),
        "batch_size": settings.batch_size,
        "max_new_tokens": settings.max_new_tokens,
        "threads": settings.threads,
        "contenders": results,
    }
    if settings.json:
        settings.json.write_text(json.dumps(summary, indent=1))
    sys.stdout.write(json.dumps(summary) + "\n")


def train_lora(folder: Path, tokenizer: Any, kept: Path, device: str, steps: int) -> Any:
    """The method, with an adapter in `kept` that has seen the example for so many steps."""
    import torch

    from regraft.data.chats import read_chats
    from regraft.methods import parse_method
    from regraft.training.encoding import encode
    from regraft.training.loop import train
    from regraft.training.steps import LoopSettings

    method = parse_method({"name": "lora", "rank": 16, "learning_rate": 2e-3})
    rows = [encode(tokenizer, e, 512) for e in read_chats(DATA / "train.jsonl")]
    base = method.load_base(folder, "bfloat16", device)
    torch.manual_seed(0)
    model = method.apply(base)
    tokens = sum(len(row.ids) for row in rows)
    loop = LoopSettings(method.learning_rate, steps * 256 / tokens, 256, evaluations=1, packing=True)
    done = train(model, base, rows, rows[:2], loop, pad_id=0, device=device, report=lambda _: None)
    method.save(model, kept)
    say(f"a LoRA trained for {done.points[-1].step} steps")
    return method


def contend(
    model: Any, tokenizer: Any, max_new_tokens: int, batch_size: int
) -> dict[str, Callable[[Prompts], Answers]]:
    """The ways to answer prompts: each gives the new token ids, without what ends them."""
    import torch

    from regraft.evals.generation import base_of, contiguous_head, end_ids, new_tokens

    ends, pad = end_ids(model, tokenizer), int(tokenizer.pad_token_id)

    def generate(prompts: Prompts, size: int) -> Answers:
        found: Answers = []
        for start in range(0, len(prompts), size):
            some = [list(prompt) for prompt in prompts[start : start + size]]
            batch = tokenizer.pad({"input_ids": some}, padding_side="left", return_tensors="pt")
            with torch.inference_mode(), contiguous_head(base_of(model)):
                out = model.generate(
                    **batch.to(model.device), max_new_tokens=max_new_tokens, do_sample=False,
                    eos_token_id=sorted(ends), pad_token_id=pad,
                )  # fmt: skip
            new = out[:, batch["input_ids"].shape[1] :].tolist()
            found += [list(itertools.takewhile(lambda token: token not in ends, row)) for row in new]
        return found

    def in_order_of_length(prompts: Prompts) -> Answers:
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        found = dict(zip(order, generate([prompts[i] for i in order], batch_size), strict=True))
        return [found[i] for i in range(len(prompts))]

    def ours(prompts: Prompts) -> Answers:
        return new_tokens(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)

    return {
        "alone": lambda prompts: generate(prompts, 1),
        "batched": lambda prompts: generate(prompts, batch_size),
        "sorted": in_order_of_length,
        "regraft": ours,
    }


def require_same(contenders: dict[str, Callable[[Prompts], Answers]], prompts: Prompts) -> None:
    """End with an error where an answer is not that of `generate` with one prompt at a time."""
    wanted = contenders["alone"](prompts)
    if len({len(answer) for answer in wanted}) < 2:
        raise SystemExit("all answers are of one length: that shows nothing")
    for name, answer in contenders.items():
        wrong = [i for i, (a, b) in enumerate(zip(answer(prompts), wanted, strict=True)) if a != b]
        if wrong:
            raise SystemExit(f"{name}: answers to the prompts {wrong} are not those of `generate` alone")


def by_turns(
    contenders: dict[str, Callable[[Prompts], Answers]],
    prompts: Prompts,
    few: Prompts,
    rounds: int,
    device: str,
) -> dict[str, Any]:
    """The speed of each, round by round and forwards and backwards by turns."""
    import torch

    def now() -> float:
        if device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for answer in contenders.values():
        answer(few[:2])
    for place in range(rounds):
        for name in list(contenders)[:: 1 if place % 2 == 0 else -1]:
            began = now()
            answers = contenders[name](few if name == "alone" else prompts)
            tokens = sum(len(answer) + 1 for answer in answers)  # and the token that ends it
            speeds[name].append(tokens / (now() - began))
            say(f"  round {place + 1}: {name} {speeds[name][-1]:.1f} tokens/s")
    found = {
        name: {"speed": statistics.median(own), "speeds": [round(s, 1) for s in own]}
        for name, own in speeds.items()
    }
    ours = found["regraft"]["speed"]
    say(f"{'':10} {'tokens/s':>9} {'range':>15} {'regraft':>8}")
    for name, result in found.items():
        low, high = min(speeds[name]), max(speeds[name])
        say(f"{name:10} {result['speed']:9.1f} {low:7.0f}-{high:<7.0f} {ours / result['speed']:7.2f}x")
    return found


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
