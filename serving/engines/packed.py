"""Linear layers with their weights laid out once as the processor's matrix units want them.

torch lays bf16 weights out anew at each product on a CPU. Products of up to 32 rows took 0.5 to 0.85 of the
time afterwards, and gave the same bits (torch 2.13 on a processor with AMX; `benchmarks/serving.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: Rows of a product that the layout is chosen for.
_ROWS = 32


class PackedLinear(nn.Module):
    """A linear layer whose weights do not change any more.

    Args:
        inner: The layer.
        shared: Whether its weights are another layer's too, which then go on to be held as they were.
    """

    def __init__(self, inner: nn.Linear, *, shared: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        self.bias = inner.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(inner.weight.detach(), _ROWS)
        self._plain = inner.weight if shared else None

    @property
    def weight(self) -> Any:
        """As it was, (outputs, inputs); unpacked anew each time where nobody else holds it."""
        return self._packed.to_dense() if self._plain is None else self._plain

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, of shape (…, outputs), for inputs (…, inputs)."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


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
    layers = [
        (name, layer)
        for name, layer in base.named_modules()
        if type(layer) is nn.Linear and layer.weight.device.type == "cpu"
        if layer.weight.dtype is torch.bfloat16
    ]
    holders: dict[int, int] = {}
    for module in base.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for name, layer in layers:
        parent, _, last = name.rpartition(".")
        packed = PackedLinear(layer, shared=holders[id(layer.weight)] > 1)
        setattr(base.get_submodule(parent), last, packed)
    return len(layers)
