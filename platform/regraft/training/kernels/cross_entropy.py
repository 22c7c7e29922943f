"""Cross-entropy of a linear head, a few positions at a time, whose gradient is taken on the way.

The logits of all supervised positions are never held: at a vocabulary of 49,152 they, their softmax and its
gradient take 0.6 MB a position. The loss is a sum that everything after it only scales, so the gradient of
the hidden states can be computed while the logits are there, and scaled in the backward pass.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Logits held at once, in the head's type. On a CPU 256 positions of a vocabulary of 49,152: of 64 to 512
#: all but the fastest, and the head's weights are read a quarter as often as with 64.
LOGITS = {"cpu": 256 * 49_152, "cuda": 2**27}
#: Shares held at once, in fp32; on a CPU those of 16 positions, which stay in its cache.
SHARES = {"cpu": 16 * 49_152, "cuda": 2**27}
#: Smallest share whose logarithm is taken as it is.
_TINY = 1e-30


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """The summed cross-entropy of `hidden @ weight.T + bias` against `targets`, in nats and fp32.

    Args:
        hidden: (positions, width).
        weight: Of the head, (vocabulary, width).
        bias: Of the head, (vocabulary,), or None.
        targets: Token ids, (positions,).
    """
    found: torch.Tensor = _function()(hidden, weight, bias, targets)
    return found


@cache
def _function() -> Any:
    import torch

    def log_shares(logits: Any, shares: Any, own: Any, right: Any) -> torch.Tensor:
        """The logarithms of the right tokens' shares, also of those too small for fp32."""
        unheld = own < _TINY
        if not logits.is_cuda and not bool(unheld.any()):  # on CUDA, asking would cost more than it saves
            return own.log()  # type: ignore[no-any-return]
        # The likeliest token's share is at least one over the vocabulary: its logarithm never fails.
        top, place = shares.max(-1, keepdim=True)
        apart = logits.gather(-1, right).float() - logits.gather(-1, place).float()
        return torch.where(unheld, apart + top.log(), own.log())

    class LinearCrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, hidden: Any, weight: Any, bias: Any, targets: Any) -> Any:
            device = hidden.device.type
            kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
            head = weight.to(kind)
            to_hidden = torch.empty_like(hidden, dtype=kind) if wants_hidden else None
            to_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
            to_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            # Each part adds to the whole gradient of a head that trains: fewer, larger ones.
            step = max(1, LOGITS.get(device, LOGITS["cuda"]) * (4 if wants_weight else 1) // weight.shape[0])
            rows = max(1, SHARES.get(device, SHARES["cuda"]) // weight.shape[0])
            wanted = wants_hidden or wants_weight or wants_bias
            for start in range(0, hidden.shape[0], step):
                part = hidden[start : start + step].to(kind)
                logits = torch.nn.functional.linear(part, head, None if bias is None else bias.to(kind))
                for row in range(0, part.shape[0], rows):
                    narrow = logits[row : row + rows]
                    right = targets[start + row : start + row + narrow.shape[0], None]
                    shares = torch.softmax(narrow, -1, dtype=torch.float32)
                    own = shares.gather(-1, right)
                    total -= log_shares(narrow, shares, own, right).sum()
                    if wanted:
                        shares.scatter_(-1, right, own - 1)
                        if to_bias is not None:
                            to_bias += shares.sum(0)
                        narrow.copy_(shares)
                if to_hidden is not None:
                    torch.mm(logits, head, out=to_hidden[start : start + step])
                if to_weight is not None:
                    to_weight += logits.t() @ part
            ctx.save_for_backward(to_hidden, to_weight, to_bias)
            ctx.kinds = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
            return total

        @staticmethod
        def backward(ctx: Any, gradient: Any) -> Any:
            found = zip(ctx.saved_tensors, ctx.kinds, strict=True)
            scaled = (None if t is None else (t * gradient).to(kind) for t, kind in found)
            return (*scaled, None)

    return LinearCrossEntropy.apply
