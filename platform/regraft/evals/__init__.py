"""Metrics: one file each; the union below is the registry. `evaluate.py` runs them.

To add a metric, write one file with a subclass of `Metric` and add it to `AnyMetric`.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from regraft.evals.base import Metric
from regraft.evals.exact_match import ExactMatch
from regraft.evals.rouge import Rouge
from regraft.evals.token_f1 import TokenF1

AnyMetric = Annotated[Rouge | ExactMatch | TokenF1, Field(discriminator="name")]


def default_metrics() -> tuple[AnyMetric, ...]:
    """ROUGE-1/2/L, exact match and token F1."""
    return (Rouge(), ExactMatch(), TokenF1())


__all__ = ["AnyMetric", "ExactMatch", "Metric", "Rouge", "TokenF1", "default_metrics"]
