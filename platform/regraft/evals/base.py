"""What a metric is: settings and behaviour in one frozen class."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Metric(BaseModel):
    """Scores one answer against its reference.

    `version` is raised whenever a change makes earlier scores incomparable; it is kept with every report.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: ClassVar[int] = 1
    outputs: ClassVar[tuple[str, ...]]
    higher_is_better: ClassVar[bool] = True

    name: str

    def score(self, output: str, reference: str) -> dict[str, float]:
        """Score one answer.

        Returns:
            A value for each name in `outputs`.

        Raises:
            Exception: Whatever goes wrong; the caller records it as this metric's failure on the example.
        """
        raise NotImplementedError
