"""A control from elsewhere: whatever answers at an OpenAI-compatible endpoint, such as a larger model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator

from regraft.chat_client import ChatClient, endpoint_url, read_key
from regraft.errors import ServiceError
from regraft.methods.base import DTypeName, Kind, Method, Support

if TYPE_CHECKING:
    from torch import nn


class Endpoint(Method):
    """A model behind an OpenAI-compatible endpoint: what tuning has to beat to be worth it.

    It answers the same examples and is scored by the same metrics. There is no base to load, nothing to train
    and nothing to serve: it is ranked beside the others and never wins.
    """

    kind: ClassVar[Kind] = "control"
    support: ClassVar[Support] = Support(replicas=False, shards=False, packs=False, recomputes=False)
    remote: ClassVar[bool] = True

    name: Literal["endpoint"] = "endpoint"
    learning_rate: float = Field(1.0, gt=0, le=1.0, exclude=True, description="Unused: nothing is trained.")
    url: str = Field(
        description="Where `/chat/completions` follows, such as `https://api.openai.com/v1`.",
    )
    model: str = Field(min_length=1, description="The model's name there.")
    api_key_env: str | None = Field(
        None,
        pattern=r"^[A-Z_][A-Z0-9_]*$",
        description="Name of the environment variable with the key, set wherever trials run; the key itself "
        "stands in no file and no record.",
    )
    timeout_seconds: float = Field(60.0, gt=0, description="Longest silence of the endpoint.")
    concurrency: int = Field(4, ge=1, le=64, description="Requests at once.")
    price_in: float = Field(0.0, ge=0, description="Money for a million tokens of prompts.")
    price_out: float = Field(0.0, ge=0, description="Money for a million tokens of answers.")

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, value: str) -> str:
        return endpoint_url(value)

    @property
    def label(self) -> str:
        """The model and where it is: the same name may mean another model elsewhere."""
        return f"{self.name} {self.model} at {self.url.removeprefix('https://')}"

    @property
    def missing_key(self) -> str:
        """What is wrong with the environment here, for people; empty if nothing is."""
        if self.api_key_env is None or read_key(self.api_key_env):
            return ""
        return f"api_key_env: {self.api_key_env} is not set"

    def client(self) -> ChatClient:
        """What asks it, with the key of this process's environment.

        Raises:
            ServiceError: If the variable is not set here, or holds no key.
        """
        if self.missing_key:
            raise ServiceError(
                f"{self.missing_key} where this trial runs: set it before Ray is started there"
            )
        key = read_key(self.api_key_env)
        return ChatClient(self.url, self.model, key=key, timeout_seconds=self.timeout_seconds)

    def money(self, prompt_tokens: int, completion_tokens: int) -> float:
        """The price of so many tokens."""
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def load_base(self, path: Path, dtype: DTypeName, device: str) -> nn.Module:
        """Nothing can be loaded.

        Raises:
            ServiceError: Always.
        """
        raise ServiceError(f"{self.label} has no weights here: it can be compared with and not served")
