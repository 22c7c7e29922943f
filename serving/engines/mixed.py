"""Many adapters on one base, mixed in one batch: each row's layers answer as its own adapter says."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import nn

from serving.engines.adapters import Adapter

#: Sets of adapters whose stacked tensors are kept; a batch of one set is followed by one that is like it.
_KEPT = 4
#: On a GPU prompts of more spans than these go through all adapters together. Measured on an H100: a span
#: costs as many launches as all adapters do.
_FEW_SPANS = 1


class _Layer:
    """A layer's tensors for one set of adapters, for batches whose rows go through all adapters.

    Attributes:
        down: A of all that have one, stacked: (inputs, ranks).
        up: Their B, with the scales of their outputs in it: (ranks, outputs).
        owners: Of each rank the adapter's place in the set: (places, ranks), 1 where it is its own; None if
            all rows are of one adapter.
        in_scale: (places, inputs), or None.
        out_scale: (places, outputs), or None.
        out_shift: (places, outputs), or None.
    """

    __slots__ = ("_at", "_of_rows", "down", "in_scale", "out_scale", "out_shift", "owners", "up")

    def __init__(self, name: str, adapters: Sequence[Adapter]) -> None:
        found = [
            (place, a.low_rank[name], a.out_scale.get(name))
            for place, a in enumerate(adapters)
            if name in a.low_rank
        ]
        ups = [up if scale is None else up * scale[:, None] for _, (_, up), scale in found]
        self.down = torch.cat([down for _, (down, _), _ in found]).t().contiguous() if found else None
        self.up = torch.cat(ups, dim=1).t().contiguous() if found else None
        self.owners = None
        if self.down is not None and len(adapters) > 1:
            own = torch.cat([torch.full((len(pair[0]),), place) for place, pair, _ in found])
            places = torch.arange(len(adapters))[:, None]
            self.owners = (own[None] == places).to(self.down)
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


class _Tables:
    """The layers' tensors for one set of adapters, made when they are asked for.

    Attributes:
        names: Of the layers that any of the adapters changes.
    """

    def __init__(self, adapters: Sequence[Adapter]) -> None:
        self.names = {name for a in adapters for name in (*a.low_rank, *a.in_scale, *a.out_scale)}
        self._adapters = adapters
        self._layers: dict[str, _Layer] = {}

    def layer(self, name: str) -> _Layer:
        """One of `names`."""
        if name not in self._layers:
            self._layers[name] = _Layer(name, self._adapters)
        return self._layers[name]


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
        if tables is None or self.name not in tables.names:
            return self.inner(x)  # type: ignore[no-any-return]
        if x.shape[1] > 1 and self._mix.spans_apart:
            return self._by_span(x)
        return self._together(x, tables.layer(self.name))

    def _together(self, x: torch.Tensor, own: _Layer) -> torch.Tensor:
        """Rows in any order: each goes through all adapters, of which its own counts."""
        here = own.of_rows(self._mix)
        y: torch.Tensor = self.inner(x if here.in_scale is None else (x * here.in_scale).to(x.dtype))
        if own.down is not None and own.up is not None:
            h = torch.mm(x.flatten(0, 1).float(), own.down)
            if here.owners is not None:
                h.view(*x.shape[:2], -1).mul_(here.owners)
            added = torch.mm(h, own.up).view(y.shape)
            y = added.add_(y) if here.out_scale is None else added.addcmul_(y.float(), here.out_scale)
        elif here.out_scale is not None:
            y = y * here.out_scale
        if here.out_shift is not None:
            y = y + here.out_shift
        return y.to(x.dtype)

    def _by_span(self, x: torch.Tensor) -> torch.Tensor:
        """Rows with many tokens: neighbours of one adapter go through that alone, others through none."""
        name, spans = self.name, self._mix.spans
        scaled = [(rows, a.in_scale[name]) for rows, a in spans if name in a.in_scale]
        read = x.clone() if scaled else x
        for rows, of_inputs in scaled:
            read[rows] = x[rows] * of_inputs
        y = self.inner(read)
        for rows, adapter in spans:
            pair, scale = adapter.low_rank.get(name), adapter.out_scale.get(name)
            if pair is None and scale is None:
                continue
            here = y[rows].view(-1, y.shape[-1])
            sums = here.float()
            if pair is not None:
                down, up = pair
                sums.addmm_(torch.mm(x[rows].flatten(0, 1).float(), down.t()), up.t())
            if scale is not None:
                sums.mul_(scale)
            if name in adapter.out_shift:
                sums.add_(adapter.out_shift[name])
            here.copy_(sums)
        return y  # type: ignore[no-any-return]


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
        self._stacked: dict[tuple[int, ...], _Tables] = {}
        #: Of the present batch.
        self.tables: _Tables | None = None
        self.rows = torch.zeros(0, dtype=torch.long)
        #: Neighbours of one adapter, and whether prompts go through the layers span by span.
        self.spans: list[tuple[slice, Adapter]] = []
        self.spans_apart = True
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
        # One that holds these is good for them too: adapters come and go between steps.
        kept = (k for k in self._stacked if set(key) <= set(k) and len(k) <= 2 * len(key))
        key = min(kept, key=len, default=key)
        if key not in self._stacked:
            while len(self._stacked) >= _KEPT:
                self._stacked.pop(next(iter(self._stacked)))
            self._stacked[key] = _Tables([self._adapters[n] for n in key])
        self.tables = self._stacked[key]
        places = {n: place for place, n in enumerate(key)}
        where = [places.get(n, 0) for n in numbers]
        self.rows = torch.tensor(where, device=self._base.device)
        self.spans, start = [], 0
        for number, own in groupby(numbers):
            end = start + len(list(own))
            self.spans.append((slice(start, end), self._adapters[number]))
            start = end
        # What a span saves is arithmetic, which a GPU has; what it costs is launches.
        changed = sum(number in active for number, _ in groupby(numbers))
        self.spans_apart = self._base.device.type == "cpu" or changed <= _FEW_SPANS

    def _changes_layers(self, number: int) -> bool:
        adapter = self._adapters[number]
        return bool(adapter.low_rank or adapter.in_scale or adapter.out_scale)


def alike(lengths: Sequence[int], pass_tokens: int) -> list[list[int]]:
    """Put prompts into batches so that padding and passes together cost least.

    Args:
        lengths: Tokens of each prompt.
        pass_tokens: What a pass costs beside its tokens, in tokens.

    Returns:
        The prompts' places, by batches, shorter ones first.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    # Of the first so many: their cost, and where their last batch begins.
    best = [(0, 0)]
    for end in range(1, len(order) + 1):
        widest = lengths[order[end - 1]]
        best.append(min((best[b][0] + pass_tokens + (end - b) * widest, b) for b in range(end)))
    found, end = [], len(order)
    while end:
        begin = best[end][1]
        found.append(order[begin:end])
        end = begin
    return found[::-1]
