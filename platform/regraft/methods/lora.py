"""LoRA: low-rank updates beside frozen weights (Hu et al., arXiv:2106.09685)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Method, trainable_to_fp32

if TYPE_CHECKING:
    from torch import nn


class LoRA(Method):
    """Low-rank adapters on the linear layers.

    The default rate is ten times what full fine-tuning wants, and all linear layers are adapted
    ("LoRA Without Regret", Thinking Machines, 2025).
    """

    label_fields: ClassVar[tuple[str, ...]] = ("rank", "learning_rate")

    name: Literal["lora"] = "lora"
    learning_rate: float = Field(5e-4, gt=0, le=1e-1)
    rank: int = Field(8, ge=1, le=1024)
    alpha: int | None = Field(None, ge=1, description="Scale; twice the rank if not given.")
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | tuple[str, ...] = "all-linear"

    def apply(self, base: nn.Module) -> nn.Module:
        """Put low-rank pairs beside the linear layers, in fp32."""
        from peft import LoraConfig, get_peft_model

        targets = self.target_modules if isinstance(self.target_modules, str) else list(self.target_modules)
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha or 2 * self.rank,
            lora_dropout=self.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        return trainable_to_fp32(get_peft_model(base, config))

    def release(self, model: nn.Module) -> nn.Module | None:
        """Take the pairs off again; the weights beside them never changed."""
        base: nn.Module = model.unload()  # type: ignore[operator]
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base.requires_grad_(False)
