"""QLoRA: LoRA on a base held in four bits (Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.hooks import StepHooks
from regraft.methods.lora import LoRA
from regraft.methods.quantised import Quantisation, paged_adamw

if TYPE_CHECKING:
    import torch
    from torch import nn


class QLoRA(LoRA):
    """LoRA on an NF4 base with double quantisation, through bitsandbytes, on CUDA or CPU."""

    #: Merged into four bits, the weights would be rounded again.
    support: ClassVar[Support] = Support(quantises=True, mixes=True, plain_lora=True)

    name: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    quantise: Quantisation = Field(
        "nf4_double", description="Four bits a weight; double: the constants of 64 weights in eight."
    )
    paged_optimiser: bool = Field(
        True, description="On CUDA: let the optimiser's moments move to the host when memory runs short."
    )

    def hooks(self, model: nn.Module) -> StepHooks:
        """Its choice of optimiser."""
        return _Paged() if self.paged_optimiser else StepHooks()


class _Paged(StepHooks):
    def optimiser(self, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer | None:
        """The paged one on CUDA; a CPU has nothing to page to."""
        on_cuda = all(p.is_cuda for group in groups for p in group["params"])
        return paged_adamw(groups, rate) if on_cuda else None
