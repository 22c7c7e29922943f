"""Prompt tuning: trained embeddings before the prompt (Lester et al., arXiv:2104.08691)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Method, trainable_to_fp32

if TYPE_CHECKING:
    from torch import nn


class PromptTuning(Method):
    """Train a few virtual tokens, initialised from the embeddings of a text.

    Initialisation from text decides a good part of the result (PEFT's method comparison on GSM8K: 5.7 % to
    34.3 % by rate and initialisation alone).
    """

    label_fields: ClassVar[tuple[str, ...]] = ("virtual_tokens", "learning_rate")

    name: Literal["prompt_tuning"] = "prompt_tuning"
    learning_rate: float = Field(1e-1, gt=0, le=10)
    virtual_tokens: int = Field(16, ge=1, le=512)
    initial_text: str | None = Field(
        "Answer the customer's question correctly and briefly.",
        description="Text whose embeddings the virtual tokens start from; null for random ones.",
    )

    def apply(self, base: nn.Module) -> nn.Module:
        """Put virtual tokens before every prompt, in fp32."""
        import torch
        from peft import PromptTuningConfig, get_peft_model

        # PEFT's own text initialisation reads a tokenizer by path and runs while the base may sit on a
        # device; setting the rows ourselves needs neither.
        config = PromptTuningConfig(num_virtual_tokens=self.virtual_tokens, task_type="CAUSAL_LM")
        model = trainable_to_fp32(get_peft_model(base, config))
        if self.initial_text is not None:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(base.config._name_or_path, local_files_only=True)  # type: ignore[union-attr]
            ids = tokenizer(self.initial_text, add_special_tokens=False)["input_ids"]
            ids = (ids * (self.virtual_tokens // len(ids) + 1))[: self.virtual_tokens]
            embedding = base.get_input_embeddings()  # type: ignore[operator]
            rows = embedding(torch.tensor(ids, device=embedding.weight.device)).detach().float()
            encoder: Any = model.prompt_encoder
            encoder["default"].embedding.weight.data.copy_(rows)
        return model

    def release(self, model: nn.Module) -> nn.Module | None:
        """The base below the virtual tokens, untouched."""
        return release_prompt_model(model)


def release_prompt_model(model: nn.Module) -> nn.Module:
    """The base of a PEFT prompt-learning model; such methods leave its weights and modules alone."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    return base.requires_grad_(False)
