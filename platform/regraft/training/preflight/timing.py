"""How long training takes, from its operations and the measured rate of matrix products."""

from __future__ import annotations

from pathlib import Path

from regraft.methods import Method
from regraft.training.preflight.memory import Batching
from regraft.training.preflight.shapes import shape_of, trained_by

#: Share of the matrix rate that the loop reaches on a CPU: the median of `benchmarks/preflight.py`. That of
#: a GPU is assumed; nobody has measured it yet.
UTILISATION = {"cpu": 0.62, "cuda": 0.4}
#: AdamW reads four fp32 values a parameter and writes three, at the rate of this memory (bytes a second).
_OPTIMISER_BYTES, _MEMORY_RATE = 28, {"cpu": 2e10, "cuda": 1e12}


def flops_per_token(method: Method, folder: Path, batching: Batching, supervised: float = 0.3) -> float:
    """Floating-point operations of training on one token.

    Two a weight forward and two for the gradient that passes on; two more where the weights train, and two
    where the forward pass is run again. The head counts at supervised positions only. Attention over half the
    length limit: four forward, ten backward with the scores taken again.
    """
    shape = shape_of(folder)
    trained = trained_by(method, folder)
    forward = 2.0 * shape.linear
    total = forward * (2 + batching.gradient_checkpointing + (method.kind == "full"))
    total += 0 if method.kind == "full" else 6 * trained
    total += supervised * shape.vocabulary * shape.hidden * (6 if method.kind == "full" else 4)
    return total + 14 * shape.layers * shape.queries * batching.max_length / 4


def seconds(
    method: Method, folder: Path, batching: Batching, tokens: float, rate: float, device: str = "cpu"
) -> float:
    """How long training on a number of tokens takes.

    Args:
        method: With all its settings.
        folder: With the base's `config.json`.
        batching: What passes at once.
        tokens: Of the whole run, on one worker.
        rate: What `matmul_rate` gave for the device.
        device: Where it trains.
    """
    where = device.partition(":")[0]
    work = tokens * flops_per_token(method, folder, batching) * method.slowness
    steps = tokens / batching.tokens_per_batch
    optimiser = steps * trained_by(method, folder) * _OPTIMISER_BYTES / _MEMORY_RATE[where]
    return work / (rate * UTILISATION[where]) + optimiser


def matmul_rate(threads: int | None = None, device: str = "cpu") -> float:
    """Operations a second of a device's bf16 matrix product, from a tenth of a second of them."""
    import time

    import torch

    if device.startswith("cuda"):
        left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
        left @ right
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(16):
            left @ right
        torch.cuda.synchronize(device)
        return 16 * 2 * 8192**3 / (time.perf_counter() - began)
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        left, right = torch.randn(512, 1024).bfloat16(), torch.randn(1024, 1024).bfloat16()
        left @ right
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < 0.1:
            left @ right
            count += 1
        return 2 * 512 * 1024 * 1024 * count / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
