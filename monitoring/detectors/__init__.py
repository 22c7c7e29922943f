"""Drift detectors: one file each; the union below is the registry.

To add a detector, write one file with a subclass of `Detector` and add it to `AnyDetector`.
"""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field, TypeAdapter

from monitoring.detectors.base import Detection, Detector, NovelExchange, Term
from monitoring.detectors.calibrated import Calibrated
from monitoring.detectors.domain_classifier import DomainClassifier
from monitoring.detectors.evidently_columns import EvidentlyColumns
from monitoring.detectors.evidently_preset import EvidentlyPreset
from monitoring.detectors.omnibus import Omnibus

AnyDetector = Annotated[
    Omnibus | Calibrated | DomainClassifier | EvidentlyColumns | EvidentlyPreset, Field(discriminator="name")
]

DETECTOR_CLASSES: tuple[type[Detector], ...] = get_args(get_args(AnyDetector)[0])
_ADAPTER: TypeAdapter[Detector] = TypeAdapter(AnyDetector)


def parse_detector(settings: dict[str, object]) -> Detector:
    """Build a detector from its settings.

    Args:
        settings: `name` and any of that detector's fields.

    Raises:
        pydantic.ValidationError: If the name or a field is unknown, or a value is out of range.
    """
    return _ADAPTER.validate_python(settings)


__all__ = [
    "DETECTOR_CLASSES",
    "AnyDetector",
    "Calibrated",
    "Detection",
    "Detector",
    "DomainClassifier",
    "EvidentlyColumns",
    "EvidentlyPreset",
    "NovelExchange",
    "Omnibus",
    "Term",
    "parse_detector",
]
