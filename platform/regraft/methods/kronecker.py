"""LoKr: updates that are Kronecker products (Yeh et al., arXiv:2309.14859)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import TunerMethod

if TYPE_CHECKING:
    from peft import LoKrConfig


class LoKr(TunerMethod):
    """The Kronecker product of a small matrix and a low-rank one: fewer weights than LoRA at a rank."""

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")

    name: Literal["lokr"] = "lokr"
    learning_rate: float = Field(2e-3, gt=0, le=1)
    rank: int = Field(8, ge=1, le=1024)
    alpha: int | None = Field(None, ge=1, description="Scale; the rank if not given.")

    def peft_config(self) -> LoKrConfig:
        """The rank of the larger factor, and the scale."""
        from peft import LoKrConfig

        return LoKrConfig(
            r=self.rank, alpha=self.alpha or self.rank, target_modules=self.targets, task_type="CAUSAL_LM"
        )
