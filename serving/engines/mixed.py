"""Many adapters on one base, mixed in one batch: each row's layers answer as its own adapter says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import nn

from serving.engines.adapters import Adapter
from serving.engines.compiled import kernels
from serving.engines.device_tables import block_of
from serving.engines.looped import MOST_OF_PROMPTS, MOST_RANKS, Looped, laid_out
from serving.engines.tables import LayerTables, RowTables, Tables

#: Sets of adapters whose stacked tensors are kept; a batch of one set is followed by one that is like it.
_KEPT = 4
#: On a GPU prompts of more spans than these go through all adapters together. Measured on an H100: a span
#: costs as many launches as all adapters do.
_FEW_SPANS = 1
#: Up to so many adapters that change layers are one set for all batches. What is recorded for a set (see
#: `regraft.evals.graphs`) then stays good whoever joins and leaves; a GPU has arithmetic to spare.
_FEW_ADAPTERS = {"cuda": 16}


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
        mix = self._mix
        few = x.shape[1] == 1 or (mix.low and mix.spans_apart and torch.get_num_threads() == 1)
        if mix.looped is not None and few and x.dtype is mix.looped.dtype:
            return mix.looped.output(self.name, self.inner, x)
        if not mix.changed:
            return self.inner(x)  # type: ignore[no-any-return]
        if x.shape[1] > 1 and mix.spans_apart and not mix.by_kernels:
            return self._by_span(x)
        tables = mix.tables
        own = None if tables is None else tables.layers.get(self.name)
        if tables is None or own is None:
            return self.inner(x)  # type: ignore[no-any-return]
        if mix.by_kernels:
            return self._by_kernels(x, tables)
        return self._together(x, own, tables.of_rows(own, mix.rows, mix.changes))

    def _together(self, x: torch.Tensor, own: LayerTables, here: RowTables) -> torch.Tensor:
        """Rows in any order: each goes through all adapters, of which its own counts."""
        y: torch.Tensor = self.inner(x if here.in_scale is None else (x * here.in_scale).to(x.dtype))
        if own.down is not None and own.up is not None:
            h = torch.mm(self._mix.in_fp32(x).flatten(0, 1), own.down)
            if here.owners is not None:
                h.view(*x.shape[:2], -1).mul_(here.owners)
            added = torch.mm(h, own.up).view(y.shape)
            if here.out_shift is not None:
                added += here.out_shift
            # Sums are in fp32 and rounded once, whatever `y` is.
            if here.out_scale is None:
                return y.add_(added)
            return torch.addcmul(added, y, here.out_scale, out=y)
        if here.out_scale is not None:
            y = y * here.out_scale
        if here.out_shift is not None:
            y = y + here.out_shift
        return y.to(x.dtype)

    def _by_kernels(self, x: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Each row through its own adapter, on a GPU."""
        from serving.engines import device_adapters

        alone = ((self.name,), (int(self.inner.out_features),), 0)  # type: ignore[arg-type]
        own = tables.part(*self._mix.together.get(self.name, alone))
        if own is None:
            return self.inner(x)  # type: ignore[no-any-return]
        return device_adapters.through(x, self.inner, self._mix.rows, own)

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
        self._stacked: dict[tuple[int, ...], Tables] = {}
        self._loops = kernels(base)
        self._all_looped: Looped | None = None
        #: Of the present batch: the adapters as compiled loops read them, where those are quicker.
        self.looped: Looped | None = None
        #: Whether the ranks of all of them are low enough for loops to read prompts.
        self.low = False
        #: Whether any row's adapter changes a layer.
        self.changed = False
        self._key: tuple[int, ...] = ()
        self._tables: Tables | None = None
        #: Each row's place in them.
        self.places: Sequence[int] = ()
        self.rows = torch.zeros(0, dtype=torch.long)
        #: Neighbours of one adapter, and whether prompts go through the layers span by span.
        self.spans: list[tuple[slice, Adapter]] = []
        self.spans_apart = True
        #: Whether a GPU's kernels take each row through its adapter (`serving.engines.device_kernels`).
        self.by_kernels = False
        #: For layers that read the same and are one product there: their names, outputs, and which one it is.
        self.together: dict[str, tuple[tuple[str, ...], tuple[int, ...], int]] = {}
        #: How often the rows were others than before.
        self.changes = 0
        self._numbers: tuple[int, ...] = ()
        self._read = (torch.zeros(0), torch.zeros(0))

    def add(self, adapter: Adapter) -> int:
        """Take an adapter in; gives its number."""
        for name in {*adapter.low_rank, *adapter.in_scale, *adapter.out_scale}:
            if name not in self._wrapped:
                parent, _, last = name.rpartition(".")
                inner = self._base.get_submodule(name)
                if self.by_kernels and not block_of([inner.out_features]):
                    self.by_kernels = False  # it has an odd width
                    self._stacked.clear()
                    self._numbers, self._tables = (-1,), None
                self._wrapped[name] = MixedLinear(name, inner, self)
                setattr(self._base.get_submodule(parent), last, self._wrapped[name])
        number, self._next = self._next, self._next + 1
        self._adapters[number] = adapter if self._loops is None else laid_out(adapter)
        self._read_all()
        return number

    def remove(self, number: int) -> None:
        """Let an adapter go; no row may have it any more."""
        del self._adapters[number]
        self._stacked = {key: tables for key, tables in self._stacked.items() if number not in key}
        self._read_all()

    def adapter(self, number: int) -> Adapter:
        """One of them; 0 is the base alone."""
        return self._adapters[number]

    def select(self, numbers: Sequence[int]) -> None:
        """Say what the rows of the next forward pass are, by the numbers of their adapters."""
        if tuple(numbers) == self._numbers:
            return
        self._numbers, self.changes = tuple(numbers), self.changes + 1
        active = tuple(sorted({n for n in numbers if self._changes_layers(n)}))
        self.changed, self.looped = bool(active), None
        if not active:
            self._key, self._tables, self.places = (), None, ()
            return
        self.low = all(self._adapters[n].rank <= MOST_OF_PROMPTS for n in active)
        if self._all_looped and sum(self._adapters[n].rank for n in numbers) <= MOST_RANKS:
            self.looped = self._all_looped
            self.looped.select(numbers)
        alone = len(active) == 1 and all(n == active[0] for n in numbers)
        # Rows of the base alone have a place of their own, of which nothing is any adapter's.
        key = self._of_all() or (active if alone else (0, *active))
        # One that holds these is good for them too: adapters come and go between steps.
        kept = (k for k in self._stacked if set(key) <= set(k) and len(k) <= 2 * len(key))
        key = min(kept, key=len, default=key)
        self._key, self._tables = key, self._stacked.get(key)
        places = {n: place for place, n in enumerate(key)}
        self.places = [places.get(n, 0) for n in numbers]
        self.rows = torch.tensor(self.places, device=self._base.device)
        self.spans, start = [], 0
        for number, own in groupby(numbers):
            end = start + len(list(own))
            self.spans.append((slice(start, end), self._adapters[number]))
            start = end
        # What a span saves is arithmetic, which a GPU has; what it costs is launches.
        changed = sum(number in active for number, _ in groupby(numbers))
        self.spans_apart = self._base.device.type == "cpu" or changed <= _FEW_SPANS

    @property
    def tables(self) -> Tables | None:
        """All adapters' tensors together; stacked when they are first looked at."""
        if self._tables is None and self._key:
            while len(self._stacked) >= _KEPT:
                self._stacked.pop(next(iter(self._stacked)))
            self._tables = Tables([self._adapters[n] for n in self._key], stacked=not self.by_kernels)
            self._stacked[self._key] = self._tables
        return self._tables

    @contextmanager
    def reading(self, places: torch.Tensor) -> Iterator[None]:
        """While open, layers read from this tensor, of shape (rows), which place in the tables a row has."""
        before, self.rows, self.changes = self.rows, places, self.changes + 1
        try:
            yield
        finally:
            self.rows, self.changes = before, self.changes + 1

    def in_fp32(self, x: torch.Tensor) -> torch.Tensor:
        """What a layer reads, in fp32; several layers read the same."""
        if x.shape[1] > 1:  # much to hold on to
            return x.float()
        if self._read[0] is not x:
            self._read = (x, x.float())
        return self._read[1]

    def _of_all(self) -> tuple[int, ...]:
        """The set of all adapters, where it is small enough to serve every batch; else an empty one."""
        known = tuple(n for n in self._adapters if self._changes_layers(n))
        return (0, *known) if 1 < len(known) <= _FEW_ADAPTERS.get(self._base.device.type, 0) else ()

    def _read_all(self) -> None:
        """Have the loops read the adapters that there are now."""
        if self._loops is not None:
            self._numbers, self.looped = (-1,), None
            self._all_looped = Looped(self._loops, self._base.dtype, self._adapters)

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
