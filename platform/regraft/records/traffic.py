"""What the endpoint answered, how that drifted, and what follows."""

from __future__ import annotations

from typing import Any, Literal

from regraft.records.base import Record
from regraft.records.data import Message


class CapturedExchange(Record):
    """One request and its answer, as the endpoint gave it. Times are UTC, ISO 8601 with microseconds.

    Attributes:
        key: Hash of the API key that asked; None if none was needed.
        choice: Place among the choices of one request.
        variant: In which role the version answered: champion, challenger, shadow or pinned.
    """

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
    key: str | None = None
    choice: int = 0
    variant: str = "champion"

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
