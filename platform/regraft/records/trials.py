"""What a trial was, took, and came to."""

from __future__ import annotations

from typing import Any, Literal

from regraft.records.base import Record
from regraft.records.evaluation import EvalReport

#: `stopped` by a rule, for good; `cancelled` from outside, and worth going on with.
TrialStatus = Literal["completed", "stopped", "infeasible", "failed", "cancelled"]


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
