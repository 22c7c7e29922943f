"""The frozen reference of a champion: its evaluation's answers, then its first accepted traffic."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from jobs.console import Say
from jobs.quality import judge_scores, late_scores
from jobs.workspace import Connection
from monitoring.measures import unit_means, unit_of
from monitoring.quality import baseline_of, baseline_of_rows
from monitoring.windows import Reference, Row, accepted, freeze, load, rows_of
from regraft.config import Experiment
from regraft.data.captures import CaptureStore
from regraft.data.feedback import FeedbackStore
from regraft.errors import RegraftError
from regraft.records import CapturedExchange, EvalReport, Feedback, ModelVersion


def freeze_evaluation(
    experiment: Experiment,
    version: ModelVersion,
    reports: Sequence[EvalReport | None],
    connection: Connection,
) -> None:
    """Freeze what a version answered on its evaluation sets, before it is promoted."""
    examples = [example for report in reports if report is not None for example in report.examples]
    rows = [Row(id=e.example_id, prompt=e.prompt, output=e.output) for e in examples]
    name = experiment.select.maximise
    scores = [e.scores[name] for e in examples if name in e.scores]
    with tempfile.TemporaryDirectory() as folder:
        quality = baseline_of_rows(rows, scores=scores)
        freeze(Path(folder), model=version.name, version=version.version, rows=rows, quality=quality)
        connection.registry.save_artifact(version.run_id, _evaluation(version), Path(folder))


def reference_of(version: ModelVersion, connection: Connection) -> Reference:
    """What a version's traffic is compared with: its accepted traffic where that was frozen.

    Raises:
        DataError: If there is no reference, or it was changed.
    """
    registry = connection.registry
    name = (
        _traffic(version)
        if registry.has_artifact(version.run_id, _traffic(version))
        else _evaluation(version)
    )
    if name == _evaluation(version) and not registry.has_artifact(version.run_id, name):
        raise RegraftError(
            f"{version.served_id} has no frozen reference",
            "promote a version by `regraft sweep`, which freezes its answers",
        )
    with tempfile.TemporaryDirectory() as folder:
        return load(registry.load_artifact(version.run_id, name, Path(folder)))


def freeze_traffic(
    experiment: Experiment,
    version: ModelVersion,
    before: Reference,
    first: Callable[[Callable[[Sequence[CapturedExchange]], bool]], Sequence[CapturedExchange]],
    feedback: Sequence[Feedback],
    connection: Connection,
    say: Say,
) -> Reference | None:
    """Freeze the first accepted traffic, once there is enough; it is never frozen twice.

    Args:
        experiment: Whose endpoint.
        version: The champion.
        before: The reference of its evaluation, whose scores are kept where the traffic has too few.
        first: Gives the version's own exchanges from its first on, until there are enough.
        feedback: On them.
        connection: Where things are.
        say: Where lines go.

    Returns:
        The new reference; None while there are fewer accepted sessions than `monitor.reference_rows`.
    """
    wanted = experiment.monitor.reference_rows
    disliked = frozenset(f.answer_id for f in feedback if f.score is not None and f.score < 0)
    exchanges = first(lambda found: accepted(found, disliked, wanted) is not None)
    taken = accepted(exchanges, disliked, wanted)
    if taken is None:
        return None
    until = taken[-1].created
    # Quality is that of all traffic of that time: what failed was not accepted, and did fail.
    whole = [e for e in exchanges if e.created <= until]
    judged = judge_scores(experiment, whole, say)
    scores = scores_of(experiment, whole, feedback, say) or before.quality.scores
    quality = baseline_of(whole, feedback, scores=scores, judge=judged.values())
    with tempfile.TemporaryDirectory() as folder:
        frozen = freeze(
            Path(folder),
            model=version.name,
            version=version.version,
            rows=rows_of(taken),
            source="traffic",
            until=until,
            quality=quality,
        )
        connection.registry.save_artifact(version.run_id, _traffic(version), Path(folder))
    say(f"the first {wanted} accepted sessions of {version.served_id} (to {until}) are its reference now")
    return frozen


def scores_of(
    experiment: Experiment, exchanges: Sequence[CapturedExchange], feedback: Sequence[Feedback], say: Say
) -> list[float]:
    """How well traffic was answered by references that came later, one score of each session.

    Users ask otherwise than evaluation sets, harder or easier: held against an evaluation's scores, later
    traffic may look worse from its first day on. Nothing where there are fewer than `min_count`.
    """
    found = late_scores(experiment, exchanges, feedback, say, corrections=False)
    scores = unit_means(found, {e.id: unit_of(e) for e in exchanges})
    return scores if len(scores) >= experiment.monitor.quality.min_count else []


def captured(experiment: Experiment, connection: Connection) -> CaptureStore:
    """The store of the endpoint's exchanges."""
    return CaptureStore.of(connection.captures(experiment), experiment.serve.capture)


def feedback_of(experiment: Experiment, connection: Connection) -> list[Feedback]:
    """What clients said of the answers."""
    folder = connection.captures(experiment)
    store = FeedbackStore(folder.with_name(f"{folder.name}-feedback"))
    return store.read() if store.folder.exists() else []


def _evaluation(version: ModelVersion) -> str:
    return f"reference-{version.version}"


def _traffic(version: ModelVersion) -> str:
    return f"traffic-reference-{version.version}"
