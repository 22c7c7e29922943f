"""A small search of every method's learning rate: where its default comes from.

Each method trains from the same base on the same chats for a fixed number of steps at several rates, evenly
apart on a logarithmic scale, and is judged by its loss on held-out chats; the best of a method also answers
them. A line of JSON is written for every trial, and a table at the end. Trials that have a line already are
not run again.

    python benchmarks/rates.py --data chats.jsonl --results rates.jsonl
    python benchmarks/rates.py --data chats.jsonl --results rates.jsonl --methods lora --rates 1e-3

The chats are rows of `messages`, or of `instruction` and `response`; those of another `split` than `train`
are held out.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

#: Where to look, by method: low and high, wide enough that the best of short runs lies inside. Sources: LoRA
#: Without Regret (Thinking Machines, 2025) for full and LoRA and its kin; PEFT's method comparison for the
#: others.
RANGES = {
    "zero_shot": (1.0, 1.0),  # the untuned base, to compare with
    "full": (1e-5, 3e-4),
    "lora": (2e-4, 1e-2),
    "rslora": (2e-4, 1e-2),
    "dora": (2e-4, 1e-2),
    "pissa": (1e-4, 5e-3),
    "olora": (1e-4, 5e-3),
    "adalora": (5e-4, 2e-2),
    "qlora": (2e-4, 1e-2),
    "vera": (3e-3, 1.5e-1),
    "oft": (2e-4, 1e-2),
    "ia3": (5e-3, 2e-1),
    "loha": (1e-3, 5e-2),
    "lokr": (1e-3, 5e-2),
    "prompt_tuning": (1e-2, 1.5),
    "p_tuning": (3e-4, 3e-2),
    "prefix_tuning": (1e-2, 1.0),
}


def main() -> None:
    """Run what has no line yet, then print the table."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--data", type=Path, required=True, help="chats as JSONL")
    words.add_argument(
        "--results", type=Path, required=True, help="JSONL of finished trials; made if missing"
    )
    words.add_argument("--model", default="bundled:smollm2-135m-instruct")
    words.add_argument(
        "--methods", nargs="*", default=list(RANGES), help="names, or settings as JSON objects"
    )
    words.add_argument("--rates", nargs="*", type=float, help="rates instead of the method's range")
    words.add_argument("--points", type=int, default=4, help="rates of a range")
    words.add_argument("--steps", type=int, default=48)
    words.add_argument("--tokens-per-batch", type=int, default=512)
    words.add_argument("--held-out", type=int, default=48, help="chats for the loss and the answers")
    words.add_argument("--threads", type=int, default=1)
    settings = words.parse_args()
    known = (
        [json.loads(line) for line in settings.results.read_text().splitlines()]
        if settings.results.exists()
        else []
    )
    import torch

    from regraft.methods import parse_method
    from regraft.models import load_tokenizer, resolve
    from regraft.training.encoding import Limits, encode_all

    torch.set_num_threads(settings.threads)
    folder = resolve(settings.model).path
    tokenizer = load_tokenizer(folder)
    train_chats, held_out = read(settings.data, settings.held_out)
    limits = Limits(512, "drop")
    rows = list(encode_all(tokenizer, train_chats, limits, name="train").rows)
    asked = list(encode_all(tokenizer, held_out, limits, name="held out").rows)
    have = {json.dumps(line["method"], sort_keys=True) for line in known}
    for text in settings.methods:
        fixed = json.loads(text) if text.startswith("{") else {"name": text}
        best = min(
            (t["loss"] for t in known if t["method"]["name"] == fixed["name"] and t["loss"]), default=math.inf
        )
        low, high = RANGES[fixed["name"]]
        for rate in settings.rates or ([low] if low == high else spread(low, high, settings.points)):
            method = parse_method(fixed | {"learning_rate": rate})
            if json.dumps(method.model_dump(mode="json"), sort_keys=True) in have:
                continue
            trial = run(method, folder, tokenizer, rows, asked, held_out, settings, best)
            best = min(best, trial["loss"] or math.inf)
            known.append(trial)
            with settings.results.open("a") as stream:
                stream.write(json.dumps(trial) + "\n")
            sys.stdout.write(f"{method.label}: loss {trial['loss']}, ROUGE-L {trial['rougeL']}\n")
            sys.stdout.flush()
    table(known)


def spread(low: float, high: float, points: int) -> list[float]:
    """Rates evenly apart on a logarithmic scale, to two digits."""
    ratio = (high / low) ** (1 / max(1, points - 1))
    return [float(f"{low * ratio**i:.2g}") for i in range(points)]


