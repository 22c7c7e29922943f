"""How much memory a trial needs and took. Figures are GiB of this process, or of its CUDA device."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import psutil

from regraft.errors import InfeasibleTrialError
from regraft.methods import Method
from regraft.methods.base import DTypeName

GIB = 2**30
#: Imports, tokenizer, activations of a small batch: what a trial needs beside its weights. Measured on
#: SmolLM2-135M at 512 tokens a batch; a lower bound for larger models and batches.
_FLOOR_GIB = 0.8


def reset_peak(device: str) -> None:
    """Start measuring a new peak."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: a reused process starts afresh
    except OSError:
        return  # not Linux, or not allowed: the peak is then that of the process's life


def peak_gib(device: str) -> float:
    """The peak since `reset_peak`."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.max_memory_allocated()) / GIB
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / GIB
    except OSError:
        pass  # no procfs: the next best figure
    import resource

    scale = 1 if os.uname().sysname == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / GIB


def parameter_count(model: Path) -> int:
    """Parameters of a model on disk, from the safetensors headers alone."""
    total = 0
    for file in model.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            count = 1
            for size in entry["shape"]:
                count *= size
            total += count
    return total


def least_gib(method: Method, model: Path, dtype: DTypeName, shards: int = 1) -> float:
    """A lower bound of what a worker needs: weights, gradients and optimiser state, without activations.

    Full fine-tuning holds fp32 weights, gradients and two AdamW moments: 16 bytes a parameter. Everything
    else holds the frozen base: 2 or 4 bytes a parameter, about 1 in NF4 with its embeddings unquantised.
    """
    parameters = parameter_count(model)
    frozen = 1 if method.quantised else (2 if dtype == "bfloat16" else 4)
    return parameters * (16 if method.kind == "full" else frozen) / shards / GIB + _FLOOR_GIB


def require_memory(
    method: Method, model: Path, dtype: DTypeName, device: str, limit_gib: float | None, shards: int = 1
) -> None:
    """Refuse a trial that cannot fit.

    Raises:
        InfeasibleTrialError: With what it needs and what there is.
    """
    need = least_gib(method, model, dtype, shards)
    if limit_gib is not None and need > limit_gib:
        raise InfeasibleTrialError(
            f"memory: {method.label} needs at least {need:.1f} GiB, sweep.trial_memory_gib is {limit_gib:g}"
        )
    if device.startswith("cuda"):
        import torch

        free = torch.cuda.mem_get_info()[0] / GIB
    else:
        free = psutil.virtual_memory().available / GIB
    if need > free:
        raise InfeasibleTrialError(
            f"memory: {method.label} needs at least {need:.1f} GiB, {free:.1f} are free"
        )
