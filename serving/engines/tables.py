"""The tensors of several adapters, stacked so that rows of one batch may each have another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from serving.engines.adapters import Adapter

if TYPE_CHECKING:
    from serving.engines.device_tables import Group


class LayerTables(NamedTuple):
    """A layer's tensors for one set of adapters, for batches whose rows go through all adapters.

    Attributes:
        down: A of all that have one, stacked: (inputs, ranks).
        up: Their B, with the scales of their outputs in it: (ranks, outputs).
        owners: Which of the set's tables says of each rank whose it is; None if all rows are of one adapter.
        in_scale: Columns of the set's vectors, or None.
        out_scale: The same.
        out_shift: The same.
    """

    down: torch.Tensor | None
    up: torch.Tensor | None
    owners: int | None
    in_scale: slice | None
    out_scale: slice | None
    out_shift: slice | None


class RowTables(NamedTuple):
    """A layer's tables by row, of shape (rows, 1, width)."""

    owners: torch.Tensor | None
    in_scale: torch.Tensor | None
    out_scale: torch.Tensor | None
    out_shift: torch.Tensor | None


class Tables:
    """The layers' tensors for one set of adapters.

    What rows are looked up in lies together for all layers, so that a batch costs a few look-ups and not a
    few for each layer.

    Args:
        adapters: The set.
        stacked: Whether batches go through all adapters, and not by kernels of a GPU, which read `group`s.

    Attributes:
        layers: Those that any of the adapters changes, by name.
        wide: Vectors of all layers side by side: (places, widths); None if there are none.
    """

    def __init__(self, adapters: Sequence[Adapter], *, stacked: bool = True) -> None:
        self._adapters, self._stacked = adapters, stacked
        #: By whose ranks follow one another: (places, ranks), 1 where it is the place's own.
        self._owners: dict[tuple[int, ...], torch.Tensor] = {}
        self._vectors: list[torch.Tensor] = []
        self._width = 0
        names = dict.fromkeys(n for a in adapters for n in (*a.low_rank, *a.in_scale, *a.out_scale))
        self.layers = {name: self._layer(name) for name in names}
        self.wide = torch.cat(self._vectors, dim=1) if self._vectors else None
        self._vectors.clear()
        self._at = -1
        self._looked_up: tuple[list[torch.Tensor], torch.Tensor | None] = ([], None)
        self._groups: dict[tuple[str, ...], Group | None] = {}
        self._parts: dict[str, Group | None] = {}

    def group(self, names: tuple[str, ...], sizes: Sequence[int]) -> Group | None:
        """The set as kernels of a GPU read it, for layers that read the same; see `device_tables.group`."""
        if names not in self._groups:
            from serving.engines.device_tables import group

            self._groups[names] = group(self, self._adapters, names, sizes)
        return self._groups[names]

    def part(self, names: tuple[str, ...], sizes: Sequence[int], index: int) -> Group | None:
        """The same for one of them."""
        key = names[index]
        if key not in self._parts:
            from serving.engines.device_tables import part

            whole = self.group(names, sizes)
            self._parts[key] = None if whole is None else part(whole, index)
        return self._parts[key]

    def of_rows(self, own: LayerTables, rows: torch.Tensor, changes: int) -> RowTables:
        """What each row of the batch has; looked up anew only where the rows are others than before.

        Args:
            own: The layer's.
            rows: Each row's place in the set.
            changes: A number that goes up whenever the rows are others.
        """
        if self._at != changes:
            owners = [t.index_select(0, rows) for t in self._owners.values()]
            wide = None if self.wide is None else self.wide.index_select(0, rows)
            self._looked_up, self._at = (owners, wide), changes
        owners, wide = self._looked_up
        vectors = (own.in_scale, own.out_scale, own.out_shift)
        return RowTables(
            None if own.owners is None else owners[own.owners][:, None],
            *(None if s is None or wide is None else wide[:, None, s] for s in vectors),
        )

    def _layer(self, name: str) -> LayerTables:
        found = [
            (place, a.low_rank[name], a.out_scale.get(name))
            for place, a in enumerate(self._adapters)
            if name in a.low_rank and self._stacked
        ]
        ups = [up if scale is None else up * scale[:, None] for _, (_, up), scale in found]
        down = torch.cat([down for _, (down, _), _ in found]).t().contiguous() if found else None
        up = torch.cat(ups, dim=1).t().contiguous() if found else None
        owners = None
        if down is not None and len(self._adapters) > 1:
            places = tuple(place for place, pair, _ in found for _ in pair[0])
            if places not in self._owners:
                own = torch.tensor(places)[None] == torch.arange(len(self._adapters))[:, None]
                self._owners[places] = own.to(down)
            owners = list(self._owners).index(places)
        return LayerTables(
            down,
            up,
            owners,
            self._put([a.in_scale.get(name) for a in self._adapters], 1.0),
            self._put([a.out_scale.get(name) for a in self._adapters], 1.0),
            self._put([a.out_shift.get(name) for a in self._adapters], 0.0),
        )

    def _put(self, found: Sequence[torch.Tensor | None], otherwise: float) -> slice | None:
        """Set vectors of several adapters, with a number for those that have none, beside those there are.

        Returns:
            Their columns; None if nobody has one.
        """
        some = next((s for s in found if s is not None), None)
        if some is None:
            return None
        rows = torch.stack([torch.full_like(some, otherwise) if s is None else s for s in found])
        self._vectors.append(rows)
        self._width += rows.shape[1]
        return slice(self._width - rows.shape[1], self._width)
