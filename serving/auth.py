"""Who may ask: API keys in a file.

Knows no HTTP: `serving.guard` takes the key out of a request and answers those who have none.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import ipaddress
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from regraft.errors import ConfigError, RegraftError
from regraft.serve_sections import LimitsSection

Scope = Literal["use", "feedback", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

_ID = re.compile(r"[0-9a-f]{8}")
_NOBODYS = "0" * 64


class KeysError(RegraftError):
    """A keys file, or a key in it, that cannot be used."""


class Key(BaseModel):
    """What is kept of an API key. The key itself is not."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[0-9a-f]{8}$", description="The beginning of the hash; captures carry it.")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    name: str = Field(min_length=1, max_length=64)
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None
    revoked: AwareDatetime | None = None
    limits: LimitsSection = LimitsSection()

    @model_validator(mode="after")
    def _id_of_its_hash(self) -> Key:
        if not self.sha256.startswith(self.id):
            raise ValueError("id: is not the beginning of sha256")
        return self

    def state(self, now: datetime) -> Literal["valid", "expired", "revoked"]:
        """Whether the key counts at that time."""
        if self.revoked is not None:
            return "revoked"
        return "expired" if self.expires is not None and self.expires <= now else "valid"


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    keys: tuple[Key, ...] = ()

    @model_validator(mode="after")
    def _each_once(self) -> _Document:
        if len({key.id for key in self.keys}) != len(self.keys):
            raise ValueError("keys: the same id twice")
        return self


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Attributes:
        key: The short id of the key; empty for one who showed none where none is needed.
        name: What the key is called.
        scopes: What it may be used for.
    """

    key: str
    name: str
    scopes: frozenset[Scope]


class Keyring:
    """The keys in a file, read again whenever the file has changed.

    Every change replaces the file as a whole, so that a reader sees the old keys or the new.

    Args:
        path: The file; made, readable by its owner alone, when the first key is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, ...] | None = None
        self._keys: dict[str, Key] = {}

    def all(self) -> list[Key]:
        """All keys, oldest first, those that no longer count among them.

        Raises:
            KeysError: If the file is missing, damaged, or others may write to it.
        """
        self._refresh()
        return list(self._keys.values())

    def find(self, presented: str) -> Key | None:
        """The key that somebody presents, whether it still counts or not; None if there is no such key.

        Raises:
            KeysError: As `all` does; nobody gets in by a file that cannot be read.
        """
        self._refresh()
        found = _hash(presented)
        # Ids are no secret (captures carry them); the rest of the hash is compared in constant time.
        key = self._keys.get(found[:8])
        same = hmac.compare_digest(found, _NOBODYS if key is None else key.sha256)
        return key if same else None

    def create(
        self,
        name: str,
        scopes: Sequence[Scope],
        *,
        expires: datetime | None = None,
        limits: LimitsSection | None = None,
    ) -> tuple[str, Key]:
        """Make a key.

        Args:
            name: For people.
            scopes: What it may be used for.
            expires: From when on it no longer counts; with a time zone.
            limits: Of this key; what it leaves open, the endpoint's own limits say.

        Returns:
            The key itself, which is kept nowhere, and what is kept of it.

        Raises:
            KeysError: If the file is damaged, others may write to it, or a value is not allowed.
        """
        with self._changing() as (keys, write):
            secret = _new_secret()
            while any(key.id == _hash(secret)[:8] for key in keys):  # one in four thousand million
                secret = _new_secret()
            digest = _hash(secret)
            try:
                key = Key(
                    id=digest[:8],
                    sha256=digest,
                    name=name,
                    scopes=tuple(s for s in SCOPES if s in scopes),
                    created=now().replace(microsecond=0),
                    expires=expires,
                    limits=limits or LimitsSection(),
                )
            except ValidationError as error:
                raise KeysError(_first(error), "see `regraft keys create --help`") from error
            write([*keys, key])
        return secret, key

    def revoke(self, id: str) -> Key:
        """Make a key count no more; what it was stays in the file.

        Raises:
            KeysError: If there is no such key, it is revoked already, or the file cannot be used.
        """
        if not _ID.fullmatch(id):
            # It may be a key, pasted by mistake: it stays out of the message.
            raise KeysError(
                "that is not the id of a key", "give its eight hex digits, as `regraft keys list` shows them"
            )
        with self._changing() as (keys, write):
            key = next((key for key in keys if key.id == id), None)
            if key is None:
                raise KeysError(f"{self.path} has no key {id}", "`regraft keys list` shows those it has")
            if key.revoked is not None:
                raise KeysError(f"key {id} is revoked since {key.revoked.isoformat()}")
            revoked = key.model_copy(update={"revoked": now().replace(microsecond=0)})
            write([revoked if other is key else other for other in keys])
        return revoked

    def _refresh(self) -> None:
        try:
            if _identity(self.path.stat()) == self._seen:
                return
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                raw = file.read()
        except OSError as error:
            self._forget()
            raise KeysError(
                f"serve.keys: {self.path}: {error.strerror}", "make a first key with `regraft keys create`"
            ) from error
        if status.st_mode & 0o022:
            self._forget()
            raise KeysError(f"serve.keys: others may write to {self.path}", f"chmod 600 {self.path}")
        try:
            document = _Document.model_validate_json(raw)
        except ValidationError as error:
            self._forget()
            raise KeysError(f"serve.keys: {self.path}: {_first(error)}", "repair it by hand") from error
        self._keys = {key.id: key for key in document.keys}
        self._seen = _identity(status)

    def _forget(self) -> None:
        self._keys, self._seen = {}, None

    @contextmanager
    def _changing(self) -> Iterator[tuple[list[Key], Callable[[list[Key]], None]]]:
        """The keys as they are, and a function that replaces them, while no other process may."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.path.with_name(f".{self.path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when the file closes, also if this process dies
            yield self.all() if self.path.exists() else [], self._replace
        finally:
            os.close(lock)

    def _replace(self, keys: list[Key]) -> None:
        # mkstemp makes it with mode 0600.
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}.")
        try:
            with os.fdopen(handle, "w") as file:
                file.write(_Document(keys=tuple(keys)).model_dump_json(indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise


def check_exposure(host: str, keys: Path | None, *, open: bool = False) -> None:
    """See that an endpoint without keys is reached from this machine alone.

    Args:
        host: Where it listens.
        keys: The file with its keys.
        open: Whether anybody may ask, and that is meant.

    Raises:
        ConfigError: If others reach it without a key, or `open` contradicts `keys`.
    """
    if keys is not None:
        if open:
            raise ConfigError("serve.open: is true, but serve.keys names keys", "remove one of the two")
        return
    if not open and not is_loopback(host):
        raise ConfigError(
            f"serve.keys: is not set, but serve.host = {host} lets other machines ask",
            "set serve.keys and make a key with `regraft keys create`; or set serve.open: true",
        )


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def now() -> datetime:
    """The time by which keys expire."""
    return datetime.now(UTC)


def _new_secret() -> str:
    return f"rg-{secrets.token_urlsafe(32)}"


def _hash(secret: str) -> str:
    # A slow hash is for passwords, which can be guessed. A key is 32 random bytes: nobody tries them all.
    return hashlib.sha256(secret.encode()).hexdigest()


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def _first(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
