"""Training speed and memory of Regraft's loop beside `transformers.Trainer` and TRL's `SFTTrainer`.

All train LoRA on the same model and chats, in the same precision, with the same tokens a step on average
and the same threads. They run by turns, a process each, so that a noisy machine slows all of them alike.
Speed is real (unpadded) tokens a second, the median of the rounds; memory is the peak of the process,
imports and model included. A parity run trains Regraft and Trainer on identical batches and compares the
loss of every step.

The peers are tuned: adapters in fp32 on a bf16 base, no gradient checkpointing, no logging, no saving; TRL
packs. `trainer_bucketed` is Trainer handed Regraft's own batches, which none of its options gives: what is
left between the two is the loop and its kernels. `--all` adds rows grouped by length for both, and TRL as
it comes out of the box. The ratios of the last line are against the fastest of each library's own choices
that was run.

    python benchmarks/training.py --quick
    python benchmarks/training.py --all --json result.json

The peers come with `pip install -e '.[bench]'`.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VARIANTS = ("regraft", "trainer", "trainer_bucketed", "trl")
MORE_VARIANTS = ("trainer_grouped", "trl_grouped", "trl_default")


def chats(examples: list[Any], count: int, longest: int, seed: int, tokenizer: Any) -> list[Any]:
    """Conversations of the example's turns, of log-normal length: median 150 tokens, a twentieth over 500."""
    from regraft.models import prompt_ids
    from regraft.records import Example

    draw = random.Random(seed)
    made = []
    for index in range(count):
        wanted = min(longest * 0.8, draw.lognormvariate(5.0, 0.75))
        turns: list[Any] = []
        while not turns or len(prompt_ids(tokenizer, turns)) < wanted:
            turns += [m for m in draw.choice(examples).messages if m.role != "system"]
        made.append(Example(id=f"made-{index}", messages=tuple(turns)))
    return made


def main() -> None:
    """Run the contenders by turns and print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--quick", action="store_true", help="fewer chats and rounds: under five minutes on two cores"
    )
    words.add_argument("--all", action="store_true", help="also rows grouped by length, and TRL's defaults")
    words.add_argument(
        "--model", default="bundled:smollm2-135m-instruct", help="base model, as in regraft.yaml"
    )
    words.add_argument("--method", default='{"name": "lora", "rank": 8}', help="a method's settings as JSON")
    words.add_argument("--data", type=Path, help="chats as JSONL; the example's turns, joined, if not given")
    words.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of each contender")
    words.add_argument("--tokens-per-batch", type=int, default=2048, help="of a step, about ten chats")
    words.add_argument("--max-length", type=int, default=512)
    words.add_argument(
        "--padded", action="store_true", help="Regraft pads its batches instead of packing them"
    )
    words.add_argument(
        "--micro-tokens", type=int, default=0, help="Regraft passes a step through in parts of so many tokens"
    )
    words.add_argument("--chats", type=int, help="conversations in a round")
    words.add_argument("--rounds", type=int, help="rounds of each contender")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--json", type=Path, help="also write the result here")
    words.add_argument("--contender", help=argparse.SUPPRESS)
    settings = words.parse_args()
    settings.chats = settings.chats or (24 if settings.quick else 64)
    settings.rounds = settings.rounds or (2 if settings.quick else 3)
    if settings.contender:
        contend(settings)
        return
    names = VARIANTS + (MORE_VARIANTS if settings.all else ())
    if settings.threads > len(os.sched_getaffinity(0)):
        words.error(f"--threads {settings.threads}: this machine lends {len(os.sched_getaffinity(0))} cores")
    say(f"{', '.join(names)}: {settings.rounds} rounds, {settings.chats} chats, {settings.threads} thread(s)")
    results = run_by_turns(settings, names)
    ours = results["regraft"]
    say(f"\n{'':16} {'tokens/s':>9} {'range':>15} {'padding':>8} {'peak GiB':>9} {'speed':>7} {'memory':>7}")
    for name, result in results.items():
        low, high = min(result["speeds"]), max(result["speeds"])
        say(
            f"{name:16} {result['speed']:9.0f} {low:7.0f}-{high:<7.0f} {result['padding']:8.0%} "
            f"{result['peak_gib']:9.2f} {ours['speed'] / result['speed']:6.2f}x "
            f"{ours['peak_gib'] / result['peak_gib']:6.2f}x"
        )
    say("speed and memory: Regraft's against that row's")
    own = {n: r for n, r in results.items() if n != "trainer_bucketed"}
    best = {
        peer: max((r for n, r in own.items() if n.startswith(peer)), key=lambda r: r["speed"])
        for peer in ("trainer", "trl")
    }
    bucketed = results["trainer_bucketed"]
    say("parity: the loss of each step on identical batches")
    differences = parity(settings)
    summary = {
        "tokens_per_s": round(ours["speed"], 1),
        "tokens_per_s_vs_trainer": round(ours["speed"] / best["trainer"]["speed"], 3),
        "tokens_per_s_vs_trl": round(ours["speed"] / best["trl"]["speed"], 3),
        "peak_memory_gib": round(ours["peak_gib"], 3),
        "peak_memory_vs_trainer": round(ours["peak_gib"] / best["trainer"]["peak_gib"], 3),
        "peak_memory_vs_trl": round(ours["peak_gib"] / best["trl"]["peak_gib"], 3),
        "tokens_per_s_vs_trainer_on_same_batches": round(ours["speed"] / bucketed["speed"], 3),
        "peak_memory_vs_trainer_on_same_batches": round(ours["peak_gib"] / bucketed["peak_gib"], 3),
        "loss_max_abs_diff_vs_trainer": max(differences),
        "loss_mean_abs_diff_vs_trainer": statistics.fmean(differences),
        "threads": settings.threads,
        "contenders": results,
    }
    if settings.json:
        settings.json.write_text(json.dumps(summary, indent=1))
    sys.stdout.write(json.dumps(summary) + "\n")


def run_by_turns(settings: argparse.Namespace, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Start a process for each contender, let them run round by round, and gather what they report."""
    running = {name: start(name) for name in names}
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        receive(running[name])  # loaded, and warmed up on one batch
    for place in range(settings.rounds):
        order = names if place % 2 == 0 else names[::-1]
        for name in order:
            told[name].append(ask(running[name]))
            say(f"  round {place + 1}: {name} {told[name][-1]['speed']:.0f} tokens/s")
    for process in running.values():
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(60)
    return {
        name: {
            "speed": statistics.median(r["speed"] for r in rounds),
            "speeds": [round(r["speed"], 1) for r in rounds],
            "speed_per_core": statistics.median(r["speed_per_core"] for r in rounds),
            "padding": rounds[-1]["padding"],
            "peak_gib": max(r["peak_gib"] for r in rounds),
        }
        for name, rounds in told.items()
    }


