"""VeRA: one frozen random pair for all layers, and trained scales (Kopiczko et al., arXiv:2310.11454)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.tuner import TunerMethod

if TYPE_CHECKING:
    from peft import VeraConfig


class VeRA(TunerMethod):
    """Few weights to store: one random pair, as large as the largest layer, is made again from its seed."""

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")

    kept_outputs: ClassVar[float] = 1.4
    slowness: ClassVar[float] = 3.1
    support: ClassVar[Support] = Support(quantises=True, merges=True)

    name: Literal["vera"] = "vera"
    learning_rate: float = Field(1e-1, gt=0, le=1)
    rank: int = Field(256, ge=1, le=4096)
    dropout: float = Field(0.0, ge=0, lt=1)
    projection_seed: int = Field(0, ge=0, description="Seed of the random pair.")

    def peft_config(self) -> VeraConfig:
        """The rank of the shared pair, and its seed."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank,
            vera_dropout=self.dropout,
            projection_prng_key=self.projection_seed,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
