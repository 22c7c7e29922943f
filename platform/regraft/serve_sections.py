"""The part of the YAML that says how to serve."""

from __future__ import annotations

from pydantic import Field

from regraft.section import Section


class ServeSection(Section):
    """The endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_batch: int = Field(16, ge=1, description="Requests answered together.")
    max_queued: int = Field(
        64, ge=1, description="Requests waiting beyond those being answered; more get 429."
    )
    max_new_tokens: int = Field(256, ge=1, description="Upper bound on what one request may ask for.")
    poll_seconds: float = Field(1.0, gt=0, description="How often the champion alias is looked up.")
    num_cpus: float = Field(
        1, ge=0, description="Cores reserved for the endpoint; 0 shares them with trials."
    )
    num_gpus: float = Field(0, ge=0)
