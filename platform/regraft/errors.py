"""Errors a user can mend. The command line prints them without a traceback and exits with status 2."""

from __future__ import annotations


class RegraftError(Exception):
    """Something a user can mend.

    Args:
        problem: What is wrong, naming the field, file and line where there is one.
        mend: What to do about it.
    """

    def __init__(self, problem: str, mend: str = "") -> None:
        super().__init__(problem, mend)
        self.problem = problem
        self.mend = mend

    def __str__(self) -> str:
        return f"{self.problem}\n  mend: {self.mend}" if self.mend else self.problem


class ConfigError(RegraftError):
    """A wrong key or value in an experiment file."""


class DataError(RegraftError):
    """A data file that does not hold what it should."""


class ModelError(RegraftError):
    """A base model or an adapter that cannot be found or does not check out."""


class ServiceError(RegraftError):
    """A server (MLflow, Ray, the endpoint) that cannot be reached or started.

    Args:
        problem: What is wrong.
        mend: What to do about it.
        away: Whether nobody answered: the same call may succeed later.
    """

    def __init__(self, problem: str, mend: str = "", *, away: bool = False) -> None:
        super().__init__(problem, mend)
        self.away = away


class InfeasibleTrialError(RegraftError):
    """A trial that cannot run on this machine: recorded with its reason, and the sweep goes on."""


class TrialMemoryError(RegraftError):
    """A trial whose memory ran out.

    Args:
        problem: What is wrong.
        mend: What to do about it.
        smaller: The micro-batch, in tokens, with which it may fit and come to the same; 0 if there is none,
            None if nobody knows.
    """

    def __init__(self, problem: str, mend: str = "", *, smaller: int | None = 0) -> None:
        super().__init__(problem, mend)
        self.smaller = smaller
