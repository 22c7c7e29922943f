"""LoHa and LoKr: updates that are products of small matrices, which reach higher ranks than LoRA's sums."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.methods.tuner import Alpha, TunerMethod, scale_of

if TYPE_CHECKING:
    from peft import LoHaConfig, LoKrConfig


class _Product(TunerMethod):
    """What both share: the rank of the factors, and the scale of their product."""

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")
    kept_weights: ClassVar[float] = 7.0
    slowness: ClassVar[float] = 4.8

    learning_rate: float = Field(2e-2, gt=0, le=1)
    rank: int = Field(8, ge=1, le=1024)
    alpha: Alpha = Field("rank", description="Scale: a number, `rank`, or `double`, twice the rank.")

    @property
    def _factors(self) -> dict[str, Any]:
        return {
            "r": self.rank,
            "alpha": scale_of(self.alpha, self.rank),
            "target_modules": self.targets,
            "task_type": "CAUSAL_LM",
        }


class LoHa(_Product):
    """An update of rank up to the square of `rank` from four thin matrices, multiplied element by element.

    Source: Hyeon-Woo et al., arXiv:2108.06098.
    """

    name: Literal["loha"] = "loha"

    def peft_config(self) -> LoHaConfig:
        """The rank of each of the two updates, and their scale."""
        from peft import LoHaConfig

        return LoHaConfig(**self._factors)


class LoKr(_Product):
    """The Kronecker product of a small matrix and a low-rank one: fewer weights than LoRA at a rank.

    Source: Yeh et al., arXiv:2309.14859.
    """

    name: Literal["lokr"] = "lokr"

    def peft_config(self) -> LoKrConfig:
        """The rank of the larger factor, and the scale."""
        from peft import LoKrConfig

        return LoKrConfig(**self._factors)
