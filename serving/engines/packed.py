"""Linear layers with their weights laid out once as the processor's matrix units want them.

torch lays bf16 weights out anew at each product on a CPU. Products of up to 32 rows took 0.5 to 0.85 of the
time afterwards, and gave the same bits (torch 2.13 on a processor with AMX; `benchmarks/serving.py`). Layers
that read the same are one product. The layout serves a loop of our own too, for one thread and few rows
(`serving.engines.tiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from serving.engines.compiled import alike, kernels

#: Rows of a product that the layout is chosen for.
_ROWS = 32
#: Layers of one parent that read the same, by their names in transformers' models.
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Product:
    """The weights of layers that read the same.

    Args:
        layers: Of the same inputs.
        shared: Whether their weights are another layer's too, which then go on to be held as they were.
        tiles: `serving.engines.tiles`, if its loop may be taken.
    """

    def __init__(self, layers: Sequence[nn.Linear], *, shared: bool, tiles: Any = None) -> None:
        weights = layers[0].weight if len(layers) == 1 else torch.cat([layer.weight for layer in layers])
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weights.detach(), _ROWS)
        self._plain = weights if shared else None
        some = layers[0].bias is not None
        self._bias = torch.cat([layer.bias for layer in layers]).detach() if some else None
        #: Outputs of each layer.
        self.sizes = [layer.out_features for layer in layers]
        #: What was read last, and what came of it that nobody has asked for yet.
        self._read: torch.Tensor | None = None
        self._left: list[torch.Tensor | None] = []
        self._at = torch.ops.mkldnn.data_ptr(self._packed) if tiles is not None else 0
        self._in_fp32 = None if self._bias is None else self._bias.float()
        self._loop: Any = None
        #: Rows that the loop takes at once, at most; 0 without it.
        self.most = 0
        if tiles is not None and self._fits(tiles.BLOCK, weights):
            self._loop, self.most = tiles.product(), tiles.MOST_ROWS
            if not self._is_right(weights):
                self._loop, self.most = None, 0

    def _fits(self, block: int, weights: torch.Tensor) -> bool:
        """Whether the layout can be the loop's: of whole blocks, and nothing beside them."""
        whole = all(size % block == 0 for size in weights.shape)
        return whole and torch.ops.mkldnn._nbytes(self._packed) == weights.numel() * weights.element_size()

    def _is_right(self, weights: torch.Tensor) -> bool:
        """Whether the loop gives what oneDNN does: what the layout is, oneDNN does not say."""
        some = torch.randn(self.most, 1, weights.shape[1], generator=torch.Generator().manual_seed(1))
        x = some.to(weights.dtype)
        return alike(self._by_torch(x), self._by_loop(x))

    def weight(self, part: int) -> torch.Tensor:
        """One layer's weights as they were; unpacked anew each time where nobody else holds them."""
        whole: torch.Tensor = self._packed.to_dense() if self._plain is None else self._plain
        parts: Sequence[torch.Tensor] = torch.split(whole, self.sizes)
        return parts[part]

    def output(self, part: int, x: torch.Tensor) -> torch.Tensor:
        """One layer's output. Those of the others are kept until they are asked for the same `x`."""
        if len(self.sizes) == 1:
            return self._multiply(x)
        if self._read is not x or self._left[part] is None:
            self._read, self._left = x, list(torch.split(self._multiply(x), self.sizes, dim=-1))
        found, self._left[part] = self._left[part], None
        if all(other is None for other in self._left):
            self._read = None
        assert found is not None
        return found

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        few = len(x) <= self.most and x.dim() == 3 and x.shape[1] == 1
        if few and x.stride(2) == 1 and x.dtype is torch.bfloat16 and torch.get_num_threads() == 1:
            return self._by_loop(x)
        return self._by_torch(x)

    def _by_loop(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), 1, sum(self.sizes), dtype=x.dtype)
        self.write(x.data_ptr(), out.data_ptr(), (len(x), x.shape[2], out.shape[2], x.stride(0)))
        return out

    def write(self, x: int, out: int, sizes: tuple[int, int, int, int], more: int = 0) -> None:
        """Write the outputs of all layers for at most `most` rows; see `serving.engines.tiles.product`.

        Args:
            x: Address of the rows.
            out: Where to.
            sizes: Rows, inputs, outputs, and from one row to the next in `x`.
            more: Address of what is added; 0 for nothing.
        """
        self._loop(x, self._at, 0 if self._in_fp32 is None else self._in_fp32.data_ptr(), more, out, sizes)

    def _by_torch(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")  # type: ignore[no-any-return]


class PackedLinear(nn.Module):
    """A linear layer whose weights do not change any more.

    Args:
        inner: The layer.
        product: Holds its weights.
        part: Which of the product's layers it is.
    """

    def __init__(self, inner: nn.Linear, product: Product, part: int) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.bias = inner.bias
        self.product, self.part = product, part

    @property
    def weight(self) -> Any:
        """As it was, (outputs, inputs)."""
        return self.product.weight(self.part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, of shape (…, outputs), for inputs (…, inputs)."""
        return self.product.output(self.part, x)


def pack(base: nn.Module) -> int:
    """Lay out the linear layers of a model for good, where that helps: in bf16 on a CPU.

    The model must not be trained afterwards.

    Args:
        base: The model; layers are replaced in place.

    Returns:
        How many layers were.
    """
    known = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
    if known is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return 0
    layers = {
        name: layer
        for name, layer in base.named_modules()
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu"
        if layer.weight.dtype is torch.bfloat16
    }
    holders: dict[int, int] = {}
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    alone = {name for name, layer in layers.items() if holders[id(layer.weight)] == 1}
    left, tiles = dict(layers), _tiles(base)
    for name in layers:
        if name not in left:
            continue
        names = _reading_the_same(name, {n: layers[n] for n in alone if n in left})
        some = [left.pop(n) for n in names]
        product = Product(some, shared=name not in alone, tiles=tiles)
        for part, (own, layer) in enumerate(zip(names, some, strict=True)):
            parent, _, last = own.rpartition(".")
            setattr(base.get_submodule(parent), last, PackedLinear(layer, product, part))
    return len(layers)


def _tiles(base: Any) -> Any:
    """The module of the loop over matrix tiles, if this processor has them and numba is there."""
    if kernels(base) is None or not torch.cpu.get_capabilities().get("amx_bf16"):
        return None
    if not torch.cpu._init_amx():  # the system does not let this process have them
        return None
    from serving.engines import tiles

    return tiles


def _reading_the_same(name: str, layers: dict[str, nn.Linear]) -> list[str]:
    """The names of layers that can be one product with this one, itself among them."""
    parent, _, last = name.rpartition(".")
    for group in _TOGETHER:
        names = [f"{parent}.{own}" for own in group]
        if last in group and all(n in layers for n in names):
            some = [layers[n] for n in names]
            if len({(layer.in_features, layer.bias is None) for layer in some}) == 1:
                return names
    return [name]
