"""What methods with virtual tokens share: the text they start from, and the base they give back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.quantised import OnAnyBase

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Says what a support bot does; a text nearer to the task is a better start.
INITIAL_TEXT = "Answer the customer's question correctly and briefly."


class SoftPromptMethod(OnAnyBase):
    """A method that trains virtual tokens before the text and leaves the base alone."""

    label_fields: ClassVar[tuple[str, ...]] = ("virtual_tokens", "learning_rate")
    # A row has one prompt: examples that shared it would all but the first go without.
    support: ClassVar[Support] = Support(quantises=True, packs=False)

    virtual_tokens: int = Field(16, ge=1, le=512)

    @property
    def row_tokens(self) -> int:
        """The virtual tokens pass through the model with the others."""
        return self.virtual_tokens

    def release(self, model: nn.Module) -> nn.Module | None:
        """The base below the virtual tokens, untouched."""
        base: nn.Module = model.base_model  # type: ignore[assignment]
        return base.requires_grad_(False)


def text_ids(base: Any, text: str, length: int) -> torch.Tensor:
    """Token ids of a text, repeated or cut to a length, on the base's device; shape (length,)."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base.config._name_or_path, local_files_only=True)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * (length // len(ids) + 1))[:length]
    return torch.tensor(ids, device=base.get_input_embeddings().weight.device)
