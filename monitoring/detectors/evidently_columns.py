"""Evidently's column-by-column drift on the form descriptors: advisory, for the report.

Its whole-dataset verdict is not used: by measurement it raises the alarm on most ordinary windows with a
reference of over 1,000 rows (51-90 % of windows of 50-100), and on hardly anything with a smaller one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pandas as pd
from pydantic import Field

from monitoring.descriptors import describe_sides, in_words
from monitoring.detectors.base import Detection, Detector
from monitoring.windows import Row
from regraft.records import TestResult


def column_metrics(columns: Sequence[str], threshold: float) -> list[Any]:
    """One `ValueDrift` a column, Kolmogorov-Smirnov for all: its default for categories false-alarms."""
    os.environ["DO_NOT_TRACK"] = "1"
    from evidently.metrics import ValueDrift

    return [ValueDrift(column=column, method="ks", threshold=threshold) for column in columns]


def dataset(frame: pd.DataFrame) -> Any:
    """A frame of numbers as Evidently takes it, columns named: left to guess, it tests all it finds."""
    os.environ["DO_NOT_TRACK"] = "1"
    from evidently import DataDefinition, Dataset

    return Dataset.from_pandas(frame, DataDefinition(numerical_columns=list(frame.columns)))


def frames(reference: Sequence[Row], window: Sequence[Row]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Descriptors of both sides, without the columns that never vary over the two."""
    sides = [
        describe_sides([r.prompt for r in rows], [r.output for r in rows]) for rows in (reference, window)
    ]
    varying = [c for c in sides[0] if pd.concat([sides[0][c], sides[1][c]]).nunique() > 1]
    return sides[0][varying], sides[1][varying]


class EvidentlyColumns(Detector):
    """Evidently's test of every descriptor by itself, Bonferroni-adjusted; the effect is a share of them."""

    advisory: ClassVar[bool] = True
    effect_unit: ClassVar[str] = "share of descriptors that Evidently calls drifted"

    name: Literal["evidently_columns"] = "evidently_columns"
    threshold: float = Field(0.05, gt=0, lt=1, description="Evidently's threshold for one column.")

    def detect(self, reference: Sequence[Row], window: Sequence[Row]) -> Detection:
        """See `Detector.detect`."""
        os.environ["DO_NOT_TRACK"] = "1"
        from evidently import Report

        before, now = frames(reference, window)
        columns = list(before.columns)
        if not columns:
            return Detection(p_value=1.0, effect=0.0, tests=())
        run = Report(column_metrics(columns, self.threshold)).run(dataset(now), dataset(before))
        raw = [float(result.value) for result in run.metric_results.values()]
        tests = tuple(
            TestResult(name=column, p_value=min(1.0, p * len(columns)), effect=float(p < self.threshold))
            for column, p in zip(columns, raw, strict=True)
        )
        drifted = sorted((p, column) for column, p in zip(columns, raw, strict=True) if p < self.threshold)
        return Detection(
            p_value=min(test.p_value for test in tests),
            effect=len(drifted) / len(columns),
            tests=tests,
            drivers=tuple(f"{in_words(column)} (p {p:.3f}, not adjusted)" for p, column in drifted),
        )
