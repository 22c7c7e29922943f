"""Frozen records passed between the stages; each carries the id of the one before it.

This module knows no stage: only the shapes that flow along the line. Everything here serialises to JSON
and back without loss, so that a record can be an MLflow artifact, a line of a log, or a Ray argument.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Role = Literal["system", "user", "assistant"]
#: `stopped` by a rule, for good; `cancelled` from outside, and worth going on with.
TrialStatus = Literal["completed", "stopped", "infeasible", "failed", "cancelled"]


def content_hash(value: Any, length: int = 16) -> str:
    """Hash a JSON-serialisable value by content, independent of key order.

    Args:
        value: Anything `json.dumps` takes.
        length: Hexadecimal digits to keep.

    Returns:
        The first `length` hexadecimal digits of the SHA-256 of the canonical JSON.
    """
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


class Record(BaseModel):
    """A frozen record: unknown fields are an error, fields never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class Message(Record):
    """One turn of a chat."""

    role: Role
    content: str = Field(min_length=1)


class Example(Record):
    """One chat to train on or to be evaluated with; the last turn is the assistant's."""

    id: str
    messages: tuple[Message, ...] = Field(min_length=2)
    tags: dict[str, str] = {}

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns but the last."""
        return self.messages[:-1]

    def after(self, shown: Sequence[Message]) -> Example:
        """The same example with turns shown before its own; a system turn stays first."""
        if not shown:
            return self
        own = 1 if self.messages[0].role == "system" else 0
        turns = (*self.messages[:own], *shown, *self.messages[own:])
        return self.model_copy(update={"messages": turns})

    @property
    def reference(self) -> str:
        """The last turn: the answer to learn, or to be compared with."""
        return self.messages[-1].content


class DatasetVersion(Record):
    """An immutable set of examples by split.

    `id` is the content hash over the examples of all splits: the same rows give the same id wherever the
    files lie.
    """

    id: str
    name: str
    splits: dict[str, tuple[Example, ...]]
    sources: dict[str, str] = {}
    checks: dict[str, int] = {}
    parent_id: str | None = None

    def split(self, name: str) -> tuple[Example, ...]:
        """Return the examples of one split.

        Raises:
            KeyError: If there is no such split; the message names those there are.
        """
        if name not in self.splits:
            raise KeyError(
                f"dataset {self.name} ({self.id}) has no split {name!r}; it has {sorted(self.splits)}"
            )
        return self.splits[name]


class Likelihood(Record):
    """How likely a candidate finds a reference, token after token.

    `nats` is the sum of the negative log-probabilities of its tokens. `bins` are ten of equal width over the
    probability of the token that the candidate would have said there: how many, their summed probability,
    and how many of them were the reference's.
    """

    tokens: int
    utf8_bytes: int
    nats: float
    bins: tuple[tuple[int, float, int], ...]


class ExampleScore(Record):
    """What one candidate answered to one example, and how that scored.

    A metric that failed on this example is absent from `scores` and present in `failures` with its reason.
    """

    example_id: str
    prompt: str
    reference: str
    output: str
    scores: dict[str, float]
    failures: dict[str, str] = {}
    tags: dict[str, str] = {}
    likelihood: Likelihood | None = None


class EvalReport(Record):
    """Per-example scores of one candidate on one evaluation set.

    `whole` has the figures that only all answers together have, `whole_failures` why some are missing.
    `asked` is a hash of how it was asked and scored: reports may be put together where it is the same.
    """

    dataset_id: str
    split: str
    metric_versions: dict[str, int]
    examples: tuple[ExampleScore, ...]
    whole: dict[str, float] = {}
    whole_failures: dict[str, str] = {}
    asked: str = ""

    def mean(self, metric: str) -> float:
        """Mean of a metric over the examples on which it did not fail.

        Raises:
            ValueError: If no example has that metric.
        """
        values = [e.scores[metric] for e in self.examples if metric in e.scores]
        if not values:
            raise ValueError(f"no example of {self.split} has a value for metric {metric!r}")
        return sum(values) / len(values)

    @property
    def means(self) -> dict[str, float]:
        """Mean of every metric that has at least one value."""
        names = sorted({name for e in self.examples for name in e.scores})
        return {name: self.mean(name) for name in names}

    @property
    def failure_count(self) -> int:
        """Metric failures over all examples, and of figures of the whole set."""
        return sum(len(e.failures) for e in self.examples) + len(self.whole_failures)


def _numbers(record: Record) -> dict[str, float]:
    return {k: float(v) for k, v in record.model_dump().items() if isinstance(v, int | float)}


class Cost(Record):
    """What a trial took.

    `money` is that of its training by `cluster.prices`, `answer_money` that of the evaluation's answers at an
    endpoint, by its own prices. `energy_wh` is of its training; `energy_how` says what was counted, or how it
    was estimated.
    """

    train_seconds: float = 0.0
    money: float = 0.0
    trainable_parameters: int = 0
    tokens_seen: int = 0
    memory_peak_gib: float = 0.0
    adapter_bytes: int = 0
    answer_money: float = 0.0
    energy_wh: float | None = None
    energy_how: str = ""

    @property
    def figures(self) -> dict[str, float]:
        """What is a number and is known."""
        return _numbers(self)


class Speed(Record):
    """How fast a candidate generates, and how that was measured."""

    latency_p50_ms: float
    latency_p95_ms: float
    first_token_p50_ms: float
    tokens_per_second: float
    first_token_p95_ms: float | None = None
    token_p50_ms: float | None = None
    token_p95_ms: float | None = None
    how: str

    @property
    def figures(self) -> dict[str, float]:
        """What is a number and is known."""
        return _numbers(self)


#: Names of what is counted and measured of every trial.
FIGURES = frozenset(
    n for r in (Cost, Speed) for n, field in r.model_fields.items() if field.annotation is not str
)


class LossPoint(Record):
    """One point of the learning curve. Losses are means over supervised tokens, in nats."""

    step: int
    tokens_seen: int
    train_loss: float
    eval_loss: float | None = None
    learning_rate: float
    #: Mean scores of a few answers at this point, where `sweep.answers_at_points` asks for them.
    scores: dict[str, float] = {}


class TrialResult(Record):
    """One trial of a sweep: what it was, what came of it, where it is kept.

    `data` counts what became of the examples it trained on and took its loss over: kept, dropped, truncated.
    `repeat_of` is the key of the trial that this one repeats with another seed. `report` is over what
    candidates are chosen by, `final` over what the chosen are judged by, which most trials never see.
    """

    key: str
    sweep_id: str
    run_id: str
    label: str
    method: dict[str, Any]
    base_model: str
    base_revision: str
    dataset_id: str
    status: TrialStatus
    reason: str = ""
    seed: int = 0
    repeat_of: str = ""
    logged_model_id: str | None = None
    eval_loss: float | None = None
    cost: Cost = Cost()
    data: dict[str, int] = {}
    curve: tuple[LossPoint, ...] = ()
    speed: Speed | None = None
    report: EvalReport | None = None
    final: EvalReport | None = None

    @property
    def is_control(self) -> bool:
        """Whether it is there to be compared with: the untuned base, however prompted, or an endpoint."""
        return self.method.get("name") in {"zero_shot", "few_shot"} or self.is_endpoint

    @property
    def is_endpoint(self) -> bool:
        """Whether a model elsewhere gave the answers."""
        return self.method.get("name") == "endpoint"

    @property
    def figures(self) -> dict[str, float]:
        """All figures by the names that constraints and searches use."""
        found = self.report.means | self.report.whole if self.report else {}
        if self.eval_loss is not None:
            found["eval_loss"] = self.eval_loss
        found |= self.cost.figures
        return found | (self.speed.figures if self.speed else {})


class Interval(Record):
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float
    level: float = 0.95


class LeaderboardRow(Record):
    """One candidate of a leaderboard.

    Of one that was repeated, `quality` is over the examples' means of all its seeds, and `seeds` are the
    seeds' own means; key, run and metrics are those of the first. `final` is over examples that played no
    part in the choice, where it was measured. `p_control` is the one-sided p-value of its lead on the best
    control, corrected for how many candidates were held against it.
    """

    rank: int | None
    key: str
    run_id: str
    label: str
    method: dict[str, Any]
    status: TrialStatus
    reason: str = ""
    quality: Interval | None = None
    final: Interval | None = None
    p_control: float | None = None
    seeds: tuple[float, ...] = ()
    metrics: dict[str, float] = {}
    on_pareto_front: bool = False
    is_control: bool = False
    meets_constraints: bool = False

    @property
    def is_endpoint(self) -> bool:
        """Whether a model elsewhere gave the answers."""
        return self.method.get("name") == "endpoint"


class Leaderboard(Record):
    """Trials in order of the objective, with the winner among those that meet the constraints.

    `optimism` is by how much the best of so many may look better than it is on what it was chosen by, in the
    objective's unit: an estimate, by resampling.
    """

    sweep_id: str
    dataset_id: str
    objective: str
    rows: tuple[LeaderboardRow, ...]
    winner_key: str | None = None
    winner_reason: str = ""
    optimism: float | None = None

    def marks(self, row: LeaderboardRow) -> list[str]:
        """What a table says of a row beside its figures, for people."""
        found = ["winner"] if row.key == self.winner_key else []
        found += ["control"] if row.is_control else []
        found += ["Pareto"] if row.on_pareto_front else []
        found += [f"{len(row.seeds)} seeds {min(row.seeds):.3f} to {max(row.seeds):.3f}"] if row.seeds else []
        return found + ([row.status] if row.status != "completed" else [])


class ModelVersion(Record):
    """A registered, immutable version of a served model."""

    name: str
    version: int
    logged_model_id: str
    run_id: str
    method: dict[str, Any]
    base_model: str
    base_revision: str
    dataset_id: str

    @property
    def served_id(self) -> str:
        """The name clients may pin: `name/version`."""
        return f"{self.name}/{self.version}"


class AnswerDifference(Record):
    """Two answers to one prompt that are not the same.

    `token` is the index of the first token that differs, and `gap` how much likelier the reference model
    finds the one continuation there than the other, in nats; infinite where only one of them goes on.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    prompt: str
    expected: str
    got: str
    token: int
    gap: float
    tie: bool


