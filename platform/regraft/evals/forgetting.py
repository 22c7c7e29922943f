"""What training took away from the model in general."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from regraft.evals.base import Metric, Output, Scores


class Forgetting(Metric):
    """How much less likely general text has become, against the untuned base.

    `forgetting` is the rise of the mean loss on passages that have nothing to do with the task; below 0 the
    candidate likes them better than its base does. `general_nats` is the loss itself. The base is held as the
    method holds it: of QLoRA, in four bits. The passages that come with this package are three dozen of
    English prose, dialogue, lists, code and arithmetic.
    """

    outputs: ClassVar[tuple[Output, ...]] = ()
    wholes: ClassVar[tuple[Output, ...]] = (
        Output("forgetting", "nats a token", "lower"),
        Output("general_nats", "nats a token", "lower"),
    )

    name: Literal["forgetting"] = "forgetting"
    text: Path | None = Field(
        None, description="A file of general text, passages parted by empty lines, in place of the package's."
    )

    @property
    def texts(self) -> tuple[str, ...]:
        """The passages.

        Raises:
            ValueError: If the file holds no text.
        """
        return passages(self.text)

    def of_texts(self, nats: float, base_nats: float) -> Scores:
        """The difference."""
        return {"forgetting": nats - base_nats, "general_nats": nats}


@cache
def passages(file: Path | None = None) -> tuple[str, ...]:
    """Passages of general text, of the package or a file.

    Raises:
        ValueError: If there are none.
    """
    text = (file or files("regraft.evals").joinpath("general.txt")).read_text(encoding="utf-8")
    found = tuple(part.strip() for part in text.split("\n\n") if part.strip())
    if not found:
        raise ValueError(f"{file}: holds no text")
    return found
