"""From a sweep's winner to a champion: register it, judge it, move the alias if it is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

from jobs.console import Say, say
from jobs.evaluate import evaluate_version
from jobs.evaluation_sets import keep_sets
from jobs.parity import check_parity
from jobs.references import freeze_evaluation
from jobs.rollback import promoting
from jobs.workspace import Connection
from regraft.cluster.quiet import QuietWorker
from regraft.config import Constraint, Experiment
from regraft.data.dataset import evaluation_parts
from regraft.errors import RegraftError
from regraft.records import (
    DatasetVersion,
    Leaderboard,
    ModelVersion,
    Parity,
    PromotionDecision,
    TrialResult,
)
from regraft.selection.gate import Candidate, Rules, Trust, judge
from regraft.tracking.registry import CHAMPION, PromotionConflictError

CHALLENGER = "challenger"
#: Figures of safety and form, and how much worse they may be than the incumbent's unless told otherwise.
_SAFE = {"refusal": 0.05, "pii": 0.05, "toxicity": 0.02, "repetition": 0.1}
#: In nats a token: the perplexity of general text may rise e times, no further.
_FORGETTING = Constraint(metric="forgetting", sense="<=", bound=1.0)
#: How often a challenger is judged again because another was promoted meanwhile.
_ROUNDS = 5


def rules_of(experiment: Experiment) -> Rules:
    """The gate's rules by the settings of the experiment."""
    select, gate, directions = experiment.select, experiment.select.gate, experiment.directions
    not_worse = gate.not_worse
    if not_worse is None:
        not_worse = {name: margin for name, margin in _SAFE.items() if name in directions}
    bounds = gate.subject_to
    if bounds is None:
        bounds = select.subject_to
        mine = {c.metric for c in bounds}
        if _FORGETTING.metric in directions and _FORGETTING.metric not in mine:
            bounds = (*bounds, _FORGETTING)
    trust = {
        out.name: Trust(metric.trusted_by, float(getattr(metric, "min_correlation", 0.0)))
        for metric in experiment.evaluate.metrics
        if metric.trusted_by
        for out in metric.outputs
    }
    return Rules(
        objective=select.maximise,
        margin=select.regression_margin,
        level=select.confidence,
        resamples=select.resamples,
        bounds=bounds,
        not_worse={
            name: (margin, cast(Literal["higher", "lower"], directions[name]))
            for name, margin in not_worse.items()
        },
        at_most_times=gate.at_most_times,
        trust=trust,
    )


def promote_winner(
    experiment: Experiment,
    dataset: DatasetVersion,
    board: Leaderboard,
    results: Sequence[TrialResult],
    connection: Connection,
    say: Say = say,
) -> tuple[ModelVersion, PromotionDecision]:
    """Register the winner, judge it against champion and control, and act on the gate's word.

    Of two that are promoted at once one wins; the other is judged again, against the new champion.

    Raises:
        RegraftError: If there is no winner or nothing to compare it with.
    """
    from regraft.tuning.finals import quietly

    winner = next((r for r in results if r.key == board.winner_key), None)
    if winner is None or winner.final is None:
        raise RegraftError(
            f"the sweep has no winner: {board.winner_reason}", "look at the runs' reasons in MLflow"
        )
    registry = connection.registry
    version = registry.register(experiment.name, winner)
    settled = registry.promotion(version)
    if registry.by_alias(experiment.name, CHAMPION) == version and settled is not None:
        return version, settled  # this very sweep was settled before
    control = _control(experiment, board, results)
    with quietly(experiment, connection.tracking_uri, say) as worker:
        say(f"checking that {version.served_id} answers alike however it is run")
        parity = _parity(experiment, dataset, version, winner, worker)
        challenger = Candidate(version.served_id, winner.final, winner.figures)
        for _ in range(_ROUNDS):
            champion = registry.by_alias(experiment.name, CHAMPION)
            if champion is None and control is None:
                raise RegraftError(
                    "there is neither a champion nor a control to compare the winner with",
                    "add {name: zero_shot} to sweep.methods",
                )
            incumbent = None
            if champion is not None:
                incumbent = _candidate(experiment, dataset, champion, connection, worker, say)
            decision = judge(challenger, incumbent, control, rules_of(experiment), parity=parity)
            try:
                settle(experiment, dataset, version, winner, decision, champion, connection)
            except PromotionConflictError as conflict:
                say(f"{conflict.problem}: judged again")
                continue
            return version, decision
    raise RegraftError(
        f"the champion of {experiment.name} changed {_ROUNDS} times while {version.served_id} was judged",
        "start the same again: what is finished is found",
    )


