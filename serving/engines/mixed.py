"""Many adapters on one base, mixed in one batch: each row's layers answer as its own adapter says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from serving.engines.adapters import Adapter

#: Sets of adapters whose stacked tensors are kept; a batch of one set is followed by one that is like it.
_KEPT = 4


class _Layer:
    """A layer's tensors for one set of adapters.

    Attributes:
        down: A of all that have one, stacked: (ranks, inputs).
        up: Their B: (outputs, ranks).
        owners: Of each rank the adapter's place in the set: (places, ranks), 1 where it is its own; None if
            all rows are of one adapter.
        in_scale: (places, inputs), or None.
        out_scale: (places, outputs), or None.
        out_shift: (places, outputs), or None.
    """

    __slots__ = ("_at", "_of_rows", "down", "in_scale", "out_scale", "out_shift", "owners", "up")

    def __init__(self, name: str, adapters: Sequence[Adapter]) -> None:
        pairs = [(place, a.low_rank[name]) for place, a in enumerate(adapters) if name in a.low_rank]
        self.down = torch.cat([p[0] for _, p in pairs]).contiguous() if pairs else None
        self.up = torch.cat([p[1] for _, p in pairs], dim=1).contiguous() if pairs else None
        self.owners = None
        if pairs and len(adapters) > 1:
            own = torch.cat([torch.full((len(p[0]),), place) for place, p in pairs])
            places = torch.arange(len(adapters))[:, None]
            self.owners = (own[None] == places).to(pairs[0][1][0])
        self.in_scale = _stacked([a.in_scale.get(name) for a in adapters], 1.0)
        self.out_scale = _stacked([a.out_scale.get(name) for a in adapters], 1.0)
        self.out_shift = _stacked([a.out_shift.get(name) for a in adapters], 0.0)
        self._at, self._of_rows = -1, _OfRows(None, None, None, None)

    def of_rows(self, mix: Mix) -> _OfRows:
        """What each row of the batch has; looked up anew only where the rows are others than before."""
        if self._at != mix.changes:
            found = (self.owners, self.in_scale, self.out_scale, self.out_shift)
            self._of_rows = _OfRows(*(None if t is None else t[mix.rows][:, None] for t in found))
            self._at = mix.changes
        return self._of_rows


class _OfRows(NamedTuple):
    """A layer's tables by row, of shape (rows, 1, width)."""

    owners: torch.Tensor | None
    in_scale: torch.Tensor | None
    out_scale: torch.Tensor | None
    out_shift: torch.Tensor | None


def _stacked(found: Sequence[torch.Tensor | None], otherwise: float) -> torch.Tensor | None:
    """Vectors of several adapters as rows, with a number for those that have none; None if nobody has one."""
    some = next((s for s in found if s is not None), None)
    if some is None:
        return None
    return torch.stack([torch.full_like(some, otherwise) if s is None else s for s in found])


class MixedLinear(nn.Module):
    """A linear layer of the base, with what the adapters of the batch's rows add to it.

    Args:
        name: Of the layer in the base.
        inner: The layer.
        mix: Says what the rows are.
    """

    def __init__(self, name: str, inner: nn.Module, mix: Mix) -> None:
        super().__init__()
        self.name, self.inner, self._mix = name, inner, mix

    @property
    def weight(self) -> Any:
        """The base's own, for code that looks at it."""
        return self.inner.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, of shape (rows, tokens, outputs), for inputs (rows, tokens, inputs)."""
        tables = self._mix.tables
        own = tables.get(self.name) if tables else None
        if own is None:
            return self.inner(x)  # type: ignore[no-any-return]
        here = own.of_rows(self._mix)
        y = self.inner(x if here.in_scale is None else (x * here.in_scale).to(x.dtype))
        if own.down is not None and own.up is not None:
            h = F.linear(x.float(), own.down)
            h = h if here.owners is None else h * here.owners
            y = y + F.linear(h, own.up)
        if here.out_scale is not None:
            y = y * here.out_scale
        if here.out_shift is not None:
            y = y + here.out_shift
        return y.to(x.dtype)  # type: ignore[no-any-return]


class Mix:
    """The adapters of a base, and which row of the present batch has which.

    Args:
        base: The base; its linear layers are wrapped in place as adapters need it.
    """

    def __init__(self, base: Any) -> None:
        self._base = base
        self._adapters: dict[int, Adapter] = {0: Adapter()}
        self._next = 1
        self._wrapped: dict[str, MixedLinear] = {}
        self._stacked: dict[tuple[int, ...], dict[str, _Layer]] = {}
        #: Of the present batch.
        self.tables: dict[str, _Layer] | None = None
        self.rows = torch.zeros(0, dtype=torch.long)
        #: How often the rows were others than before.
        self.changes = 0
        self._numbers: tuple[int, ...] = ()

    def add(self, adapter: Adapter) -> int:
        """Take an adapter in; gives its number."""
        for name in {*adapter.low_rank, *adapter.in_scale, *adapter.out_scale}:
            if name not in self._wrapped:
                parent, _, last = name.rpartition(".")
                inner = self._base.get_submodule(name)
                self._wrapped[name] = MixedLinear(name, inner, self)
                setattr(self._base.get_submodule(parent), last, self._wrapped[name])
        number, self._next = self._next, self._next + 1
        self._adapters[number] = adapter
        return number

    def remove(self, number: int) -> None:
        """Let an adapter go; no row may have it any more."""
        del self._adapters[number]
        self._stacked = {key: tables for key, tables in self._stacked.items() if number not in key}

    def adapter(self, number: int) -> Adapter:
        """One of them; 0 is the base alone."""
        return self._adapters[number]

    def select(self, numbers: Sequence[int]) -> None:
        """Say what the rows of the next forward pass are, by the numbers of their adapters."""
        if tuple(numbers) == self._numbers:
            return
        self._numbers, self.changes = tuple(numbers), self.changes + 1
        active = tuple(sorted({n for n in numbers if self._changes_layers(n)}))
        if not active:
            self.tables = None
            return
        alone = len(active) == 1 and all(n == active[0] for n in numbers)
        # Rows of the base alone have a place of their own, of which nothing is any adapter's.
        key = active if alone else (0, *active)
        if key not in self._stacked:
            while len(self._stacked) >= _KEPT:
                self._stacked.pop(next(iter(self._stacked)))
            adapters = [self._adapters[n] for n in key]
            names = {name for a in adapters for name in (*a.low_rank, *a.in_scale, *a.out_scale)}
            self._stacked[key] = {name: _Layer(name, adapters) for name in names}
        self.tables = self._stacked[key]
        places = {n: place for place, n in enumerate(key)}
        where = [0 if alone else places.get(n, 0) for n in numbers]
        self.rows = torch.tensor(where, device=self._base.device)

    def _changes_layers(self, number: int) -> bool:
        adapter = self._adapters[number]
        return bool(adapter.low_rank or adapter.in_scale or adapter.out_scale)
