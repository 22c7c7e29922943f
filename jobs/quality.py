"""Scores of captured answers that cost a metric or a judge: what `monitoring.quality` is given to look at."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from jobs.console import Say, say
from monitoring.measures import failed, unit_of
from monitoring.windows import hashed
from regraft.config import Experiment
from regraft.errors import ConfigError
from regraft.evals import Answer, Metric
from regraft.evals.judge import Judge
from regraft.records import CapturedExchange, Feedback


def late_scores(
    experiment: Experiment,
    exchanges: Sequence[CapturedExchange],
    feedback: Sequence[Feedback],
    say: Say = say,
    *,
    corrections: bool = True,
) -> dict[str, float]:
    """Score answers against references that came later, by the metric that gives `select.maximise`.

    A `reference` is what an answer is held against; where there is none, a `correction` is. Corrections are
    made of what was answered, and mostly where it was wrong: scores on them are comparable with scores on
    corrections alone, and not with those of an evaluation set.

    Args:
        experiment: Names the metric.
        exchanges: Of one version. What failed has no score.
        feedback: On any answers; of several on one the latest that has a reference or correction counts.
        say: Called with what could not be scored, and why.
        corrections: Whether corrections count.

    Returns:
        The score by id of the exchange; none of those on which the metric failed.
    """
    wanted = experiment.select.maximise
    metric = next(m for m in experiment.evaluate.metrics if wanted in {out.name for out in m.outputs})
    references: dict[str, str] = {}
    for said in sorted(feedback, key=lambda f: (f.created, f.id)):
        if reference := said.reference or (said.correction if corrections else None):
            references[said.answer_id] = reference
    found = [e for e in exchanges if e.id in references and not failed(e)]
    if not found:
        return {}
    if metric.asks_likelihood:
        say(f"{len(found)} references came later, but {wanted} needs the model itself: none is scored")
        return {}
    if isinstance(metric, Judge):
        found = _chosen(found, experiment.monitor.quality.judge_samples)
    return _scores(metric, wanted, found, references, say)


def judge_scores(
    experiment: Experiment, exchanges: Sequence[CapturedExchange], say: Say = say
) -> dict[str, float]:
    """Ask the judge of `evaluate.metrics` about a few exchanges, one of each session, chosen by hash.

    Verdicts are kept: the same exchange again costs nothing.

    Args:
        experiment: Names the judge, and how many exchanges it looks at.
        exchanges: What to choose from. What failed is not judged.
        say: Called with what could not be judged, and why.

    Returns:
        The verdict, 0 to 1, by id of the exchange; nothing without a judge, and none of those it failed on.

    Raises:
        ConfigError: If the judge compares with references, which traffic does not have.
    """
    count = experiment.monitor.quality.judge_samples
    judge = next((m for m in experiment.evaluate.metrics if isinstance(m, Judge)), None)
    if judge is None or not count:
        return {}
    if judge.mode == "pairwise":
        raise ConfigError(
            "monitor.quality.judge_samples: the judge of evaluate.metrics compares with references, which "
            "traffic does not have",
            "set judge_samples to 0, or the judge's mode to rubric",
        )
    return _scores(judge, "judge", _chosen(exchanges, count), {}, say)


def _chosen(exchanges: Sequence[CapturedExchange], count: int) -> list[CapturedExchange]:
    """At most `count` answers that came to their end, of as many sessions, in the order of their hashes."""
    chosen: dict[str, CapturedExchange] = {}
    for exchange in sorted(exchanges, key=lambda e: hashed(e.id)):
        if not failed(exchange) and exchange.finish_reason != "aborted":
            chosen.setdefault(unit_of(exchange), exchange)
    return list(chosen.values())[:count]


def _scores(
    metric: Metric,
    wanted: str,
    exchanges: Sequence[CapturedExchange],
    references: Mapping[str, str],
    say: Say,
) -> dict[str, float]:
    answers = [
        Answer(e.output, references.get(e.id, ""), "\n".join(m.content for m in e.messages))
        for e in exchanges
    ]
    scores: dict[str, float] = {}
    failures: Counter[str] = Counter()
    for exchange, found in zip(exchanges, metric.score_all(answers), strict=True):
        if isinstance(found, Exception):
            failures[f"{type(found).__name__}: {found}"] += 1
        elif not math.isfinite(found.get(wanted, math.nan)):
            failures[f"the metric gave no finite {wanted}"] += 1
        else:
            scores[exchange.id] = found[wanted]
    if failures:
        why = failures.most_common(1)[0][0]
        say(f"{wanted}: {failures.total()} of {len(answers)} answers have no score, most often: {why}")
    return scores
