"""All that the processes of an endpoint need to know."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from regraft.config import NAME_PATTERN, ServeSection
from regraft.methods.base import DTypeName
from serving.engines.base import EngineLimits


class EndpointSettings(BaseModel):
    """What to serve, from where, and how; the arguments of the Serve application."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN, description="The registered model to serve.")
    tracking_uri: str = Field(description="Where MLflow is.")
    cache: Path = Field(description="Where the files of registered versions are kept.")
    captures: Path = Field(description="The capture spool.")
    dtype: DTypeName = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    serve: ServeSection = ServeSection()

    @property
    def feedback(self) -> Path:
        """Where feedback is kept: beside the spool."""
        return self.captures.with_name(f"{self.captures.name}-feedback")

    @property
    def limits(self) -> EngineLimits:
        """How much one engine takes on."""
        section = self.serve
        return EngineLimits(section.max_batch, section.max_queued, threads=max(1, int(section.num_cpus)))
