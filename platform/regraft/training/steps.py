"""The steps of a run: which examples, at which rate, by which optimiser."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.methods.hooks import StepHooks
from regraft.training.batches import Encoded, bucket, split
from regraft.training.distributed import Workers

if TYPE_CHECKING:
    import torch


class LoopSettings(NamedTuple):
    """How to train. Lengths are in tokens."""

    learning_rate: float
    epochs: float
    tokens_per_batch: int
    warmup_fraction: float = 0.1
    max_gradient_norm: float = 1.0
    evaluations: int = 4
    seed: int = 0
    accumulate: int = 1
    schedule: str = "linear"
    weight_decay: float = 0.0
    gradient_checkpointing: bool = False
    micro_tokens: int = 0  #: Most that pass through at once; a batch is cut, its step stays the same.
    packing: bool = False  #: Whether the examples of a batch share one row, without padding.
    compile: bool = False  #: Whether the decoder's layers are compiled (torch.compile).


class Step(NamedTuple):
    """One optimiser step: this worker's micro-batches, and the tokens of all workers."""

    groups: tuple[list[Encoded], ...]
    supervised: int
    tokens: int


def plan_steps(examples: Sequence[Encoded], settings: LoopSettings, workers: Workers) -> list[Step]:
    """This worker's steps, in order; the same number on every worker, whatever their number."""
    rng = random.Random(settings.seed)
    steps: list[Step] = []
    for _ in range(math.ceil(settings.epochs)):
        groups = bucket(examples, settings.tokens_per_batch, rng=rng)
        for start in range(0, len(groups), settings.accumulate * workers.wanted):
            of_all = groups[start : start + settings.accumulate * workers.wanted]
            supervised = sum(e.supervised for group in of_all for e in group)
            tokens = sum(len(e.ids) for group in of_all for e in group)
            pieces = [piece for group in of_all for piece in split(group, settings.micro_tokens)]
            steps.append(Step(tuple(workers.share(pieces)), supervised, tokens))
    return steps[: max(1, math.ceil(len(steps) * settings.epochs / math.ceil(settings.epochs)))]


def share_of_rate(schedule: str, total: int, warmup_fraction: float, step: int) -> float:
    """The learning rate at a step (from 0), as a share of the highest.

    Linear warm-up over the first steps; `linear` falls over the whole run, `cosine` over what follows the
    warm-up, `constant` stays.
    """
    warmup = max(1, round(total * warmup_fraction))
    rising = min(1.0, (step + 1) / warmup)
    if step >= total:
        return 0.0
    if schedule == "linear":
        return rising * (total - step) / total
    if schedule == "cosine":
        done = max(0, step - warmup) / max(1, total - warmup)
        return rising * 0.5 * (1 + math.cos(math.pi * done))
    return rising


def set_rate(optimiser: torch.optim.Optimizer, settings: LoopSettings, total: int, step: int) -> float:
    """Set the learning rate of a step (from 1); gives it."""
    share = share_of_rate(settings.schedule, total, settings.warmup_fraction, step - 1)
    for group in optimiser.param_groups:
        group["lr"] = settings.learning_rate * share
    return settings.learning_rate * share


def make_optimiser(parameters: list[Any], settings: LoopSettings, hooks: StepHooks) -> torch.optim.Optimizer:
    """The method's own, or AdamW; weight decay spares vectors, which are norms, biases and scales."""
    import torch

    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    kept = [g for g in groups if g["params"]]
    chosen = hooks.optimiser(kept, settings.learning_rate)
    return chosen or torch.optim.AdamW(kept, lr=settings.learning_rate, fused=True)
