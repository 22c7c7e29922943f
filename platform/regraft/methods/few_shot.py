"""The other control: the untuned base model, shown a few training examples in every prompt."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from regraft.methods.zero_shot import ZeroShot
from regraft.records import Example, Message


class FewShot(ZeroShot):
    """What prompting alone can do (Brown et al., arXiv:2005.14165), for the price of longer prompts.

    A control is compared with and never served: the examples stand in no adapter.
    """

    label_fields: ClassVar[tuple[str, ...]] = ("shots",)

    name: Literal["few_shot"] = "few_shot"  # type: ignore[assignment]
    shots: int = Field(3, ge=1, le=64, description="Training examples shown before every prompt.")
    shots_seed: int = Field(0, ge=0, description="Seed of their choice.")

    def shown(self, train: Sequence[Example]) -> tuple[Message, ...]:
        """A few examples of the training split, drawn by the seed, without their system turns."""
        drawn = random.Random(self.shots_seed).sample(list(train), min(self.shots, len(train)))
        return tuple(m for example in drawn for m in example.messages if m.role != "system")
