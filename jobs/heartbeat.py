"""How a monitor is: what it writes for whoever asks, and whether one runs in a workspace."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, ValidationError

from jobs.workspace import Workspace
from regraft.errors import ServiceError
from regraft.records import DriftReport, Record, RetrainDecision


class Found(Record):
    """A window that was checked, and what was decided about it."""

    report: DriftReport
    decision: RetrainDecision | None = None

    @property
    def alarms(self) -> bool:
        """Whether something has to be done about it, or somebody should look."""
        return self.report.status == "drift" or bool(self.report.alarms)

    def __str__(self) -> str:
        """One line for people."""
        report, decision = self.report, self.decision
        said = f"{report.window_start} to {report.window_end}: {report.status}: {report.summary}"
        return f"{said} Decision: {decision.action}: {decision.reason}" if decision else said


class Heartbeat(Record):
    """What a monitor does, for whoever asks how it is.

    Attributes:
        where: A process of its own, or an actor of the cluster.
        began, ended: Of the last round; `ended` before `began` while one is under way.
        due: When the next round is planned.
        failures: Rounds that failed, one after the other, up to now.
        problem: Why the last of them did.
        newest: The last window that was checked in its rounds; None before the first.
    """

    model: str
    where: Literal["process", "actor"]
    pid: int
    host: str
    since: AwareDatetime
    every_seconds: float
    rounds: int = 0
    began: AwareDatetime | None = None
    ended: AwareDatetime | None = None
    due: AwareDatetime | None = None
    failures: int = 0
    problem: str = ""
    newest: Found | None = None

    @property
    def under_way(self) -> bool:
        """Whether a round runs."""
        return self.began is not None and (self.ended is None or self.ended < self.began)


def heartbeat_file(workspace: Workspace, name: str) -> Path:
    """Where the monitor of a model writes how it is."""
    return workspace.root / "monitor" / f"{name}.json"


def heartbeat(workspace: Workspace, name: str) -> Heartbeat | None:
    """What a monitor's process of this workspace wrote last, whether or not it runs."""
    try:
        return Heartbeat.model_validate_json(heartbeat_file(workspace, name).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValidationError):  # none yet, or one of an older release
        return None


def running(workspace: Workspace, name: str) -> bool:
    """Whether a monitor's process of this workspace watches a model."""
    lock = heartbeat_file(workspace, name).with_suffix(".lock")
    if not lock.exists():
        return False
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@contextlib.contextmanager
def sole(workspace: Workspace, name: str) -> Iterator[None]:
    """Be the one process of this workspace that watches a model.

    Raises:
        ServiceError: If another does.
    """
    lock = heartbeat_file(workspace, name).with_suffix(".lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            beat = heartbeat(workspace, name)
            by = f": process {beat.pid} since {beat.since:%Y-%m-%d %H:%M:%S %Z}" if beat else ""
            raise ServiceError(
                f"a monitor of {name} runs in {workspace.root} already{by}",
                "let it run, or end it first: `regraft monitor stop`",
            ) from error
        yield  # released when the file closes, also if this process dies
