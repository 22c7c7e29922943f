"""Time and error of the training kernels beside the libraries' own, in bf16 on one thread.

Errors are relative, of output and gradients together, against the same in fp64. Ratios are times: theirs over
ours, forward and backward. The last line is one JSON object.

    python benchmarks/training_kernels.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from regraft.training.kernels.blocks import attend
from regraft.training.kernels.cross_entropy import linear_cross_entropy
from regraft.training.kernels.norm import _function as norm

Form = Callable[..., torch.Tensor]


def attention_case(rows: int, length: int) -> tuple[Form, Form, list[torch.Tensor]]:
    """SmolLM2-135M's heads: nine of queries, three of keys, 64 wide."""

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        k, v = (t[:, :, None].expand(rows, 3, 3, length, 64).reshape(rows, 9, length, 64) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    inputs = [2 * torch.randn(rows, length, heads, 64).transpose(1, 2) for heads in (9, 3, 3)]
    return lambda *a: attend(*a, 64**-0.5).transpose(1, 2), theirs, inputs


def norm_case(positions: int) -> tuple[Form, Form, list[torch.Tensor]]:
    """Width 576."""
    module = LlamaRMSNorm(576, 1e-5).requires_grad_(False)
    ours = norm()

    def theirs(x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = module.to(x.dtype)(x)
        return found

    return lambda x: ours(x, module.weight.to(x.dtype), 1e-5), theirs, [torch.randn(positions, 576)]


def loss_case(positions: int) -> tuple[Form, Form, list[torch.Tensor]]:
    """A vocabulary of 49,152, with a frozen head."""
    weight = torch.randn(49_152, 576) / 24
    targets = torch.randint(0, 49_152, (positions,))

    def theirs(h: torch.Tensor) -> torch.Tensor:
        logits = h @ weight.to(h.dtype).t()
        return F.cross_entropy(
            logits if h.dtype is torch.float64 else logits.float(), targets, reduction="sum"
        )

    narrow = weight.bfloat16()
    return lambda h: linear_cross_entropy(h, narrow, None, targets), theirs, [torch.randn(positions, 576)]


def run(form: Form, inputs: Sequence[torch.Tensor], kind: torch.dtype) -> list[torch.Tensor]:
    """Output and gradients."""
    leaves = [t.to(kind).requires_grad_() for t in inputs]
    found = form(*leaves)
    torch.manual_seed(1)
    found.backward(torch.randn(found.shape).to(found.dtype))
    return [found.detach(), *(t.grad for t in leaves if t.grad is not None)]


def error(found: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The mean over the tensors of the relative distance."""
    pairs = [(a.double(), b.double()) for a, b in zip(found, right, strict=True)]
    return statistics.fmean(float((a - b).norm() / b.norm()) for a, b in pairs)


def milliseconds(work: Callable[[], Any], seconds: float) -> float:
    """Processor time of one call."""
    work()
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds:
        work()
        count += 1
    return (time.process_time() - began) / count * 1e3


def main() -> None:
    """Run all cases and print the table and one JSON object."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument("--quick", action="store_true", help="a third of the time a case")
    seconds = 0.3 if words.parse_args().quick else 1.0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cases = {
        f"attention {r}x{n}": attention_case(r, n)
        for r, n in ((16, 64), (8, 128), (4, 256), (2, 512), (1, 1024))
    }
    cases |= {"norm 1024x576": norm_case(1024), "loss 300 positions": loss_case(300)}
    table = {}
    sys.stdout.write(
        f"{'':20} {'theirs ms':>10} {'ours ms':>8} {'ratio':>6} {'their error':>12} {'ours':>8}\n"
    )
    for name, (ours, theirs, inputs) in cases.items():
        right = run(theirs, inputs, torch.float64)
        errors = [error(run(form, inputs, torch.bfloat16), right) for form in (theirs, ours)]
        times = [milliseconds(partial(run, form, inputs, torch.bfloat16), seconds) for form in (theirs, ours)]
        table[name] = {"ratio": round(times[0] / times[1], 2), "error": errors[1], "their_error": errors[0]}
        sys.stdout.write(
            f"{name:20} {times[0]:10.2f} {times[1]:8.2f} {times[0] / times[1]:6.2f} "
            f"{errors[0]:12.1e} {errors[1]:8.1e}\n"
        )
    sys.stdout.write(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
