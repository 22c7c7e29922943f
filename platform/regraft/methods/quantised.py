"""Methods that may train on a base held in four bits, through bitsandbytes, on CUDA or CPU.

NF4 and the second quantisation of its constants: Dettmers et al., arXiv:2305.14314.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from regraft.methods.base import DTypeName, Method, load_causal_lm

if TYPE_CHECKING:
    import torch
    from torch import nn

#: Four bits a weight, and a constant for every 64; `nf4_double` holds the constants in eight bits too.
Quantisation = Literal["nf4", "nf4_double"]


class OnAnyBase(Method):
    """A method that leaves the base's weights alone, so that they may be held in four bits."""

    quantise: Quantisation | None = Field(
        None,
        description="Hold the base's linear layers in four bits, with constants in full or quantised too; "
        "null for model.dtype.",
    )

    @property
    def quantised(self) -> bool:
        """Whether the base is held in four bits."""
        return self.quantise is not None

    @property
    def label(self) -> str:
        """A short name, which tells a base in four bits from one in full."""
        usual = self.quantise == type(self).model_fields["quantise"].default
        return super().label if usual else f"{super().label} {self.quantise or 'unquantised'}"

    @field_validator("quantise")
    @classmethod
    def _trains_right_in_four_bits(cls, value: Quantisation | None) -> Quantisation | None:
        if value and not cls.support.quantises:
            raise ValueError("this method does not train on a quantised base as it does on a whole one")
        return value

    def load_base(self, path: Path, dtype: DTypeName, device: str) -> nn.Module:
        """Load the base, with its linear layers in NF4 if `quantise` says so."""
        if self.quantise is None:
            return super().load_base(path, dtype, device)
        import torch
        from transformers import BitsAndBytesConfig

        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=self.quantise == "nf4_double",
            bnb_4bit_compute_dtype=getattr(torch, dtype),
        )
        model = load_causal_lm(path, dtype, device, quantization_config=config, device_map={"": device})
        keep_gradients_right(model)
        return model


def weight_of(module: Any) -> torch.Tensor:
    """A linear layer's weights in full, whether or not they are held in four bits; (outputs, inputs)."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return module.weight.data  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(module.weight.data, state)  # type: ignore[no-any-return]


def keep_gradients_right(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking its weights for AVX512-BF16 processors.

    bitsandbytes 0.50 repacks a layer at its first inference pass there, and gradients through the repacked
    layer are wrong (relative error 0.9) without a warning. The flag must be off before the first pass.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def paged_adamw(groups: list[dict[str, Any]], rate: float) -> Any:
    """AdamW whose moments CUDA may page out to the host when its memory runs short (QLoRA, section 3)."""
    from bitsandbytes.optim import PagedAdamW32bit

    return PagedAdamW32bit(groups, lr=rate)
