"""The part of the YAML that says how to serve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from regraft.personal_data import KINDS
from regraft.section import Section


def beside(value: Path | None, info: ValidationInfo) -> Path | None:
    """A path of the YAML, taken from its folder."""
    folder = (info.context or {}).get("folder")
    return value if value is None or folder is None else Path(folder) / value.expanduser()


class LimitsSection(Section):
    """How much may be asked within a minute; null is without a bound."""

    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1, description="Of prompts and answers together.")


#: Where vLLM listens, what it serves and who may ask is not for its user to say: a second mention would win.
_OURS = (
    *(
        "--model",
        "--tokenizer",
        "--served-model-name",
        "--host",
        "--port",
        "--uds",
        "--api-key",
        "--root-path",
    ),
    *("--enable-lora", "--lora-modules", "--max-lora-rank", "--max-loras", "--max-num-seqs", "--dtype"),
    *("--enable-prompt-embeds", "--generation-config", "--trust-remote-code", "--config"),
)


class VllmSection(Section):
    """vLLM as a second engine, in a Python environment of its own: its pins do not agree with Regraft's."""

    python: Path | None = Field(
        None, description="The interpreter that has vLLM (`requirements/vllm-cpu.txt`); null: never use it."
    )
    serves: Literal["auto"] | tuple[Literal["plain", "lora", "embeddings"], ...] = Field(
        "auto",
        description="What it serves of what it can: full fine-tunes (plain), LoRA adapters, virtual tokens "
        "(embeddings), each kind on a server of its own. auto: plain, and lora on CUDA; on a CPU Regraft's "
        "own engine is faster with adapters.",
    )
    max_lora_rank: Literal[8, 16, 32, 64] = Field(
        64, description="Adapters of higher rank are served by Regraft's own engines."
    )
    max_loras: int = Field(4, ge=1, description="Adapters that may share a batch; each has memory reserved.")
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="On CUDA: share of its memory to take."
    )
    kv_cache_gib: float = Field(2.0, gt=0, description="On a CPU: memory for keys and values.")
    start_seconds: float = Field(600.0, gt=0, description="How long a server may take until it is ready.")
    arguments: tuple[str, ...] = Field(
        (), description="More arguments of vLLM's server, such as `--max-model-len=4096`."
    )

    @field_validator("python")
    @classmethod
    def _beside_the_yaml(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return beside(value, info)

    @field_validator("arguments")
    @classmethod
    def _leave_ours(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        for argument in arguments:
            name = argument.split("=", 1)[0].replace("_", "-")
            # argparse takes any beginning of a name that is no other's.
            if name.startswith("--") and any(own.startswith(name) for own in _OURS):
                raise ValueError(f"{argument} is set by Regraft; leave it out")
        return arguments


class RedactionRule(Section):
    """An own rule: what its expression matches is stored as the rule's name, `<NAME>`."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    pattern: str = Field(
        description="A regular expression of Python's `re`. It runs on every captured text: without "
        "repetitions of repetitions, such as (a+)+, which may take for ever."
    )

    @field_validator("name")
    @classmethod
    def _new_name(cls, value: str) -> str:
        if value in (*KINDS, "all"):
            raise ValueError(f"{value!r} is the name of a rule that is built in; take another")
        return value

    @field_validator("pattern")
    @classmethod
    def _takes_something(cls, value: str) -> str:
        try:
            pattern = re.compile(value)
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        # Also one such as \b, which matches nothing in an empty text.
        if any(not match.group() for text in ("", "Ab 1_-.@\n") for match in pattern.finditer(text)):
            raise ValueError(
                f"{value!r} can match empty text; make it take at least one letter, with + for *"
            )
        return value


class CaptureSection(Section):
    """What the endpoint keeps of what it answers."""

    rate: float = Field(
        1.0, ge=0, le=1, description="Share of the traffic to keep; a session is kept whole or not at all."
    )
    redact: Literal["all"] | tuple[str, ...] = Field(
        "all",
        description="Personal data that is not stored: all, or some of email, iban, card, ssn, ip, phone and "
        "the names in `rules`; [] for none.",
    )
    rules: tuple[RedactionRule, ...] = Field((), description="Own rules of redaction.")
    keep_days: int | None = Field(
        None, ge=1, description="Whole days an exchange is kept before it is deleted; null for ever."
    )
    ship: str | None = Field(
        None,
        min_length=1,
        description="Where the exchanges go as Parquet: a folder, or a URL that fsspec takes, such as "
        "s3://bucket/captures; null leaves them in the spool.",
    )
    ship_every_seconds: float = Field(300.0, gt=0, description="How often they go there.")

    @model_validator(mode="after")
    def _known_rules(self) -> CaptureSection:
        own = [rule.name for rule in self.rules]
        if twice := sorted({name for name in own if own.count(name) > 1}):
            raise ValueError(f"rules: {twice[0]!r} is there twice")
        for name in () if self.redact == "all" else self.redact:
            if name not in (*KINDS, *own):
                raise ValueError(f"redact: there is no rule {name!r}; there are {[*KINDS, *own]}")
        if self.redact != "all" and (unused := [name for name in own if name not in self.redact]):
            raise ValueError(f"redact: leaves out {unused[0]!r} of `rules`; name it, or remove the rule")
        return self

    @field_validator("ship")
    @classmethod
    def _absolute(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        if "://" in value:
            if "@" in value.split("://", 1)[1].split("/", 1)[0]:
                # The value itself stays out of the message: it may hold the password.
                raise ValueError("has a user or a password in its URL; give them in the environment")
            return value
        path = Path(value).expanduser()
        folder = (info.context or {}).get("folder")
        return str(path if path.is_absolute() or folder is None else Path(folder) / path)


class ServeSection(Section):
    """The endpoint."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    ingress: Literal["gateway", "proxy"] = Field(
        "gateway",
        description="Who listens on `port`: the gateways themselves, on Ray's head node, or Ray Serve's "
        "proxy, on each node that has a part of the endpoint; the proxy adds about 5 ms to an answer.",
    )
    link: Literal["direct", "handle"] = Field(
        "direct",
        description="How gateways reach the replicas: direct, over a Unix socket, or through Ray Serve's "
        "handle, which adds about 3 ms to an answer. direct goes through the handle, too, where a replica is "
        "on another machine than the gateway, and where `max_replicas` is above `min_replicas`, as Ray then "
        "has to count requests.",
    )
    max_batch: int = Field(16, ge=1, description="Requests answered together.")
    max_queued: int = Field(
        64, ge=1, description="Requests waiting beyond those being answered; more get 429."
    )
    max_new_tokens: int = Field(256, ge=1, description="Upper bound on what one request may ask for.")
    request_timeout_seconds: float = Field(
        300.0, gt=0, description="How long an answer may take; then it is given up, with 504."
    )
    poll_seconds: float = Field(0.5, gt=0, description="How often the aliases are looked up.")
    num_cpus: float = Field(
        1, ge=0, description="Cores reserved for each engine replica; 0 shares them with trials."
    )
    num_gpus: float = Field(0, ge=0, description="GPUs of each engine replica.")
    min_replicas: int = Field(1, ge=1, description="Engine replicas there always are.")
    max_replicas: int = Field(
        1, ge=1, description="Engine replicas there may be; more than the least of them: as requests ask."
    )
    upscale_seconds: float = Field(
        30.0, ge=0, description="How long requests must ask for more replicas until there are more."
    )
    downscale_seconds: float = Field(
        600.0, ge=0, description="How long fewer replicas must do until there are fewer."
    )
    gateways: int = Field(
        1, ge=1, description="Processes that take requests in; with several, each counts limits of its own."
    )
    canary: float = Field(
        0.0, ge=0, le=1, description="Share of sessions that the version with the alias challenger answers."
    )
    shadow: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of sessions that the version with the alias shadow answers too, unseen, for the "
        "captures alone.",
    )
    shadow_max_running: int = Field(
        4, ge=1, description="Requests that the shadow answers at once; others are dropped and counted."
    )
    pinned: tuple[int, ...] = Field(
        (), description="Versions that are loaded from the beginning, and stay, beside those with an alias."
    )
    keep_versions: int = Field(
        2,
        ge=0,
        description="Versions without a role, former champions for instance, that stay loaded until others "
        "want their places.",
    )
    keys: Path | None = Field(
        None, description="File with the API keys (`regraft keys create`); null: anybody here may ask."
    )
    open: bool = Field(False, description="Let anybody ask, from other machines too, when `keys` is null.")
    limits: LimitsSection = Field(
        LimitsSection(),
        description="For a key that has none of its own, in each process; without keys, for all together.",
    )
    capture: CaptureSection = CaptureSection()
    vllm: VllmSection = VllmSection()

    @model_validator(mode="after")
    def _bounds(self) -> ServeSection:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas: {self.max_replicas} is less than min_replicas, {self.min_replicas}; raise it"
            )
        return self

    @property
    def direct(self) -> bool:
        """Whether replicas have sockets for the gateways."""
        return self.link == "direct" and self.max_replicas == self.min_replicas

    @property
    def followed(self) -> tuple[str, ...]:
        """Aliases whose versions are loaded, the champion's first."""
        optional = (("challenger", self.canary), ("shadow", self.shadow))
        return ("champion", *(alias for alias, share in optional if share > 0))

    @field_validator("keys")
    @classmethod
    def _keys_beside_the_yaml(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        return beside(value, info)
