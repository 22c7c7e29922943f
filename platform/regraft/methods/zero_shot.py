"""The control: the untuned base model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from regraft.methods.base import Kind, Support
from regraft.methods.quantised import OnAnyBase

if TYPE_CHECKING:
    from torch import nn


class ZeroShot(OnAnyBase):
    """The base model as it is. Every method has to beat it, or is shown not to."""

    kind: ClassVar[Kind] = "control"
    support: ClassVar[Support] = Support(quantises=True)
    label_fields: ClassVar[tuple[str, ...]] = ()

    name: Literal["zero_shot"] = "zero_shot"
    learning_rate: float = Field(1.0, gt=0, le=1.0, exclude=True, description="Unused: nothing is trained.")

    def apply(self, base: nn.Module) -> nn.Module:
        """The base itself."""
        return base

    def release(self, model: nn.Module) -> nn.Module | None:
        """The base itself."""
        return model

    def save(self, model: nn.Module, folder: Path) -> None:
        """Nothing was trained, so there is nothing to write."""

    def attach(self, base: nn.Module, folder: Path) -> nn.Module:
        """The base itself."""
        return base
