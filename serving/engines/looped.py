"""Adapters by compiled loops: each row goes through its own adapter alone.

torch's way is a product with all adapters at once (`serving.engines.tables`), of several operations a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from serving.engines.adapters import Adapter
from serving.engines.compiled import HALF

#: Up to this sum of all rows' ranks loops are quicker than products with all adapters: with SmolLM2-135M on
#: one core a layer's took 27 to 84 µs for a sum of 512, where torch's operations take 100.
MOST_RANKS = 1024
#: Up to this rank they are for prompts too: a token took 0.3 to 1 of the time that two products in fp32 take,
#: and at a rank of 64 half more.
MOST_OF_PROMPTS = 16


class _Layer(NamedTuple):
    """A layer's tables of addresses, one line an adapter; see `kernels.adapters` and `kernels.scaled`.

    Attributes:
        adds: The address of the first; 0 for none.
        in_scales: The same of the second.
        held: The tables.
    """

    adds: int
    in_scales: int
    held: tuple[torch.Tensor, torch.Tensor]


class _Rows:
    """Rows as the loops take them.

    Args:
        places: Each row's line in a layer's tables.
    """

    def __init__(self, places: torch.Tensor) -> None:
        order = places.argsort(stable=True)
        self._held = (places, torch.stack([order, places[order]], dim=1))
        self.count = len(places)
        self.places, self.turns = (tensor.data_ptr() for tensor in self._held)

    def repeated(self, tokens: int) -> _Rows:
        """The same for each of a row's tokens."""
        return _Rows(self._held[0].repeat_interleave(tokens))


def laid_out(adapter: Adapter) -> Adapter:
    """An adapter with its tensors as the loops read them: A and B by ranks, without gaps."""

    def flat(some: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.float().contiguous() for name, tensor in some.items()}

    pairs = {
        name: (down.float().contiguous(), up.float().t().contiguous().t())
        for name, (down, up) in adapter.low_rank.items()
    }
    return adapter._replace(
        low_rank=pairs,
        in_scale=flat(adapter.in_scale),
        out_scale=flat(adapter.out_scale),
        out_shift=flat(adapter.out_shift),
    )


class Looped:
    """The adapters of a base as the loops read them.

    Args:
        loops: `serving.engines.kernels`.
        dtype: The base's.
        adapters: By their numbers, `laid_out`; they are held as long as this is.
    """

    def __init__(self, loops: Any, dtype: torch.dtype, adapters: Mapping[int, Adapter]) -> None:
        self._adapters, self.dtype = dict(adapters), dtype
        self._adapt, self._scale = loops.adapters(HALF[dtype]), loops.scaled(HALF[dtype])
        self._places = {number: place for place, number in enumerate(self._adapters)}
        self._rows = _Rows(torch.zeros(0, dtype=torch.long))
        self._of_tokens = (1, self._rows)
        self._read = torch.empty(0, dtype=dtype)
        some = self._adapters.values()
        names = dict.fromkeys(n for a in some for n in (*a.low_rank, *a.in_scale, *a.out_scale))
        self._layers = {name: self._layer(name) for name in names}

    def select(self, numbers: Sequence[int]) -> None:
        """Say what the rows are, by the numbers of their adapters."""
        self._rows = _Rows(torch.tensor([self._places[number] for number in numbers]))
        self._of_tokens = (1, self._rows)

    def knows(self, name: str) -> bool:
        """Whether an adapter changes this layer."""
        return name in self._layers

    def scales(self, name: str) -> bool:
        """Whether an adapter changes what this layer reads."""
        layer = self._layers.get(name)
        return layer is not None and layer.in_scales != 0

    def adapt(self, name: str, x: int, y: int, sizes: tuple[int, int, int, int, int]) -> None:
        """Add what adapters do to a layer's outputs at an address; see `kernels.adapters`."""
        layer = self._layers.get(name)
        if layer is not None and layer.adds:
            self._adapt(x, y, layer.adds, self._rows.turns, sizes)

    def scaled(self, name: str, x: int, rows: int, inputs: int) -> int:
        """The address of a layer's inputs as adapters scale them, which the next call may write over."""
        layer = self._layers.get(name)
        if layer is None or not layer.in_scales:
            return x
        if self._read.numel() < rows * inputs:
            self._read = torch.empty(rows * inputs, dtype=self.dtype)
        to = self._read.data_ptr()
        self._scale(x, to, layer.in_scales, self._rows.places, (rows, inputs, inputs))
        return to

    def output(self, name: str, inner: Any, x: torch.Tensor) -> torch.Tensor:
        """A layer's output, of shape (rows, tokens, outputs), for inputs (rows, tokens, inputs)."""
        layer = self._layers[name]
        _, tokens, inputs = x.shape
        if x.stride(2) != 1 or x.stride(0) != tokens * x.stride(1):
            x = x.contiguous()
        if self._of_tokens[0] != tokens:
            self._of_tokens = (tokens, self._rows.repeated(tokens))
        rows, read = self._of_tokens[1], x
        if layer.in_scales:
            read = x.new_empty(x.shape)
            sizes = (rows.count, inputs, x.stride(1))
            self._scale(x.data_ptr(), read.data_ptr(), layer.in_scales, rows.places, sizes)
        y: torch.Tensor = inner(read).to(x.dtype)
        if layer.adds:
            steps = (x.stride(1), y.view(-1, y.shape[2]).stride(0))
            self._adapt(
                x.data_ptr(), y.data_ptr(), layer.adds, rows.turns, (rows.count, inputs, y.shape[2], *steps)
            )
        return y

    def _layer(self, name: str) -> _Layer:
        adds, in_scales = [], []
        for adapter in self._adapters.values():
            pair = adapter.low_rank.get(name)
            down, up, rank = (pair[0].data_ptr(), pair[1].data_ptr(), len(pair[0])) if pair else (0, 0, 0)
            vectors = (adapter.out_scale.get(name), adapter.out_shift.get(name), adapter.in_scale.get(name))
            scale, shift, of_inputs = (0 if v is None else v.data_ptr() for v in vectors)
            adds.append((down, up, rank, scale, shift))
            in_scales.append(of_inputs)
        held = (torch.tensor(adds), torch.tensor(in_scales))
        added, scaled = (table.data_ptr() if table.any() else 0 for table in held)
        return _Layer(added, scaled, held)
