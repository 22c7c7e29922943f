"""Metrics of the user's own, by the path of their class."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from pydantic import ConfigDict, Field, ValidationError, model_validator

from regraft.evals.base import Answer, Metric, Output, Scores


class Custom(Metric):
    """A metric of your own: a subclass of `regraft.evals.Metric`, named `module:Class`, with its own fields.

    The module must be importable wherever trials run: in the folder that a job travels with, installed, or on
    `PYTHONPATH`.
    """

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")

    @model_validator(mode="after")
    def _is_there(self) -> Custom:
        self.metric  # noqa: B018 - found now, not in the middle of a sweep
        return self

    @cached_property
    def metric(self) -> Metric:
        """The metric itself."""
        module, _, name = self.name.partition(":")
        try:
            found: Any = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.name}: {error}; the module has to be importable wherever trials run, for instance "
                "from PYTHONPATH or the folder that a job travels with"
            ) from error
        if not (isinstance(found, type) and issubclass(found, Metric)):
            raise ValueError(f"{self.name} is no subclass of regraft.evals.Metric")
        try:
            return found.model_validate({"name": self.name} | (self.model_extra or {}))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ValueError(f"{self.name}: {where}: {first['msg']}") from error

    @property
    def version(self) -> int:  # type: ignore[override]
        """The metric's own."""
        return self.metric.version

    @property
    def outputs(self) -> tuple[Output, ...]:  # type: ignore[override]
        """The metric's own."""
        return self.metric.outputs

    @property
    def wholes(self) -> tuple[Output, ...]:  # type: ignore[override]
        """The metric's own."""
        return self.metric.wholes

    @property
    def asks_likelihood(self) -> bool:  # type: ignore[override]
        """The metric's own."""
        return self.metric.asks_likelihood

    @property
    def trusted_by(self) -> str:  # type: ignore[override]
        """The metric's own."""
        return self.metric.trusted_by

    @property
    def indecisive(self) -> frozenset[str]:  # type: ignore[override]
        """The metric's own."""
        return self.metric.indecisive

    @property
    def texts(self) -> tuple[str, ...]:
        """The metric's own."""
        return self.metric.texts

    def of_texts(self, nats: float, base_nats: float) -> Scores:
        """As the metric does."""
        return self.metric.of_texts(nats, base_nats)

    def score(self, answer: Answer) -> Scores:
        """As the metric does."""
        return self.metric.score(answer)

    def score_all(self, answers: Sequence[Answer]) -> list[Scores | Exception]:
        """As the metric does."""
        return self.metric.score_all(answers)

    def whole(
        self, answers: Sequence[Answer], scores: Sequence[Mapping[str, float]]
    ) -> Mapping[str, float | Exception]:
        """As the metric does."""
        return self.metric.whole(answers, scores)
