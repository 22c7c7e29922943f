"""LoHa: the elementwise product of two low-rank updates (Hyeon-Woo et al., arXiv:2108.06098)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import TunerMethod

if TYPE_CHECKING:
    from peft import LoHaConfig


class LoHa(TunerMethod):
    """An update of rank up to the square of `rank` from four thin matrices."""

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")

    name: Literal["loha"] = "loha"
    learning_rate: float = Field(2e-3, gt=0, le=1)
    rank: int = Field(8, ge=1, le=1024)
    alpha: int | None = Field(None, ge=1, description="Scale; the rank if not given.")

    def peft_config(self) -> LoHaConfig:
        """The rank of each of the two updates, and their scale."""
        from peft import LoHaConfig

        return LoHaConfig(
            r=self.rank, alpha=self.alpha or self.rank, target_modules=self.targets, task_type="CAUSAL_LM"
        )
