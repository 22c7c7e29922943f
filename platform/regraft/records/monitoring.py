"""What a check of the traffic saw, what was decided about it, and what became of that."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from regraft.records.base import Record

Side = Literal["prompt", "answer"]
#: What an alarm is about; see `monitoring.matching` for the first three. `quality`: answers got worse by a
#: measure of their own (errors, refusals, latency, feedback), whatever the texts look like.
DriftKind = Literal["new_content", "behaviour", "prompt_mix", "quality"]
Action = Literal["nothing", "watch", "collect", "roll_back", "retrain"]


class TestResult(Record):
    """One statistical test of a drift check. `effect` is in the unit the detector states."""

    __test__ = False  # not a test case of pytest's

    name: str
    p_value: float
    effect: float
    detail: str = ""


class Evidence(Record):
    """What the checks against one reference add up to, for one question asked of each of them.

    Attributes:
        value: Of the Shiryaev-Roberts e-detector; the alarm is raised at the average run length.
        checks: How many checks it is made of.
        growth: Page's sum of log e-values, 0 or more: where it left 0, the change most likely began.
        since: Start of the window at which `growth` left 0; "" while it is 0.
        alarmed_by: The report whose check raised the alarm, which stays until it is dealt with.
    """

    value: float = Field(0.0, ge=0, allow_inf_nan=False)
    checks: int = Field(0, ge=0)
    growth: float = Field(0.0, ge=0, allow_inf_nan=False)
    since: str = ""
    alarmed_by: str | None = None


class QualitySignal(Record):
    """One measure of quality over a window, against what it was when the reference was frozen.

    Attributes:
        name: Such as `error_rate`, `refusal_rate`, `latency_p95_ms`, `feedback_score`.
        value: Over the window.
        reference: Over the reference, or the bound that the settings give; None where there was nothing.
        count: How many exchanges (or judgements) the window's value rests on.
        p_value: Of a one-sided exact test that it got worse; None where there is too little to test.
        worse: Whether it is worse by more than the settings allow, significance aside.
        low, high: A 95 % interval of the value.
        detail: What was compared, in words.
    """

    name: str
    value: float | None
    reference: float | None = None
    count: int = 0
    p_value: float | None = Field(None, gt=0, le=1)
    worse: bool = False
    low: float | None = None
    high: float | None = None
    detail: str = ""


class Shown(Record):
    """An exchange shown to explain a finding, its texts shortened."""

    id: str
    prompt: str
    answer: str


class TopicChange(Record):
    """A topic whose share of the window differs from its share of the reference.

    Attributes:
        name: Its most telling terms.
        side: Whether prompts or answers were sorted into topics.
        new: Whether it is made of texts like none of the reference's.
        reference_share, window_share: Of the texts of that side.
        count: Texts of the window in it.
        since: When the first of them came, UTC in ISO 8601; "" if unknown.
        examples: Nearest to its middle.
    """

    name: str
    side: Side
    new: bool
    reference_share: float
    window_share: float
    count: int
    since: str = ""
    examples: tuple[Shown, ...] = ()


class DescriptorChange(Record):
    """A descriptor that moved: its means, and the Kolmogorov-Smirnov distance between the sides."""

    name: str
    side: Side
    reference: float
    window: float
    distance: float


class AnswerLogprob(Record):
    """How likely the serving model finds its own answers: mean log-probability of a token, in nats.

    Attributes:
        window: Mean over a sample of the window's answers.
        count: How many these are.
        reference: The same of the reference's answers; None where their prompts are not on record.
        reference_count: How many these are.
    """

    window: float
    count: int = Field(ge=1)
    reference: float | None = None
    reference_count: int = 0


class Attribution(Record):
    """What changed, where, and since when.

    Attributes:
        where: `inputs`: prompts changed and answers only with them; `outputs`: like prompts are answered
            otherwise; `both`; `neither` where nothing of it is significant.
        inputs_p, outputs_p: Of the prompts as such, and of answers to prompts that are alike.
        new_share: How many more prompts than ordinarily are like none of the reference's.
        topics: Those that changed most, largest change first.
        descriptors: Those that moved most, furthest first.
        since: When the evidence began to grow, UTC in ISO 8601; "" if it has not.
    """

    where: Literal["inputs", "outputs", "both", "neither"]
    inputs_p: float | None = None
    outputs_p: float | None = None
    new_share: float | None = None
    topics: tuple[TopicChange, ...] = ()
    descriptors: tuple[DescriptorChange, ...] = ()
    since: str = ""


class DriftReport(Record):
    """What a drift check saw in one window, whatever the answer was.

    Attributes:
        exchanges: All that the window had; `rows` of them were compared, one a session and prompt.
        status: `insufficient`: too little to tell; `stable`; `suspected`: this window alone looks changed,
            the checks together do not yet; `drift`: the alarm is raised and the change large enough.
        p_values: Of this window alone, by the same names as `evidence`.
        evidence: After this check, by name of what was asked: `drift`, and the quality signals.
        covered: Checks with a verdict reach up to here, UTC in ISO 8601: the next window begins there.
        previous: The report before this one against the same reference.
        alarms: What is alarming after this check: names of `evidence`.
        kind: What the alarm is about; None without one, or where it cannot be told.
        answer_logprob: None unless `monitor.logprob_answers` asks for it.
    """

    id: str
    model: str
    model_version: int
    reference_id: str
    window_start: str
    window_end: str
    exchanges: int = 0
    rows: int
    reference_rows: int
    status: Literal["stable", "suspected", "drift", "insufficient"]
    p_value: float | None
    effect: float | None
    alpha: float
    detector: str = ""
    tests: tuple[TestResult, ...] = ()
    drivers: tuple[str, ...] = ()
    summary: str
    p_values: dict[str, float] = {}
    evidence: dict[str, Evidence] = {}
    arl: float | None = None
    covered: str = ""
    previous: str | None = None
    quality: tuple[QualitySignal, ...] = ()
    alarms: tuple[str, ...] = ()
    kind: DriftKind | None = None
    attribution: Attribution | None = None
    answer_logprob: AnswerLogprob | None = None
    report_path: str | None = None
    run_id: str | None = None


class RetrainDecision(Record):
    """What to do about a drift report.

    Attributes:
        alarm_id: The report that raised the alarm which this is about; the drift report's own id without one.
        waiting: What a retraining still waits for, in words; empty unless the action is `collect`.
        page: Whether a person should look now.
        automatic: Whether the action is carried out without anybody's word.
        job_id: Of a retraining, derived from the alarm: submitted exactly once.
        run_id: The MLflow run of the report.
    """

    id: str
    drift_report_id: str
    model: str
    model_version: int
    action: Action
    reason: str
    created: str
    kind: DriftKind | None = None
    alarm_id: str = ""
    waiting: tuple[str, ...] = ()
    page: bool = False
    automatic: bool = True
    job_id: str | None = None
    run_id: str | None = None


class DecisionOutcome(Record):
    """What became of a decision.

    Attributes:
        status: Of a retraining `promoted`, `rejected` by the gate, or `failed`; `rolled_back`; `collected`.
        detail: In words: the gate's reason, an error, a file.
        version: The version that was promoted, rejected or returned to.
        gpu_hours, cpu_hours: What it took.
        ended: UTC, ISO 8601.
    """

    decision_id: str
    status: Literal["promoted", "rejected", "failed", "rolled_back", "collected"]
    detail: str
    version: int | None = None
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    ended: str
