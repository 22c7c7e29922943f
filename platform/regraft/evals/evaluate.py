"""Runs the metrics over answers; a metric that fails on an example is recorded, never a silent zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from regraft.evals import Answer, Metric
from regraft.records import EvalReport, Example, ExampleScore, Likelihood

#: Mean negative log-probability of a token of a metric's texts, by the metric's name: candidate and base.
Nats = Mapping[str, tuple[float, float]]


def evaluate(
    examples: Sequence[Example],
    outputs: Sequence[str],
    metrics: Sequence[Metric],
    *,
    dataset_id: str,
    split: str,
    likelihoods: Sequence[Likelihood | None] = (),
    texts: Nats | None = None,
) -> EvalReport:
    """Score one output for each example.

    Args:
        examples: What was asked, with the reference answers.
        outputs: The answers, in the same order.
        metrics: What to score by.
        dataset_id: The dataset the examples are from.
        split: The evaluation set's name.
        likelihoods: Of the references, in the same order; none for metrics that do not ask.
        texts: What the candidate and its base say of the metrics' own texts; None if it was not asked.
    """
    report = EvalReport(
        dataset_id=dataset_id,
        split=split,
        metric_versions=versions(metrics),
        examples=score_answers(examples, outputs, metrics, likelihoods),
    )
    return with_whole(report, metrics, texts)


def versions(metrics: Sequence[Metric]) -> dict[str, int]:
    """The metrics' versions by their names."""
    return {metric.name: metric.version for metric in metrics}


def score_answers(
    examples: Sequence[Example],
    outputs: Sequence[str],
    metrics: Sequence[Metric],
    likelihoods: Sequence[Likelihood | None] = (),
) -> tuple[ExampleScore, ...]:
    """What each answer scores by itself; see `evaluate`."""
    answers = [
        Answer(output, example.reference, _said(example), example.tags, likelihood)
        for example, output, likelihood in zip(
            examples, outputs, likelihoods or [None] * len(examples), strict=True
        )
    ]
    scores: list[dict[str, float]] = [{} for _ in answers]
    failures: list[dict[str, str]] = [{} for _ in answers]
    for metric in metrics:
        if not metric.outputs:
            continue
        for index, found in enumerate(metric.score_all(answers)):
            if isinstance(found, Exception):
                failures[index] |= {out.name: _reason(found) for out in metric.outputs}
            else:
                scores[index] |= found
    return tuple(
        ExampleScore(
            example_id=example.id,
            prompt=example.prompt[-1].content,
            reference=example.reference,
            output=answer.output,
            scores=scores[index],
            failures=failures[index],
            tags=example.tags,
            likelihood=answer.likelihood,
        )
        for index, (example, answer) in enumerate(zip(examples, answers, strict=True))
    )


def with_whole(report: EvalReport, metrics: Sequence[Metric], texts: Nats | None = None) -> EvalReport:
    """The report with the figures of all its answers together, and those of the model itself."""
    answers = [Answer(e.output, e.reference, e.prompt, e.tags, e.likelihood) for e in report.examples]
    scores = [e.scores for e in report.examples]
    whole: dict[str, float] = {}
    failures: dict[str, str] = {}
    for metric in metrics:
        try:
            for name, found in metric.whole(answers, scores).items():
                if isinstance(found, Exception):
                    failures[name] = _reason(found)
                else:
                    whole[name] = found
            if metric.texts:
                whole |= metric.of_texts(*_asked(texts, metric))
        except Exception as error:  # as with a single answer
            failures |= {out.name: _reason(error) for out in metric.wholes}
    return report.model_copy(update={"whole": whole, "whole_failures": failures})


def _asked(texts: Nats | None, metric: Metric) -> tuple[float, float]:
    if texts is None or metric.name not in texts:
        raise ValueError("the candidate is not a model that was loaded here")
    return texts[metric.name]


def _said(example: Example) -> str:
    return "\n".join(message.content for message in example.prompt)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
