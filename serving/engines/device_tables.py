"""A set of adapters as the kernels of a GPU read it, for layers that read the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from serving.engines.adapters import Adapter
from serving.engines.tables import Tables

#: Outputs of a program, at most and at least: as many as the widths of all layers can be divided by.
_MOST, _LEAST = 128, 16


class Group(NamedTuple):
    """What a set of adapters changes in layers that read the same.

    Attributes:
        layers: How many there are.
        most: The highest rank.
        down: A of all adapters and layers, one below the other: (all ranks, inputs), in fp32.
        up: Their B, each of shape (rank, outputs of its layer), one behind the other.
        ranks: By place and layer: where A begins, its rank, where B begins; of shape (places, layers, 3).
        block: Outputs of a program.
        blocks: Which layer each block of outputs is of.
        layout: By layer: its first output, its outputs, and where in `vectors` scales and shifts of outputs
            begin, or -1; of shape (layers, 4).
        vectors: Of (places, widths).
        scaled: Whether any outputs are scaled or shifted.
        in_scales: By layer: columns of `vectors` with scales of its inputs, or None.
    """

    layers: int
    most: int
    down: torch.Tensor
    up: torch.Tensor
    ranks: torch.Tensor
    block: int
    blocks: torch.Tensor
    layout: torch.Tensor
    vectors: torch.Tensor
    scaled: bool
    in_scales: tuple[slice | None, ...]


def block_of(sizes: Sequence[int]) -> int:
    """Outputs of a program for layers of so many outputs; 0 if there is no good number."""
    block = _MOST
    while block >= _LEAST:
        if all(size % block == 0 for size in sizes):
            return block
        block //= 2
    return 0


def group(
    tables: Tables, adapters: Sequence[Adapter], names: Sequence[str], sizes: Sequence[int]
) -> Group | None:
    """Put together what a set changes in some layers.

    Args:
        tables: Of the set.
        adapters: The set.
        names: Of the layers.
        sizes: Their outputs.

    Returns:
        It; None if it changes nothing there.
    """
    known = [tables.layers.get(name) for name in names]
    if not any(known):
        return None
    downs: list[torch.Tensor] = []
    ups: list[torch.Tensor] = []
    ranks = torch.zeros(len(adapters), len(names), 3, dtype=torch.long)
    rows = numbers = 0
    for place, adapter in enumerate(adapters):
        for layer, name in enumerate(names):
            if name not in adapter.low_rank:
                continue
            down, up = adapter.low_rank[name]
            scale = adapter.out_scale.get(name)
            ranks[place, layer] = torch.tensor([rows, len(down), numbers])
            downs.append(down)
            ups.append((up if scale is None else up * scale[:, None]).t().reshape(-1))
            rows, numbers = rows + len(down), numbers + up.numel()
    layout, begin = [], 0
    for own, size in zip(known, sizes, strict=True):
        scale_at = -1 if own is None or own.out_scale is None else own.out_scale.start
        shift_at = -1 if own is None or own.out_shift is None else own.out_shift.start
        layout.append([begin, size, scale_at, shift_at])
        begin += size
    block = block_of(sizes)
    blocks = [layer for layer, size in enumerate(sizes) for _ in range(size // block)]
    some = next(
        t
        for a in adapters
        for t in (*(p[0] for p in a.low_rank.values()), *a.in_scale.values(), *a.out_scale.values())
    )
    device = some.device
    nothing = torch.zeros(1, 1, device=device)
    return Group(
        layers=len(names),
        most=int(ranks[..., 1].max()),
        down=torch.cat(downs).contiguous() if downs else nothing,
        up=torch.cat(ups) if ups else nothing,
        ranks=ranks.to(device),
        block=block,
        blocks=torch.tensor(blocks, device=device),
        layout=torch.tensor(layout, device=device),
        vectors=nothing if tables.wide is None else tables.wide,
        scaled=any(entry[2] >= 0 or entry[3] >= 0 for entry in layout),
        in_scales=tuple(None if own is None else own.in_scale for own in known),
    )


def part(of: Group, index: int) -> Group | None:
    """One of its layers, for itself; None if nothing is changed there."""
    ranks, in_scale = of.ranks[:, index : index + 1], of.in_scales[index]
    _, size, scale_at, shift_at = of.layout[index].tolist()
    most, scaled = int(ranks[..., 1].max()), scale_at >= 0 or shift_at >= 0
    if not most and not scaled and in_scale is None:
        return None
    return of._replace(
        layers=1,
        most=most,
        ranks=ranks.contiguous(),
        blocks=torch.zeros_like(of.blocks[: size // of.block]),
        layout=torch.tensor([[0, size, scale_at, shift_at]], device=of.layout.device),
        scaled=scaled,
        in_scales=(in_scale,),
    )
