"""LoRA that starts from the weights' own directions: PiSSA and OLoRA.

Both take their starting pair out of the base's weights, so the trained pair fits that changed base alone. It
is saved as plain LoRA of twice the rank for the untouched base: the trained pair, less the starting one.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Support
from regraft.methods.lora import LoRA

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import nn


class FromWeights(LoRA):
    """What both share. The base does not come back clean from them."""

    keeps_base: ClassVar[bool] = False
    #: Taken out of four bits and put back, the weights would not be those the pair was taken from.
    support: ClassVar[Support] = LoRA.support._replace(quantises=False)
    start: ClassVar[str]

    learning_rate: float = Field(1e-3, gt=0, le=1e-1)

    def peft_config(self) -> LoraConfig:
        """LoRA's, with the starting pair taken from the weights."""
        config = super().peft_config()
        config.init_lora_weights = self.start
        return config

    def apply(self, base: nn.Module) -> nn.Module:
        """Put the pairs beside the layers, take them off the weights, and keep them: saving needs them."""
        model: Any = super().apply(base)
        folder = tempfile.TemporaryDirectory(prefix="regraft-start-")
        config = model.peft_config["default"]
        # PEFT converts against a starting pair only if its own file calls itself plain.
        config.init_lora_weights = True
        model.save_pretrained(folder.name, safe_serialization=True)
        config.init_lora_weights = self.start
        model.starting_pair = folder  # lives, and is deleted, with the model
        return model  # type: ignore[no-any-return]

    def save(self, model: nn.Module, folder: Path) -> None:
        """Write plain LoRA for the untouched base."""
        model.save_pretrained(  # type: ignore[operator]
            folder,
            safe_serialization=True,
            path_initial_model_for_weight_conversion=model.starting_pair.name,  # type: ignore[union-attr]
        )

    def release(self, model: nn.Module) -> nn.Module | None:
        """A loaded adapter is plain LoRA and comes off clean; a trained one has changed the base."""
        return None if hasattr(model, "starting_pair") else super().release(model)


class PiSSA(FromWeights):
    """Starts from the weights' largest singular directions (Meng et al., arXiv:2404.02948)."""

    start: ClassVar[str] = "pissa"
    name: Literal["pissa"] = "pissa"  # type: ignore[assignment]


class OLoRA(FromWeights):
    """Starts from an orthonormal basis of the weights, by QR (Büyükakyüz, arXiv:2406.01775)."""

    start: ClassVar[str] = "olora"
    name: Literal["olora"] = "olora"  # type: ignore[assignment]
    learning_rate: float = Field(5e-4, gt=0, le=1e-1)
