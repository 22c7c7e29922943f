"""Sizes of a model and of what a method trains of it, without weights: on torch's meta device."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from regraft.methods import LoRA, Method
from regraft.methods.base import empty_causal_lm
from regraft.methods.lora_init import FromWeights


class Shape(NamedTuple):
    """Sizes of a decoder, in parameters and in values a token."""

    linear: int
    embedding: int
    head: int
    other: int
    layers: int
    hidden: int
    heads: int
    queries: int
    keys: int
    inner: int
    vocabulary: int
    widest: int

    @property
    def parameters(self) -> int:
        """All of the model's; a tied head counts once."""
        return self.linear + self.embedding + self.head + self.other


@lru_cache(maxsize=8)
def shape_of(folder: Path) -> Shape:
    """Read a model's sizes from its `config.json`; no weights are needed.

    Raises:
        regraft.errors.ModelError: If transformers cannot build the model.
    """
    base: Any = empty_causal_lm(folder)
    head = base.get_output_embeddings()
    embedding = base.get_input_embeddings()
    linear, widest = 0, 0
    for module in base.modules():
        if type(module).__name__ == "Linear" and module is not head:
            linear += module.weight.numel()
            widest = max(widest, module.weight.numel())
    tied = head is None or head.weight is embedding.weight
    total = sum(p.numel() for p in base.parameters())
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    apart = 0 if tied else head.weight.numel()
    return Shape(
        linear=linear,
        embedding=embedding.weight.numel(),
        head=apart,
        other=total - linear - embedding.weight.numel() - apart,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        queries=heads * width,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * width,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        vocabulary=config.vocab_size,
        widest=widest,
    )


@lru_cache(maxsize=256)
def trained_by(method: Method, folder: Path) -> int:
    """How many parameters a method trains, by applying it to a model without values."""
    import torch

    if method.kind == "control":
        return 0
    if isinstance(method, FromWeights):  # same shapes as LoRA's, but the start needs the weights' values
        same = set(LoRA.model_fields) - {"name"}
        method = LoRA(**{field: getattr(method, field) for field in same})
    if "initial_text" in type(method).model_fields:  # needs the tokenizer and values
        method = method.model_copy(update={"initial_text": None})
    base = empty_causal_lm(folder)
    with torch.device("meta"):
        model = method.apply(base)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
