"""How much memory a trial needs and took. Figures are GiB of this process, or of its CUDA device."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

from regraft.errors import InfeasibleTrialError
from regraft.methods import Method
from regraft.methods.base import DTypeName
from regraft.training.preflight import Batching, predict

GIB = 2**30
#: glibc's `mallopt`: from which size on memory is mapped apart, and from which size on it is given back.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
#: No trial is refused within this factor of the prediction (`docs/preflight.md` has its errors).
_MARGIN = 1.25


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


@contextmanager
def freed_memory_kept(device: str) -> Iterator[None]:
    """While open, memory that a CPU's tensors leave is kept for the next ones; then it is given back.

    Otherwise some of the activations' memory is mapped anew in every pass and cleared page by page, and a
    reused process keeps what its last trial needed: 0.8 GiB of LoRA on SmolLM2. Only glibc knows how;
    elsewhere nothing changes.
    """
    libc = _glibc() if device == "cpu" else None
    if libc is None:
        yield
        return
    libc.mallopt(_MMAP_THRESHOLD, 2**30)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc chooses by itself
        libc.mallopt(_TRIM_THRESHOLD, 64 * 2**20)
        libc.malloc_trim(0)


@cache
def _glibc() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL("libc.so.6")
        return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
    except OSError:
        return None


def device_gib(device: str) -> float | None:
    """All memory of a GPU, in GiB; None for a CPU, whose processes share what there is."""
    if not device.startswith("cuda"):
        return None
    import torch

    return float(torch.cuda.get_device_properties(device).total_memory) / GIB


def least_gib(
    method: Method, model: Path, dtype: DTypeName, device: str = "cpu", batching: Batching | None = None
) -> float:
    """What a trial needs if the prediction was as far too high as predictions have been."""
    return predict(method, model, dtype, device, batching).training_gib / _MARGIN


def require_memory(
    method: Method,
    model: Path,
    dtype: DTypeName,
    device: str,
    limit_gib: float | None,
    batching: Batching | None = None,
) -> None:
    """Refuse a trial that cannot fit, even if the prediction is as far off as any was.

    Raises:
        InfeasibleTrialError: With what it needs and what there is.
    """
    need = least_gib(method, model, dtype, device, batching)
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
