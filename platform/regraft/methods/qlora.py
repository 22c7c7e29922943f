"""QLoRA: LoRA on a base held in four bits (Dettmers et al., arXiv:2305.14314)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import DTypeName, Support, load_causal_lm
from regraft.methods.lora import LoRA

if TYPE_CHECKING:
    from torch import nn


class QLoRA(LoRA):
    """LoRA on an NF4 base with double quantisation, through bitsandbytes, on CUDA or CPU."""

    quantised: ClassVar[bool] = True
    #: Merged into four bits, the weights would be rounded again.
    support: ClassVar[Support] = Support(mixes=True, plain_lora=True)

    name: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    double_quantisation: bool = Field(True, description="Quantise the quantisation constants too.")

    def load_base(self, path: Path, dtype: DTypeName, device: str) -> nn.Module:
        """Load the base with its linear layers in NF4."""
        import torch
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.double_quantisation,
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        model = load_causal_lm(path, dtype, device, quantization_config=config, device_map={"": device})
        keep_gradients_right(model)
        return model


def keep_gradients_right(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking its weights for AVX512-BF16 processors.

    bitsandbytes 0.50 repacks a layer at its first inference pass there, and gradients through the repacked
    layer are wrong (relative error 0.9) without a warning. The flag must be off before the first pass.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
