"""What every drift detector is: settings and behaviour in one frozen class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from monitoring.sequential import given_reference
from monitoring.windows import Row
from regraft.records import Record, TestResult


class NovelExchange(Record):
    """An exchange of the window that looks unlike the reference; the higher the score, the less alike."""

    row: Row
    score: float


class Term(Record):
    """A term, with its share of the reference's exchanges and of the window's."""

    text: str
    reference_share: float
    window_share: float


class Detection(Record):
    """What a detector found, before any threshold is applied.

    Attributes:
        p_value: Chance of a window at least this unlike the reference, if nothing changed.
        effect: How much changed, in the unit the detector states.
        tests: The single tests, with p-values adjusted for there being several.
        drivers: What changed most, in words.
        novel: The exchanges most unlike the reference, most unlike first.
        terms: The terms that grew most.
        share: Sessions of the window over those of the reference that they were compared with.
    """

    p_value: float
    effect: float
    tests: tuple[TestResult, ...]
    drivers: tuple[str, ...] = ()
    novel: tuple[NovelExchange, ...] = ()
    terms: tuple[Term, ...] = ()
    share: float = 0.0

    @property
    def counted(self) -> float:
        """The p-value as evidence over many windows takes it: given the reference that they share."""
        return given_reference(self.p_value, self.share)


class Detector(BaseModel):
    """One way of comparing a window with the reference. Subclasses add a `name` literal and their fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    #: Whether its p-value is calibrated well enough to decide anything.
    advisory: ClassVar[bool] = False
    #: The unit of its effect, as it stands in a sentence.
    effect_unit: ClassVar[str] = ""

    name: str

    def lacking(self, reference: Sequence[Row], window: Sequence[Row]) -> str:
        """What is missing for this detector to tell anything, in words; empty if there is enough."""
        return ""

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """Compare a window with the reference.

        Args:
            reference: Rows frozen at promotion.
            window: Rows captured since.

        Returns:
            The same finding for the same rows in the same order, always.
        """
        raise NotImplementedError
