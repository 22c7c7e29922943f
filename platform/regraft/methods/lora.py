"""LoRA: low-rank updates beside frozen weights (Hu et al., arXiv:2106.09685), and two close kin."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.lora_fused import fuse
from regraft.methods.tuner import Alpha, TunerMethod, scale_of

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


class LoRA(TunerMethod):
    """Low-rank adapters on the linear layers.

    All linear layers are adapted, and the default rate is some ten times what full fine-tuning wants
    ("LoRA Without Regret", Thinking Machines, 2025; `docs/training.md` has a search of every method's rate).
    """

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")
    kept_inputs: ClassVar[float] = 1.6
    support: ClassVar[Support] = Support(quantises=True, merges=True, mixes=True, plain_lora=True)

    name: Literal["lora"] = "lora"
    learning_rate: float = Field(2e-3, gt=0, le=1e-1)
    rank: int = Field(8, ge=1, le=1024)
    alpha: Alpha = Field("double", description="Scale: a number, `rank`, or `double`, twice the rank.")
    dropout: float = Field(0.0, ge=0, lt=1)

    def peft_config(self) -> LoraConfig:
        """The pairs' rank, scale and places."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=scale_of(self.alpha, self.rank),
            lora_dropout=self.dropout,
            target_modules=self.targets,
            task_type="CAUSAL_LM",
        )

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the pairs beside the layers, in fp32, with a forward that is fast in training."""
        return fuse(super().apply(base))


class RsLoRA(LoRA):
    """LoRA scaled by alpha over the root of the rank, so that high ranks learn as fast as low ones.

    Source: Kalajdzievski, arXiv:2312.03732. With the rank as alpha the scale is the rank's root.
    """

    name: Literal["rslora"] = "rslora"  # type: ignore[assignment]
    alpha: Alpha = Field("rank", description="Scale: a number, `rank`, or `double`, twice the rank.")

    def peft_config(self) -> LoraConfig:
        """LoRA's, with the scale that does not fade with the rank."""
        config = super().peft_config()
        config.use_rslora = True
        return config


class DoRA(LoRA):
    """LoRA for the direction of each weight column; its magnitude is trained apart (arXiv:2402.09353)."""

    kept_inputs: ClassVar[float] = 3.0
    kept_outputs: ClassVar[float] = 5.0
    slowness: ClassVar[float] = 2.0
    support: ClassVar[Support] = Support(quantises=True, merges=True)

    name: Literal["dora"] = "dora"  # type: ignore[assignment]

    def peft_config(self) -> LoraConfig:
        """LoRA's, with the weights' magnitude apart."""
        config = super().peft_config()
        config.use_dora = True
        return config
