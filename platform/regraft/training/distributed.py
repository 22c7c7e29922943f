"""Several workers on one trial: who does what, and how they agree. Plain torch.distributed; it knows no Ray.

A step is a fixed list of micro-batches, made for the number of workers that was asked for. Those that are
there take turns at it, so a run that loses a worker goes on with the same steps, only slower.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from regraft.training.batches import IGNORED, Encoded

if TYPE_CHECKING:
    import torch
    from torch import nn


class Workers(NamedTuple):
    """This process's place among those that train together.

    Attributes:
        rank: From 0; the first one records, saves and scores.
        size: How many there are.
        wrap: Makes replicas exchange their gradients, once a step.
        requested: How many were asked for, which decides the steps; `size` if 0.
        shard: Whether each holds a part of the weights alone (FSDP2) instead of a replica.
    """

    rank: int = 0
    size: int = 1
    wrap: Callable[[Any], Any] = lambda model: model
    requested: int = 0
    shard: bool = False

    @property
    def wanted(self) -> int:
        """The number of workers the steps are made for."""
        return self.requested or self.size

    @property
    def shards(self) -> int:
        """The number of parts that the weights are in."""
        return self.size if self.shard else 1

    def share(self, groups: Sequence[list[Encoded]]) -> list[list[Encoded]]:
        """This worker's part of a list of micro-batches, equally long for all workers.

        Workers that exchange weights or gradients run forward together, so one with nothing left to do takes
        a micro-batch without a supervised token, which adds nothing.
        """
        mine = list(groups[self.rank :: self.size])
        if len(mine) * self.size < len(groups) or not mine:
            mine.append([_unsupervised(groups[-1][-1])])
        return mine

    def total(self, value: float) -> float:
        """The sum of a number over all workers."""
        if self.size == 1:
            return value
        import torch
        import torch.distributed as dist

        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        summed: torch.Tensor = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(summed)
        return float(summed)

    def average_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Average the gradients of weights that all have a copy of beside their shards; DDP does its own."""
        import torch
        import torch.distributed as dist

        mine = [p.grad for p in parameters if p.grad is not None]
        if not mine or self.shards == 1:
            return
        flat = torch.cat([g.reshape(-1) for g in mine])
        dist.all_reduce(flat)
        for gradient, part in zip(
            mine, torch.split(flat.div_(self.size), [g.numel() for g in mine]), strict=True
        ):
            gradient.copy_(part.view_as(gradient))

    def first_problem(self, problem: str | None) -> str | None:
        """What kept any of the workers from going on; None if nothing did."""
        if self.size == 1:
            return problem
        import torch.distributed as dist

        found: list[str | None] = [None] * self.size
        dist.all_gather_object(found, problem)
        return next((p for p in found if p is not None), None)

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.size > 1:
            self.total(0.0)


def data_parallel(model: nn.Module) -> nn.Module:
    """A replica whose gradients are averaged with those of its peers (DDP)."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    on_cuda = next(model.parameters()).is_cuda
    return DistributedDataParallel(model, device_ids=[torch.cuda.current_device()] if on_cuda else None)


def _unsupervised(example: Encoded) -> Encoded:
    return Encoded(example.ids, (IGNORED,) * len(example.ids))
