"""How much of a device's matrix rate training reaches (model FLOPs utilisation), and the memory it takes.

LoRA, QLoRA and full fine-tuning on models of published shapes with random weights, on packed rows of random
tokens. The roofline is the rate of a large bf16 product on the same device in the same run. Operations are
those that the method needs: two a weight forward, two for the gradient that passes on, two more where the
weight trains; what is computed again does not count. What is predicted not to fit is left out, with its
reason.

    python benchmarks/mfu.py                    # 1b and 8b on a GPU
    python benchmarks/mfu.py --shapes 1b --quick
    python benchmarks/mfu.py --shapes smol      # what a CPU can do

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

#: Sizes of Llama 3.2 1B and Llama 3.1 8B by their published configurations, and of SmolLM2 135M.
SHAPES: dict[str, dict[str, Any]] = {
    "smol": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49_152, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS: list[dict[str, Any]] = [
    {"name": "lora", "rank": 16},
    {"name": "qlora", "rank": 16},
    {"name": "full", "learning_rate": 1e-5},
]


def main() -> None:
    """Run the cases one after another, a process each, and print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--shapes", nargs="*", choices=list(SHAPES), help="models; 1b and 8b, on a CPU smol")
    words.add_argument("--tokens-per-batch", type=int, help="16384 on a GPU, 1024 on a CPU")
    words.add_argument("--length", type=int, help="of the longest rows; 2048 on a GPU, 512 on a CPU")
    words.add_argument("--steps", type=int, help="measured after a first one; 8, with --quick 3")
    words.add_argument("--quick", action="store_true", help="fewer steps: under five minutes on two cores")
    words.add_argument("--compile", action="store_true", help="compile the decoder's layers")
    words.add_argument("--scratch", type=Path, help="where the models are written; a temporary folder")
    words.add_argument("--case", help=argparse.SUPPRESS)
    settings = words.parse_args()
    if settings.case:
        sys.stdout.write(json.dumps(measure(**json.loads(settings.case))) + "\n")
        return
    import torch

    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    case = {
        "tokens": settings.tokens_per_batch or (16_384 if on_gpu else 1024),
        "length": settings.length or (2048 if on_gpu else 512),
        "steps": settings.steps or (3 if settings.quick else 8),
        "device": device,
        "compiled": settings.compile,
    }
    what = torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    say(f"{what}; {case['tokens']} tokens a step, rows of up to {case['length']}\n")
    say("| model | method | tokens/s | MFU | GiB predicted | peak | |")
    say("|---|---|---|---|---|---|---|")
    results = []
    with tempfile.TemporaryDirectory(dir=settings.scratch) as scratch:
        for shape in settings.shapes or (["1b", "8b"] if on_gpu else ["smol"]):
            folder = written(shape, Path(scratch), device)
            for method in METHODS:
                results.append({"model": shape, **run(case | {"folder": str(folder), "settings": method})})
                say(row(results[-1]))
    say(json.dumps({"device": what, **case, "results": results}))


def run(case: dict[str, Any]) -> dict[str, Any]:
    """One case in a process of its own, so that its peak is its own."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return {"method": case["settings"]["name"], "left_out": f"ended with status {done.returncode}"}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def row(found: dict[str, Any]) -> str:
    """A line of the table."""
    if "left_out" in found:
        return f"| {found['model']} | {found['method']} | – | – | – | – | {found['left_out']} |"
    return (
        f"| {found['model']} | {found['method']} | {found['tokens_per_s']:.0f} | {found['mfu']:.0%} "
        f"| {found['predicted_gib']:.1f} | {found['peak_gib']:.1f} "
        f"| of {found['roofline'] / 1e12:.2f} TFLOP/s |"
    )


def written(shape: str, scratch: Path, device: str) -> Path:
    """A model of a shape with random weights, in bf16 safetensors."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = scratch / shape
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=8192))
        model.save_pretrained(folder, safe_serialization=True)
    finally:
        torch.set_default_dtype(torch.float32)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def measure(
    folder: str,
    settings: dict[str, Any],
    tokens: int,
    length: int,
    steps: int,
    device: str,
    compiled: bool,
) -> dict[str, Any]:
    """Train some steps; gives speed, utilisation and peak memory."""
    from regraft.methods import parse_method
    from regraft.training.batches import IGNORED, Encoded
    from regraft.training.loop import train
    from regraft.training.memory import device_gib, peak_gib, reset_peak
    from regraft.training.preflight import Batching, flops_per_token, matmul_rate, predict
    from regraft.training.steps import LoopSettings

    method, path = parse_method(settings), Path(folder)
    batching = Batching(tokens, length)
    predicted = predict(method, path, "bfloat16", device, batching).training_gib
    there = device_gib(device)
    if there is not None and predicted > there:
        return {
            "method": method.label,
            "left_out": f"predicted to need {predicted:.0f} GiB, the device has {there:.0f}",
        }
    roofline = matmul_rate(device=device)
    reset_peak(device)
    base = method.load_base(path, "bfloat16", device)
    model = method.apply(base)
    draw = random.Random(0)
    rows: list[Encoded] = []
    held = warm = 0
    while held < (steps + 1) * tokens:
        ids = tuple(
            draw.randrange(3, base.config.vocab_size) for _ in range(draw.randrange(length // 4, length))
        )
        prompt = 7 * len(ids) // 10
        rows.append(Encoded(ids, (IGNORED,) * prompt + ids[prompt:]))
        held += len(ids)
        warm += held <= tokens
    loop = LoopSettings(method.learning_rate, 1.0, tokens, evaluations=1, packing=True, compile=compiled)
    common: dict[str, Any] = {"pad_id": 0, "device": device, "report": lambda _: None}
    train(model, base, rows[:warm], rows[:1], loop, **common)
    done = train(model, base, rows[warm:], rows[:1], loop, hooks=method.hooks(model), **common)
    speed = done.tokens_seen / done.seconds
    supervised = sum(r.supervised for r in rows) / held
    mean = batching._replace(max_length=2 * held // len(rows))  # twice the mean is taken for the limit
    return {
        "method": method.label,
        "tokens_per_s": speed,
        "mfu": speed * flops_per_token(method, path, mean, supervised) / roofline,
        "roofline": roofline,
        "predicted_gib": predicted,
        "peak_gib": peak_gib(device),
    }


def say(line: str) -> None:
    """Print at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