def start(name: str, *more: str) -> subprocess.Popen[str]:
    """A contender, waiting for its turn; its libraries' words go to its standard error."""
    command = [sys.executable, __file__, *sys.argv[1:], *more, "--contender", name]
    quiet = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    threads = {
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "DISABLE_MLFLOW_INTEGRATION": "TRUE",
        "WANDB_DISABLED": "true",
    }
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | quiet | threads
    )


def receive(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The next JSON line of a contender."""
    line = process.stdout.readline()  # type: ignore[union-attr]
    if not line:
        raise SystemExit(f"a contender ended with status {process.wait()}: see its words above")
    found: dict[str, Any] = json.loads(line)
    return found


def ask(process: subprocess.Popen[str]) -> dict[str, Any]:
    """One round of a contender."""
    process.stdin.write("round\n")  # type: ignore[union-attr]
    process.stdin.flush()  # type: ignore[union-attr]
    return receive(process)


def contend(settings: argparse.Namespace) -> None:
    """The child's side: load, warm up, then a round for each line read."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print to standard output
    import torch
    import transformers
    from contenders import CONTENDERS, Workload

    from regraft.training.memory import freed_memory_kept

    torch.set_num_threads(settings.threads)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    work = Workload.load(settings, chats)
    contender = CONTENDERS[settings.contender]
    with tempfile.TemporaryDirectory() as folder:
        run = contender(work, Path(folder))
        if not settings.contender.endswith("_parity"):
            run(work.rows[:4])
        answers.write("{}\n")
        for _ in sys.stdin:
            began, used = time.perf_counter(), time.process_time()
            report = run(work.rows)
            took, used = time.perf_counter() - began, time.process_time() - used
            real = sum(len(r.ids) for r in work.rows)
            report |= {"speed": real / took, "speed_per_core": real / used, "peak_gib": work.peak_gib()}
            if "computed" in report:
                report["padding"] = 1 - real / report["computed"]
            with freed_memory_kept("cpu"):
                gc.collect()  # and give it back: those who wait hold no more than their model
            answers.write(json.dumps(report) + "\n")


def parity(settings: argparse.Namespace) -> list[float]:
    """Absolute differences of the losses, step by step, of Regraft and Trainer on the same batches."""
    losses: list[list[float]] = []
    for name in ("regraft_parity", "trainer_parity"):
        process = start(name, "--tokens-per-batch", "512")  # more steps of the same chats
        receive(process)
        losses.append(ask(process)["losses"])
        process.stdin.close()  # type: ignore[union-attr]
        process.wait(60)
    return [abs(a - b) for a, b in zip(*losses, strict=True)]


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