def read(file: Path, held_out: int) -> tuple[list[Any], list[Any]]:
    """Training chats, shuffled, and the first of the others, shuffled too."""
    from regraft.records import Example, Message

    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    sets: dict[bool, list[Any]] = {True: [], False: []}
    for index, line in enumerate(lines):
        turns = line.get("messages") or [
            {"role": "user", "content": line["instruction"]},
            {"role": "assistant", "content": line["response"]},
        ]
        example = Example(id=str(line.get("id", index)), messages=tuple(Message(**t) for t in turns))
        sets[line.get("split", "train") == "train"].append(example)
    for found in sets.values():
        random.Random(0).shuffle(found)
    return sets[True][:4000], sets[False][:held_out]


def run(
    method: Any, folder: Path, tokenizer: Any, rows: list[Any], asked: list[Any], held_out: list[Any],
    settings: argparse.Namespace, best: float,
) -> dict[str, Any]:  # fmt: skip
    """One trial: the held-out loss, and if it is the method's best so far, the answers' ROUGE-L."""
    import torch

    from regraft.errors import InfeasibleTrialError
    from regraft.training.batches import bucket
    from regraft.training.loop import Layout, evaluation_loss, train
    from regraft.training.loss import supervised_positions_only
    from regraft.training.steps import LoopSettings

    base = method.load_base(folder, "bfloat16", "cpu")
    torch.manual_seed(0)
    model = method.apply(base)
    pad = int(tokenizer.pad_token_id)
    score: dict[str, Any] = {"method": method.model_dump(mode="json"), "loss": None, "rougeL": None}
    if not method.trains:
        with supervised_positions_only(base):
            loss = evaluation_loss(model, asked, settings.tokens_per_batch, Layout("cpu", pad))
        score["loss"] = round(loss, 4)
        return score | {"rougeL": answered(model, tokenizer, held_out)}
    epoch = len(bucket(rows, settings.tokens_per_batch, rng=None))
    loop = LoopSettings(
        method.learning_rate, settings.steps / epoch, settings.tokens_per_batch, evaluations=1,
        packing=method.support.packs,
    )  # fmt: skip
    try:
        done = train(
            model, base, rows, asked, loop, pad_id=pad, device="cpu", report=lambda _: None,
            hooks=method.hooks(model),
        )  # fmt: skip
    except InfeasibleTrialError as error:
        return score | {"reason": error.problem}
    score |= {"loss": round(done.eval_loss or math.nan, 4), "steps": done.points[-1].step}
    score |= {"tokens": done.tokens_seen, "seconds": round(done.seconds, 1)}
    if (done.eval_loss or math.inf) < best:
        model = model.eval().bfloat16() if method.kind == "full" else model.eval()
        score["rougeL"] = answered(model, tokenizer, held_out)
    return score


def answered(model: Any, tokenizer: Any, held_out: list[Any]) -> float:
    """ROUGE-L of the answers to the held-out chats."""
    from regraft.evals import default_metrics
    from regraft.evals.evaluate import evaluate
    from regraft.evals.generation import generate
    from regraft.models import prompt_ids

    prompts = [prompt_ids(tokenizer, e.prompt) for e in held_out]
    outputs = generate(model.eval(), tokenizer, prompts, max_new_tokens=64, batch_size=48)
    report = evaluate(held_out, outputs, default_metrics(), dataset_id="rates", split="held out")
    return round(report.means["rougeL"], 4)


def table(trials: list[dict[str, Any]]) -> None:
    """The best of each method, and the loss at every rate."""
    sys.stdout.write(
        "\n| method | best rate | held-out loss | ROUGE-L | loss by rate |\n|---|---|---|---|---|\n"
    )
    for name in dict.fromkeys(t["method"]["name"] for t in trials):
        own = sorted(
            (t for t in trials if t["method"]["name"] == name),
            key=lambda t: t["method"].get("learning_rate", 0),
        )
        best = min(own, key=lambda t: t["loss"] or math.inf)
        losses = ", ".join(f"{t['method'].get('learning_rate', 0):g}: {t['loss'] or 'diverged'}" for t in own)
        sys.stdout.write(
            f"| {name} | {best['method'].get('learning_rate', 0):g} | {best['loss']} | {best['rougeL']} "
            f"| {losses} |\n"
        )


if __name__ == "__main__":
    main()
