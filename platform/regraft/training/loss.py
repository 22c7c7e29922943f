"""Cross-entropy that computes logits only where a label exists.

With short answers after long prompts most logits are never used; leaving them out saves the largest matrix
product of a small model and most of its activation memory.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from regraft.training.batches import IGNORED
from regraft.training.kernels.cross_entropy import linear_cross_entropy

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Shown of a batch: logits (n, vocabulary) in fp32, targets (n) and rows (n) of its n labelled tokens.
See = Callable[["torch.Tensor", "torch.Tensor", "torch.Tensor"], None]
#: Configuration fields of models whose head does more than a matrix product; they keep their own forward.
_SPECIAL_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@contextmanager
def supervised_positions_only(base: nn.Module, see: See | None = None) -> Iterator[None]:
    """While open, `base(..., labels=...)` returns the *sum* of the loss over labelled tokens as `loss`.

    It works below PEFT as well: adapters call the base with `labels`, soft prompts extend them by ignored
    positions. Models with special heads fall back to full logits, with the same sum.

    Args:
        base: A transformers causal language model, before or after PEFT has wrapped it.
        see: Shown what the loss of each batch is made of.
    """
    import torch.nn.functional as F  # noqa: N812
    from torch import nn
    from transformers.modeling_outputs import CausalLMOutputWithPast

    original, before = base.forward, vars(base).get("forward")
    head = base.get_output_embeddings()  # type: ignore[operator]
    special = any(getattr(base.config, name, None) not in (None, 1, 1.0) for name in _SPECIAL_HEADS)

    def forward(self: Any, *args: Any, labels: torch.Tensor | None = None, **kwargs: Any) -> Any:
        if labels is None:
            return original(*args, **kwargs)
        targets = labels[:, 1:]
        keep = targets != IGNORED
        if special:
            logits = original(*args, **kwargs).logits[:, :-1][keep]
        else:
            for name in ("return_dict", "output_attentions", "output_hidden_states", "logits_to_keep"):
                kwargs.pop(name, None)
            hidden = self.get_decoder()(*args, use_cache=False, **kwargs).last_hidden_state[:, :-1]
            # Gathering makes the input contiguous too; a strided one is 500 times slower through a frozen
            # bf16 head on CPU.
            if type(head) is nn.Linear and see is None:
                loss = linear_cross_entropy(hidden[keep], head.weight, head.bias, targets[keep])
                return CausalLMOutputWithPast(loss=loss)
            logits = head(hidden[keep])  # quantised, or adapted itself
        logits = logits.float()  # a bf16 loss is rounded to three digits
        if see is not None:
            see(logits, targets[keep], keep.nonzero()[:, 0])
        loss = F.cross_entropy(logits, targets[keep], reduction="sum")
        return CausalLMOutputWithPast(loss=loss)

    # PEFT and `generate` read from the signature what may be handed over.
    forward.__signature__ = inspect.signature(type(base).forward)  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)
    try:
        yield
    finally:
        if before is None:
            del base.forward  # the class's own shows again
        else:  # answers on the way are asked within training
            base.forward = before
