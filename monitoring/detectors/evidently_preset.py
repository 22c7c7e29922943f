"""Evidently's DataDriftPreset with its defaults on the form descriptors: advisory, its own verdict.

For who knows Evidently and wants to see what it would say. By measurement that is "drift" on most ordinary
windows with a reference of over 1,000 rows (51-90 % of windows of 50-100), hardly ever with a smaller one.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from monitoring.descriptors import in_words
from monitoring.detectors.base import Detection, Detector
from monitoring.detectors.evidently_columns import dataset, frames
from monitoring.windows import Row
from regraft.records import TestResult


class _Column(NamedTuple):
    """What Evidently says of one column: a p-value or a distance, as `method` has it."""

    name: str
    method: str
    value: float
    threshold: float

    @property
    def is_p_value(self) -> bool:
        return self.method.endswith("p_value")

    @property
    def drifted(self) -> bool:
        return self.value < self.threshold if self.is_p_value else self.value >= self.threshold

    @property
    def words(self) -> str:
        return f"{self.method} {self.value:.3g}, threshold {self.threshold:g}"


class EvidentlyPreset(Detector):
    """Evidently's verdict by its defaults: drift where half of the descriptors drift, each by its own test.

    Which test depends on the column, and on whether the reference has more than 1,000 rows: up to there they
    give p-values, beyond it distances. There is no p-value of the whole. `p_value` is the smallest one of its
    columns times the number of all columns (Bonferroni), and 1 where it gives distances only: that is
    no evidence either way, whatever the verdict. The p-value of a column with three to five values is too
    small by itself: its chi-squared test takes the reference for the truth. So nothing is decided by it.
    """

    advisory: ClassVar[bool] = True
    effect_unit: ClassVar[str] = "share of descriptors that Evidently's preset calls drifted"

    name: Literal["evidently_preset"] = "evidently_preset"

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """See `Detector.detect`. The first test is the verdict on the whole, the others are the columns."""
        os.environ["DO_NOT_TRACK"] = "1"
        from evidently import Report
        from evidently.presets import DataDriftPreset

        before, now = frames(reference, window)
        names = list(before.columns)
        if not names:
            return Detection(p_value=1.0, effect=0.0, tests=())
        with np.errstate(invalid="ignore"):  # correlations of columns that are constant on one side
            run = Report([DataDriftPreset(columns=names)]).run(dataset(now), dataset(before))
        whole, *singles = run.dict()["metrics"]
        columns = [
            _Column(
                single["config"]["column"],
                single["config"]["method"],
                float(single["value"]),
                single["config"]["threshold"],
            )
            for single in singles
        ]
        share, needed = float(whole["value"]["share"]), float(whole["config"]["drift_share"])
        p_values = {c.name: _adjusted(c, len(columns)) for c in columns}
        p_value = min(p_values.values())
        verdict = (
            f"Evidently's verdict is {'drift' if share >= needed else 'no drift'}: "
            f"{share:.0%} of {len(columns)} descriptors drifted, {needed:.0%} needed"
        )
        tests = [TestResult(name="verdict", p_value=p_value, effect=share, detail=verdict)]
        tests += [
            TestResult(name=c.name, p_value=p_values[c.name], effect=float(c.drifted), detail=c.words)
            for c in columns
        ]
        drifted = [f"{in_words(c.name)} ({c.words})" for c in columns if c.drifted]
        return Detection(
            p_value=p_value,
            effect=share,
            tests=tuple(tests),
            drivers=(verdict, *drifted) if drifted else (),
        )


def _adjusted(column: _Column, columns: int) -> float:
    """Its p-value times the number of columns; 1 for a distance or a test without a result."""
    if not column.is_p_value or math.isnan(column.value):
        return 1.0
    # Its z-test gives 0 for what is below the resolution of a float.
    return min(1.0, max(column.value, sys.float_info.epsilon) * columns)
