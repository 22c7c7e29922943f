"""Runs the metrics over answers; a metric that fails on an example is recorded, never a silent zero."""

from __future__ import annotations

from collections.abc import Sequence

from regraft.evals import Answer, Metric
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
        said = "\n".join(message.content for message in example.prompt)
        answer = Answer(output, example.reference, said, example.tags)
        scores: dict[str, float] = {}
        failures: dict[str, str] = {}
        for metric in metrics:
            try:
                scores |= metric.score(answer)
            except Exception as error:  # a metric may be anybody's code: its failure is a value
                failures |= {out.name: f"{type(error).__name__}: {error}" for out in metric.outputs}
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
    return EvalReport(
        dataset_id=dataset_id,
        split=split,
        metric_versions={metric.name: metric.version for metric in metrics},
        examples=tuple(scored),
        whole=whole_figures(scored, metrics),
    )


def whole_figures(scored: Sequence[ExampleScore], metrics: Sequence[Metric]) -> dict[str, float]:
    """The figures that only all of the answers together have."""
    answers = [Answer(e.output, e.reference, e.prompt, e.tags) for e in scored]
    return {name: value for metric in metrics for name, value in metric.whole(answers).items()}
