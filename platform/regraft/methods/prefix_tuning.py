"""Prefix tuning: trained keys and values before the text in every layer (Li and Liang, arXiv:2101.00190)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support, trainable_to_fp32
from regraft.methods.soft_prompt import INITIAL_TEXT, SoftPromptMethod, text_ids

if TYPE_CHECKING:
    import torch
    from torch import nn


class PrefixTuning(SoftPromptMethod):
    """Train the keys and values of a few virtual tokens in every layer, started from those of a text.

    The paper starts from real words too (its figure 5), and trains through a network that it then throws
    away; started from a text, the keys and values train well by themselves.
    """

    # A second pass through a layer would add to the prefix that the first one filled.
    support: ClassVar[Support] = SoftPromptMethod.support._replace(recomputes=False)

    name: Literal["prefix_tuning"] = "prefix_tuning"
    learning_rate: float = Field(1e-1, gt=0, le=10)
    initial_text: str | None = Field(
        INITIAL_TEXT,
        min_length=1,
        description="Text whose keys and values the prefix starts from; null for small random ones.",
    )

    @property
    def row_tokens(self) -> int:
        """None: keys and values are there already."""
        return 0

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the prefix before every layer's keys and values, in fp32."""
        import torch
        from peft import PrefixTuningConfig, get_peft_model

        config = PrefixTuningConfig(num_virtual_tokens=self.virtual_tokens, task_type="CAUSAL_LM")
        rows = self._start(base)
        model = trainable_to_fp32(get_peft_model(base, config))
        encoder: Any = model.prompt_encoder
        weight = encoder["default"].embedding.weight
        with torch.no_grad():
            # PEFT draws with a standard deviation of one, far beyond what a layer's keys and values are.
            weight.copy_(rows) if rows is not None else weight.mul_(0.02)
        return model

    def _start(self, base: Any) -> torch.Tensor | None:
        """What the base keeps of the text, laid out as PEFT does: (virtual tokens, layers * 2 * width)."""
        import torch

        if self.initial_text is None:
            return None
        with torch.no_grad():
            ids = text_ids(base, self.initial_text, self.virtual_tokens)
            cache = base(input_ids=ids[None], use_cache=True).past_key_values
        # Each is (1, heads, tokens, head width).
        parts = [
            t[0].transpose(0, 1).flatten(1) for layer in cache.layers for t in (layer.keys, layer.values)
        ]
        return torch.cat(parts, dim=1).float()
