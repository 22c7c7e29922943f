"""Every combination of the lists; ranges are drawn a few times for each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from regraft.methods import parse_method
from regraft.search.base import Fixed, Proposer, Search, key
from regraft.search.space import Arm


class Grid(Search):
    """Every combination of the lists, with `sweep.samples` draws of the ranges for each."""

    name: Literal["grid"] = "grid"

    def proposer(self, arms: Sequence[Arm], *, samples: int, seed: int) -> Proposer:
        """All of it, in the order of the file."""
        return Fixed(method for arm in arms for method in arm.grid(samples, seed))


class Draws(Search):
    """A number of draws from the whole space: a method, then each of its fields (Bergstra & Bengio, 2012).

    What is not open is tried once, first, and counts.
    """

    name: Literal["random"] = "random"
    trials: int = Field(ge=1, description="How many methods to try in all.")

    def proposer(self, arms: Sequence[Arm], *, samples: int, seed: int) -> Proposer:
        """All draws, made beforehand; `samples` plays no part."""
        rng = random.Random(seed)
        found = [parse_method(arm.fixed) for arm in arms if not arm.is_open]
        opened = [arm for arm in arms if arm.is_open]
        # A small space may hold fewer than were asked for: draws that repeat one come to nothing.
        for _ in range(20 * self.trials if opened else 0):
            if len({key(method) for method in found}) >= self.trials:
                break
            found.append(parse_method(rng.choice(opened).draw(rng)))
        return Fixed(found)
