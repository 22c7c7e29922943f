"""OFT: trained rotations of the frozen weights (Qiu et al., arXiv:2306.07280; arXiv:2506.19847)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.tuner import TunerMethod

if TYPE_CHECKING:
    from peft import OFTConfig


class OFT(TunerMethod):
    """Turn the inputs of each layer in blocks, keeping the angles between its neurons."""

    label_fields: ClassVar[tuple[str, ...]] = ("block_size", "learning_rate")

    kept_inputs: ClassVar[float] = 5.0
    slowness: ClassVar[float] = 1.3
    support: ClassVar[Support] = Support(quantises=True, merges=True)

    name: Literal["oft"] = "oft"
    learning_rate: float = Field(5e-4, gt=0, le=1)
    block_size: int = Field(32, ge=2, le=512, description="Must divide the layers' input widths.")
    dropout: float = Field(0.0, ge=0, lt=1)

    def peft_config(self) -> OFTConfig:
        """The size of the blocks."""
        from peft import OFTConfig

        return OFTConfig(
            oft_block_size=self.block_size,
            module_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )
