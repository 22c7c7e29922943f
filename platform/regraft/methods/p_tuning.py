"""P-tuning: virtual tokens written by a small trained network (Liu et al., arXiv:2103.10385)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from regraft.methods.base import trainable_to_fp32
from regraft.methods.soft_prompt import SoftPromptMethod

if TYPE_CHECKING:
    from torch import nn


class PTuning(SoftPromptMethod):
    """Train an encoder that writes the virtual tokens; only what it writes is kept."""

    name: Literal["p_tuning"] = "p_tuning"
    learning_rate: float = Field(2e-2, gt=0, le=1)
    encoder_hidden_size: int = Field(128, ge=1)

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the encoder's virtual tokens before every prompt, in fp32."""
        from peft import PromptEncoderConfig, get_peft_model

        config = PromptEncoderConfig(
            num_virtual_tokens=self.virtual_tokens,
            encoder_hidden_size=self.encoder_hidden_size,
            task_type="CAUSAL_LM",
        )
        return trainable_to_fp32(get_peft_model(base, config))