class PathParity(Record):
    """Answers of one way to run a version beside those of its adapter on its base.

    `largest_gap` is that of all differences, `tolerance` what passes for a tie, both in nats; `differences`
    are a few of them, those that do not pass first.
    """

    model_config = ConfigDict(ser_json_inf_nan="strings")

    prompts: int
    equal: int
    ties: int
    largest_gap: float
    tolerance: float
    differences: tuple[AnswerDifference, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all answers are the same, but for ties."""
        return self.equal + self.ties == self.prompts


class Parity(Record):
    """Whether a version gives the same greedy answers however it is run.

    `paths` are the ways that were compared with the adapter on its base (`merged`, `served`, `recorded`),
    `left_out` why others were not.
    """

    version: str
    paths: dict[str, PathParity]
    left_out: dict[str, str] = {}

    @property
    def ok(self) -> bool:
        """Whether what is served, and every other way that was compared, answers alike."""
        return "served" in self.paths and all(path.ok for path in self.paths.values())


class Comparison(Record):
    """A paired comparison of two candidates over the same examples.

    `difference` is challenger minus incumbent of the mean score, `low` and `high` bound it at `level`;
    `p_value` is one-sided, of a permutation test: how often a difference this high or higher comes about
    where neither is better.
    """

    metric: str
    against: str = ""
    split: str
    examples: int
    challenger_mean: float
    incumbent_mean: float
    difference: float
    low: float
    high: float
    level: float
    p_value: float


class GateCheck(Record):
    """One bound of the gate: a figure of the challenger, what it was held against, and whether it held.

    `incumbent` is the figure of whom it is compared with, where it is; None for a bound of its own.
    """

    figure: str
    challenger: float | None
    against: str = ""
    incumbent: float | None = None
    rule: str
    ok: bool


class PromotionDecision(Record):
    """The gate's word on a challenger, with its evidence.

    `incumbent` is the champion, or the control before there is one. `examples_to_settle` is about how many
    would tell whether a lead of the size that was seen is one, where that is open.
    """

    id: str
    outcome: Literal["promote", "reject", "inconclusive"]
    reason: str
    challenger: str
    incumbent: str
    evidence: tuple[Comparison, ...]
    checks: tuple[GateCheck, ...] = ()
    parity: Parity | None = None
    examples_to_settle: int | None = None


class CapturedExchange(Record):
    """One request and its answer, as the endpoint gave it. Times are UTC, ISO 8601 with microseconds."""

    id: str
    created: str
    model: str
    model_version: int
    messages: tuple[Message, ...]
    output: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    latency_ms: float
    first_token_ms: float | None = None
    stream: bool = False
    session: str | None = None
    parameters: dict[str, Any] = {}
    error: str | None = None

    @property
    def prompt_text(self) -> str:
        """The last user turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "user"), "")


class TestResult(Record):
    """One statistical test of a drift check. `effect` is in the unit the detector states."""

    __test__ = False  # not a test case of pytest's

    name: str
    p_value: float
    effect: float
    detail: str = ""


class DriftReport(Record):
    """What a drift check saw in one window, whatever the answer was."""

    id: str
    model: str
    model_version: int
    reference_id: str
    window_start: str
    window_end: str
    rows: int
    reference_rows: int
    status: Literal["stable", "drift", "insufficient"]
    p_value: float | None
    effect: float | None
    alpha: float
    tests: tuple[TestResult, ...] = ()
    drivers: tuple[str, ...] = ()
    summary: str
    report_path: str | None = None
    run_id: str | None = None


class RetrainDecision(Record):
    """What to do about a drift report. `job_id` is derived from the decision: submitted exactly once."""

    id: str
    drift_report_id: str
    model: str
    model_version: int
    action: Literal["nothing", "collect", "retrain"]
    reason: str
    created: str
    job_id: str | None = None