def _control(experiment: Experiment, board: Leaderboard, results: Sequence[TrialResult]) -> Candidate | None:
    """The best of the untuned base's controls: what prompting alone can do has to be beaten too.

    An endpoint is there to be looked at: it is not what would be served instead.
    """
    if not experiment.select.gate.control:
        return None
    by_key = {r.key: r for r in results}
    for row in board.rows:
        result = by_key[row.key]
        if row.rank is not None and result.is_control and not result.is_endpoint and result.final is not None:
            return Candidate(f"the untuned base ({result.label})", result.final, result.figures)
    return None


def _candidate(
    experiment: Experiment,
    dataset: DatasetVersion,
    champion: ModelVersion,
    connection: Connection,
    worker: QuietWorker,
    say: Say,
) -> Candidate:
    """The champion on the final examples of today's evaluation sets, measured where the challenger was.

    Answers that are known and were asked for and scored the same way are not asked for again.
    """
    before = connection.tracker(experiment).result_of(champion.run_id)
    known = [
        example
        for report in (before.final, before.report)
        if report is not None and report.asked == experiment.evaluate.asked
        for example in report.examples
    ]
    report, speed = evaluate_version(experiment, dataset, champion, worker, say, known)
    return Candidate(champion.served_id, report, before.figures | (speed.figures if speed else {}))


def _parity(
    experiment: Experiment,
    dataset: DatasetVersion,
    version: ModelVersion,
    winner: TrialResult,
    worker: QuietWorker,
) -> Parity:
    """Whether the version answers alike however it is run, looked at on the worker."""
    import ray

    assert winner.final is not None
    examples = {e.id: e for e in evaluation_parts(dataset, experiment.evaluate.final_share).final}
    asked = [e for e in winner.final.examples if e.example_id in examples]
    found: Parity = ray.get(
        worker.actor.parity.remote(
            check_parity, version, [examples[e.example_id] for e in asked],
            dtype=experiment.model.dtype, device=experiment.model.device,
            answers=[e.output for e in asked], max_new_tokens=experiment.evaluate.max_new_tokens,
        )
    )  # fmt: skip
    return found


def settle(
    experiment: Experiment,
    dataset: DatasetVersion,
    version: ModelVersion,
    winner: TrialResult,
    decision: PromotionDecision,
    champion: ModelVersion | None,
    connection: Connection,
) -> None:
    """Act on the gate's word: log it, and move the alias if it says so.

    The reference that later traffic is compared with is frozen before the alias moves: a champion without
    one could not be watched. So are the evaluation sets: no later challenger may get worse on them unseen.

    Raises:
        PromotionConflictError: If the champion is another than the one that was compared with.
    """
    registry = connection.registry
    connection.tracker(experiment).log_decision(version.run_id, decision)
    registry.note_decision(version, decision)
    if decision.outcome != "promote":
        registry.set_alias(experiment.name, CHALLENGER, version.version)
        return
    freeze_evaluation(experiment, version, (winner.report, winner.final), connection)
    keep_sets(registry, version, dataset)
    with promoting(experiment.name, connection):
        registry.promote(version, decision, expected=champion, promotion_lock=connection.promotion_lock)
