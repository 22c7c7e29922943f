"""When a trial is not worth finishing. Pure rules over evaluation points; they know no Ray.

Points are spread evenly over a trial's tokens, so that the axis is the share of its training, the same for
every batch size. Trials are compared within a bracket: by default those of one method, because a method that
starts slowly, as soft prompts do, would be ended by another's fast start and never show what it comes to.
"""

from __future__ import annotations

import math
import statistics
from abc import ABC, abstractmethod
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Rule(ABC):
    """The memory of one sweep: every report goes through `stops`."""

    @abstractmethod
    def stops(self, bracket: str, trial: str, point: int, loss: float) -> bool:
        """Whether the trial should end here.

        Args:
            bracket: Trials with the same are compared.
            trial: Which one.
            point: Evaluation points it has passed, from 1.
            loss: Its evaluation loss there.
        """


class Stopping(BaseModel):
    """What all rules have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    grace: int = Field(2, ge=1, description="Evaluation points before a trial may be stopped.")
    peers: int = Field(
        3, ge=1, description="Trials that must have reached a point before one is stopped there."
    )
    brackets: Literal["method", "sweep"] = Field(
        "method", description="Hold a trial against those of its own method, or against all of the sweep."
    )


class Asha(Stopping):
    """Asynchronous successive halving (Li et al., arXiv:1810.05934)."""

    name: Literal["asha"] = "asha"
    reduction: float = Field(3.0, gt=1, description="Of those that reach a rung, one in this many goes on.")

    def rule(self) -> Rule:
        """A fresh memory."""
        return _Asha(self)


class Median(Stopping):
    """Ends what at its best is worse than the median of the others' running means (Vizier: Golovin, 2017)."""

    name: Literal["median"] = "median"

    def rule(self) -> Rule:
        """A fresh memory."""
        return _Median(self)


AnyStopping = Annotated[Asha | Median, Field(discriminator="name")]


class _Asha(Rule):
    def __init__(self, settings: Asha) -> None:
        self._settings = settings
        self._rungs: dict[tuple[str, int], dict[str, float]] = {}

    def stops(self, bracket: str, trial: str, point: int, loss: float) -> bool:
        """Whether it is not among the best of its rung, as far as the rung is filled."""
        rung = self._rung(point)
        if rung is None:
            return False
        seen = self._rungs.setdefault((bracket, rung), {})
        if trial in seen:
            return False
        seen[trial] = loss
        if len(seen) < self._settings.peers:
            return False
        going_on = max(1, math.floor(len(seen) / self._settings.reduction))
        return loss > sorted(seen.values())[going_on - 1]

    def _rung(self, point: int) -> int | None:
        """The highest rung at or below a point: grace, and its multiples by powers of the reduction."""
        if point < self._settings.grace:
            return None
        power = math.floor(math.log(point / self._settings.grace, self._settings.reduction) + 1e-9)
        return round(self._settings.grace * self._settings.reduction**power)


class _Median(Rule):
    def __init__(self, settings: Median) -> None:
        self._settings = settings
        self._curves: dict[str, dict[str, dict[int, float]]] = {}

    def stops(self, bracket: str, trial: str, point: int, loss: float) -> bool:
        """Whether its best so far is above the median of what the others had on average by this point."""
        curves = self._curves.setdefault(bracket, {})
        own = curves.setdefault(trial, {})
        own[point] = loss
        means = [
            statistics.fmean(v for p, v in curve.items() if p <= point)
            for other, curve in curves.items()
            if other != trial and max(curve) >= point
        ]
        if point < self._settings.grace or len(means) + 1 < self._settings.peers:
            return False
        return min(own.values()) > statistics.median(means)
