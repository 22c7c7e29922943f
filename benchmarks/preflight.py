"""Predicted beside measured: peak memory and time of training, a fresh process for each case.

Every case trains three steps on chats of random tokens, on SmolLM2-135M and on two shapes made on the spot
with random weights, so that no single model is fitted. The last line is one JSON object with the errors:
predicted over measured, less one.

    python benchmarks/preflight.py --quick
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Shapes beside the bundled model: wider with few layers, and deep with a small vocabulary.
SHAPES = {
    "wide": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "num_attention_heads": 16,
        "num_key_value_heads": 4, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
    "deep": {
        "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 40, "num_attention_heads": 8,
        "num_key_value_heads": 8, "vocab_size": 8_000, "tie_word_embeddings": True,
    },
}  # fmt: skip
QUICK = [
    ("smollm2", {"name": "lora"}, 1024, False),
    ("smollm2", {"name": "lora"}, 4096, False),
    ("smollm2", {"name": "lora"}, 4096, True),
    ("smollm2", {"name": "full"}, 1024, False),
    ("smollm2", {"name": "qlora"}, 1024, False),
    ("smollm2", {"name": "prompt_tuning"}, 1024, False),
    ("wide", {"name": "lora"}, 2048, False),
    ("deep", {"name": "lora"}, 2048, False),
]
MORE = [
    ("smollm2", {"name": "lora", "rank": 64}, 1024, False),
    ("smollm2", {"name": "dora"}, 1024, False),
    ("smollm2", {"name": "ia3"}, 2048, False),
    ("smollm2", {"name": "oft"}, 2048, False),
    ("smollm2", {"name": "vera"}, 2048, False),
    ("smollm2", {"name": "adalora"}, 1024, False),
    ("smollm2", {"name": "loha"}, 1024, False),
    ("smollm2", {"name": "lokr"}, 1024, False),
    ("smollm2", {"name": "p_tuning"}, 2048, False),
    ("smollm2", {"name": "prefix_tuning"}, 2048, False),
    ("wide", {"name": "lora"}, 4096, True),
    ("smollm2", {"name": "full"}, 2048, True),
    ("smollm2", {"name": "prompt_tuning"}, 4096, False),
    ("wide", {"name": "full"}, 1024, False),
    ("wide", {"name": "qlora", "rank": 32}, 2048, False),
    ("deep", {"name": "full"}, 2048, False),
    ("deep", {"name": "ia3"}, 2048, False),
]


def main() -> None:
    """Run the cases one after another and print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="eight cases: under five minutes on two cores")
    words.add_argument("--model", default="bundled:smollm2-135m-instruct", help="in place of SmolLM2")
    words.add_argument("--threads", type=int, default=1)
    words.add_argument("--case", help=argparse.SUPPRESS)
    settings = words.parse_args()
    if settings.case:
        sys.stdout.write(json.dumps(measure(**json.loads(settings.case))) + "\n")
        return
    from regraft.methods import parse_method
    from regraft.models import resolve
    from regraft.training.preflight import UTILISATION, Batching, matmul_rate, predict, seconds

    rate = matmul_rate(settings.threads)
    sys.stdout.write(f"bf16 products at {rate / 1e9:.0f} GFLOP/s\n\n")
    sys.stdout.write(
        "| model | method | tokens | checkpointing | GiB predicted | measured | error "
        "| s predicted | measured | error |\n"
    )
    sys.stdout.write("|---|---|---|---|---|---|---|---|---|---|\n")
    errors, late = [], []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"smollm2": resolve(settings.model).path} | made(Path(scratch))
        for name, method, tokens, again in QUICK if settings.quick else QUICK + MORE:
            case = {"folder": str(folders[name]), "settings": method, "tokens": tokens, "again": again}
            case |= {"threads": settings.threads}
            done = subprocess.run(
                [sys.executable, __file__, "--case", json.dumps(case)],
                stdout=subprocess.PIPE, text=True, check=True,
            )  # fmt: skip
            found = json.loads(done.stdout.splitlines()[-1])
            parsed = parse_method(method)
            batching = Batching(tokens, 512, again)
            memory = predict(parsed, folders[name], "bfloat16", "cpu", batching)
            error = memory.training_gib / found["peak_gib"] - 1
            errors.append(error)
            expected = seconds(parsed, folders[name], batching, found["tokens"], rate)
            late.append(expected / found["seconds"] - 1)
            sys.stdout.write(
                f"| {name} | {parsed.label} | {tokens} | {'yes' if again else 'no'} "
                f"| {memory.training_gib:.2f} | {found['peak_gib']:.2f} | {error:+.0%} "
                f"| {expected:.1f} | {found['seconds']:.1f} | {late[-1]:+.0%} |\n"
            )
            sys.stdout.flush()
    summary = {
        "memory_median_abs_error": round(statistics.median(map(abs, errors)), 3),
        "memory_max_abs_error": round(max(map(abs, errors)), 3),
        "memory_errors": [round(e, 3) for e in errors],
        "time_median_abs_error": round(statistics.median(map(abs, late)), 3),
        "time_max_abs_error": round(max(map(abs, late)), 3),
        "time_errors": [round(e, 3) for e in late],
        "share_of_matmul_rate": UTILISATION["cpu"],
    }
    sys.stdout.write(json.dumps(summary) + "\n")


def made(scratch: Path) -> dict[str, Path]:
    """The random models, saved in bf16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = {}
    for name, sizes in SHAPES.items():
        folders[name] = scratch / name
        LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16).save_pretrained(folders[name])
    return folders


def measure(
    folder: str, settings: dict[str, Any], tokens: int, again: bool, threads: int
) -> dict[str, float]:
    """Train four full steps after a first one; gives this process's peak, and their seconds."""
    import torch

    from regraft.methods import parse_method
    from regraft.training.batches import IGNORED, Encoded
    from regraft.training.loop import train
    from regraft.training.memory import peak_gib, reset_peak
    from regraft.training.steps import LoopSettings

    torch.set_num_threads(threads)
    method = parse_method(settings)
    if "initial_text" in type(method).model_fields:
        method = method.model_copy(update={"initial_text": None})
    reset_peak("cpu")
    base = method.load_base(Path(folder), "bfloat16", "cpu")
    model = method.apply(base)
    draw = random.Random(0)
    rows = []
    for _ in range(4 * tokens // 256):
        ids = tuple(draw.randrange(3, base.config.vocab_size) for _ in range(256))
        rows.append(Encoded(ids, (IGNORED,) * 176 + ids[176:]))
    loop = LoopSettings(
        1e-4, 1.0, tokens, evaluations=1, gradient_checkpointing=again, packing=method.support.packs
    )
    train(model, base, rows[: tokens // 256], rows[:1], loop, pad_id=0, device="cpu", report=lambda _: None)
    hooks = method.hooks(model)
    done = train(
        model, base, rows, rows[:1], loop, pad_id=0, device="cpu", report=lambda _: None, hooks=hooks
    )
    return {"tokens": done.tokens_seen, "seconds": done.seconds, "peak_gib": peak_gib("cpu")}


if __name__ == "__main__":
    main()
