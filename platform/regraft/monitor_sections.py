"""The parts of the YAML that say how traffic is watched, and what an alarm turns into."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from regraft.section import Section
from regraft.serve_sections import beside

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_BLACKOUT = re.compile(rf"({'|'.join(_DAYS)}) ([01]\d|2[0-3]):([0-5]\d)", re.IGNORECASE)
MINUTES_A_WEEK = 7 * 24 * 60


class QualitySection(Section):
    """How much worse a measure of quality may get. Only what is worse by more, and significantly, alarms."""

    error_rate: float = Field(0.02, ge=0, le=1, description="Failed requests, above the reference's share.")
    empty_rate: float = Field(0.02, ge=0, le=1, description="Empty answers, above the reference's share.")
    refusal_rate: float = Field(0.05, ge=0, le=1, description="Refusals, above the reference's share.")
    truncated_rate: float = Field(
        0.1, ge=0, le=1, description="Answers cut off at their longest, above the reference's share."
    )
    repetition_rate: float = Field(
        0.05, ge=0, le=1, description="Answers that go round in circles, above the reference's share."
    )
    latency_times: float = Field(
        2.0, gt=1, description="Latency and time to the first token (95th percentile), times the reference's."
    )
    feedback_drop: float = Field(
        0.1, ge=0, le=2, description="Mean score of the feedback (-1 to 1), below the reference's."
    )
    reference_drop: float = Field(
        0.05, ge=0, description="`select.maximise` on references that came later, below the evaluation's."
    )
    judge_drop: float = Field(0.05, ge=0, description="Mean verdict of the judge, below the reference's.")
    judge_samples: int = Field(
        0, ge=0, description="Exchanges of a window that the judge of `evaluate.metrics` looks at; 0: none."
    )
    min_count: int = Field(30, ge=5, description="Fewer exchanges or judgements than this are not tested.")


class WebhookSection(Section):
    """Who is told of alarms and of what became of them. Addresses and secrets stand in the environment."""

    url_env: str | None = Field(
        None, description="Variable that holds the URL to POST to (Slack's form is understood); null: none."
    )
    secret_env: str | None = Field(
        None, description="Variable with a secret; the body's HMAC-SHA256 is sent as X-Regraft-Signature."
    )
    events: tuple[Literal["alarm", "decision", "outcome"], ...] = Field(
        ("alarm", "outcome"), description="What is told: alarms, every decision, what became of one."
    )
    timeout_seconds: float = Field(10.0, gt=0)


class MonitorSection(Section):
    """How drift is tested."""

    detector: dict[str, Any] = Field(
        {"name": "calibrated", "gate": "any"},
        description="How a window is compared with the reference: a detector's name and its fields.",
    )
    alpha: float = Field(
        0.01, gt=0, lt=0.5, description="p-value at which a single window is 'suspected'; alarms need `arl`."
    )
    arl: float = Field(
        1000.0,
        ge=2,
        description="Checks that pass, on average, before a false alarm if nothing ever changes. Hourly "
        "checks and one false alarm in a quarter come to 2200, weekly ones and one in half a year to 26.",
    )
    min_effect: float = Field(
        0.03,
        ge=0,
        le=1,
        description="Share of the window that the reference does not account for, needed beside an alarm.",
    )
    min_rows: int = Field(
        100, ge=20, description="Fewer sessions than this are 'insufficient', never 'stable'."
    )
    max_rows: int = Field(
        1000, ge=50, description="A window of more is sampled; all of it counts for quality."
    )
    reference_rows: int = Field(
        1500,
        ge=0,
        description="Sessions of the first accepted traffic that become the reference, in place of the "
        "evaluation's answers, once there are that many; 0: the evaluation's answers stay.",
    )
    logprob_answers: int = Field(
        0,
        ge=0,
        description="Answers of a window, and of the reference, whose likelihood under the serving model is "
        "told: other weights, another template or another temperature show in it. The model is loaded once "
        "more where the check runs, for as long as a forward pass of so many answers takes; 0: not at all.",
    )
    every_seconds: float = Field(3600, gt=0, description="How often `regraft monitor run` checks.")
    quality: QualitySection = QualitySection()
    webhook: WebhookSection = WebhookSection()
    metrics_port: int | None = Field(
        None, ge=0, le=65535, description="Where `regraft monitor run` answers Prometheus; null: nowhere."
    )
    metrics_file: Path | None = Field(
        None, description="File for Prometheus' textfile collector, written at each check; null: none."
    )

    @field_validator("metrics_file")
    @classmethod
    def _beside_the_yaml(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return beside(value, info)

    @model_validator(mode="after")
    def _ordered(self) -> MonitorSection:
        if self.max_rows < self.min_rows:
            raise ValueError(f"max_rows: is {self.max_rows}, below min_rows ({self.min_rows})")
        if not isinstance(self.detector.get("name"), str):
            raise ValueError("detector: needs a name, such as {name: calibrated}")
        return self


class RetrainSection(Section):
    """What an alarm turns into."""

    reviewed: Path | None = Field(None, description="Reviewed fresh examples (JSONL) that a retraining adds.")
    evaluation: dict[str, Path] = Field({}, description="Evaluation sets for the fresh topics.")
    sweep: Literal["narrow", "full"] = Field(
        "narrow", description="narrow: the champion's method beside the control; full: the whole sweep again."
    )
    old_per_fresh: float | None = Field(
        None,
        ge=0,
        description="Old examples for each fresh one that a retraining trains on, drawn by hash; null: all "
        "of them. Without old ones, old skills are forgotten.",
    )
    epochs: float | None = Field(None, gt=0, description="As in the sweep, if not given.")
    cpus_per_trial: float | None = Field(None, gt=0, description="As in the sweep, if not given.")
    min_fresh: int = Field(
        20, ge=1, description="Fewer reviewed fresh examples than this: collect, do not retrain."
    )
    again_fresh: float = Field(
        0.5,
        ge=0,
        description="New examples that a retraining needs after rejected ones of the same champion, for "
        "each fresh one that those trained on. Quality grows about with the logarithm of the examples: half "
        "as many again may come to another verdict, and a few more hardly do. 0: `min_fresh` alone.",
    )
    collect: int = Field(
        50,
        ge=1,
        description="Most drifted exchanges of an alarm that are put before a reviewer; more "
        "where `again_fresh` asks for more.",
    )
    confirmations: int = Field(
        0, ge=0, description="Further windows that have to look changed after an alarm before money is spent."
    )
    cooldown_seconds: float = Field(
        86400,
        ge=0,
        description="No second retraining this soon after one. A day: all hours of it are in the traffic "
        "that shows what the last one came to, and hourly checks cannot spend a month's budget in a night.",
    )
    gpu_hours_a_month: float | None = Field(
        None, ge=0, description="Retrainings of the last 30 days may take this much; null: no bound."
    )
    cpu_hours_a_month: float | None = Field(None, ge=0, description="The same for hours of cores.")
    blackout: tuple[str, ...] = Field(
        (), description="When no retraining starts, weekly and in UTC, such as `fri 16:00-mon 07:00`."
    )
    roll_back: Literal["never", "propose", "automatic"] = Field(
        "propose",
        description="When like prompts are answered otherwise or quality falls: never go back to the former "
        "champion, tell a person to, or do it.",
    )

    @field_validator("blackout")
    @classmethod
    def _readable(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            blackout_minutes(entry)
        return value


def blackout_minutes(entry: str) -> tuple[int, int]:
    """Begin and end of a weekly blackout, in minutes since Monday 00:00 UTC; it may reach over Sunday.

    Raises:
        ValueError: If it is not of the form `fri 16:00-mon 07:00`.
    """
    parts = [_BLACKOUT.fullmatch(part.strip()) for part in entry.split("-")]
    if len(parts) != 2 or None in parts:
        raise ValueError(f"blackout: {entry!r} is not of the form 'fri 16:00-mon 07:00'")
    begin, end = (
        _DAYS.index(m[1].lower()) * 24 * 60 + int(m[2]) * 60 + int(m[3]) for m in parts if m is not None
    )
    return begin, end
