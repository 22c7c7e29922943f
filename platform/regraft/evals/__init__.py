"""Metrics: one file each; the union below is the registry. `evaluate.py` runs them.

To add a metric, write one file with a subclass of `Metric` and add it to `AnyMetric`; or keep it to yourself
and name it by its path, `module:Class`.
"""

from __future__ import annotations

from typing import Annotated, Any, get_args

from pydantic import Discriminator, Tag

from regraft.evals.base import Answer, Metric, Output, Scores
from regraft.evals.calibration import Calibration
from regraft.evals.custom import Custom
from regraft.evals.exact_match import ExactMatch
from regraft.evals.forgetting import Forgetting
from regraft.evals.form import Form
from regraft.evals.grounding import Grounding
from regraft.evals.json_output import JsonOutput
from regraft.evals.judge import Judge
from regraft.evals.label import Label
from regraft.evals.ngrams import Ngrams
from regraft.evals.perplexity import Perplexity
from regraft.evals.pii import Pii
from regraft.evals.refusal import Refusal
from regraft.evals.rouge import Rouge
from regraft.evals.similarity import Similarity
from regraft.evals.token_f1 import TokenF1
from regraft.evals.toxicity import Toxicity


def _kind(value: Any) -> str:
    """The name of a metric; `module:Class` for one of the user's own."""
    name = str(value.get("name") if isinstance(value, dict) else getattr(value, "name", None))
    return "module:Class" if ":" in name else name


AnyMetric = Annotated[
    Annotated[Rouge, Tag("rouge")]
    | Annotated[ExactMatch, Tag("exact_match")]
    | Annotated[TokenF1, Tag("token_f1")]
    | Annotated[Ngrams, Tag("ngrams")]
    | Annotated[Label, Tag("label")]
    | Annotated[JsonOutput, Tag("json")]
    | Annotated[Form, Tag("form")]
    | Annotated[Refusal, Tag("refusal")]
    | Annotated[Grounding, Tag("grounding")]
    | Annotated[Pii, Tag("pii")]
    | Annotated[Perplexity, Tag("perplexity")]
    | Annotated[Calibration, Tag("calibration")]
    | Annotated[Forgetting, Tag("forgetting")]
    | Annotated[Judge, Tag("judge")]
    | Annotated[Similarity, Tag("similarity")]
    | Annotated[Toxicity, Tag("toxicity")]
    | Annotated[Custom, Tag("module:Class")],
    Discriminator(_kind),
]
#: Those of this package.
METRIC_CLASSES: tuple[type[Metric], ...] = tuple(
    cls for tagged in get_args(get_args(AnyMetric)[0]) if (cls := get_args(tagged)[0]) is not Custom
)


def default_metrics() -> tuple[AnyMetric, ...]:
    """Likeness to the reference, form, safety, likelihood, and what was forgotten."""
    return (
        Rouge(), ExactMatch(), TokenF1(), Form(), Refusal(), Pii(), Perplexity(), Calibration(), Forgetting()
    )  # fmt: skip


__all__ = ["METRIC_CLASSES", "Answer", "AnyMetric", "Metric", "Output", "Scores", "default_metrics"]
