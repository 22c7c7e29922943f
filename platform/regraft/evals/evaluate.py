"""Runs the metrics over answers; a metric that fails on an example is recorded, never a silent zero."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.evals import Metric
from regraft.records import EvalReport, Example, ExampleScore


def evaluate(
    examples: Sequence[Example],
    outputs: Sequence[str],
    metrics: Sequence[Metric],
    *,
    dataset_id: str,
    split: str,
) -> EvalReport:
    """Score one output for each example.

    Args:
        examples: What was asked, with the reference answers.
        outputs: The answers, in the same order.
        metrics: What to score by.
        dataset_id: The dataset the examples are from.
        split: The evaluation set's name.
    """
    scored = []
    for example, output in zip(examples, outputs, strict=True):
        scores: dict[str, float] = {}
        failures: dict[str, str] = {}
        for metric in metrics:
            try:
                scores |= metric.score(output, example.reference)
            except Exception as error:  # a metric may be anybody's code: its failure is a value
                failures |= {key: f"{type(error).__name__}: {error}" for key in metric.outputs}
        scored.append(
            ExampleScore(
                example_id=example.id,
                prompt=example.prompt[-1].content,
                reference=example.reference,
                output=output,
                scores=scores,
                failures=failures,
                tags=example.tags,
            )
        )
    versions = {metric.name: metric.version for metric in metrics}
    return EvalReport(dataset_id=dataset_id, split=split, metric_versions=versions, examples=tuple(scored))
