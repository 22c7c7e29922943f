"""The endpoint's API keys: make, list, revoke. A running endpoint heeds each change at its next request."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from jobs.console import console
from regraft.config import Experiment
from regraft.errors import ConfigError
from regraft.serve_sections import LimitsSection
from serving.auth import SCOPES, Keyring, Scope, now


def create(path: Path, name: str, scopes: str, expires: datetime | None, limits: LimitsSection) -> None:
    """Make a key and print it: alone to the standard output, what is to be said of it to the other.

    Raises:
        RegraftError: If a value is wrong or the keys file cannot be used.
    """
    keyring = _keyring(path)
    if expires is not None and expires <= now():
        raise ConfigError(f"--expires: {expires.isoformat()} is past", "give a time to come, in UTC")
    secret, key = keyring.create(name, _scopes(scopes), expires=expires, limits=limits)
    typer.echo(secret)
    typer.echo(
        f"key {key.id} ({key.name}) for {', '.join(key.scopes)}; only its hash is kept, in {keyring.path}: "
        "it is not shown again",
        err=True,
    )


def show(path: Path) -> None:
    """List all keys, those that no longer count too.

    Raises:
        RegraftError: If the keys file cannot be read.
    """
    table = Table(title="API keys")
    for column in ("id", "name", "scopes", "created", "expires", "requests/min", "tokens/min", "state"):
        table.add_column(column, justify="right" if "/min" in column else "left")
    for key in _keyring(path).all():
        table.add_row(
            key.id,
            key.name,
            ", ".join(key.scopes),
            _day(key.created),
            _day(key.expires),
            str(key.limits.requests_per_minute or "–"),
            str(key.limits.tokens_per_minute or "–"),
            key.state(now()),
        )
    Console(width=max(console.width, 120)).print(table)


def revoke(path: Path, id: str) -> None:
    """Make a key count no more.

    Raises:
        RegraftError: If there is no such key.
    """
    key = _keyring(path).revoke(id)
    console.print(f"key {key.id} ({key.name}) is revoked", markup=False)


def _keyring(path: Path) -> Keyring:
    file = Experiment.load(path).serve.keys
    if file is None:
        raise ConfigError("serve.keys: is not set", "name a file for the keys there, such as keys.json")
    return Keyring(file)


def _scopes(text: str) -> list[Scope]:
    named = [name.strip() for name in text.split(",") if name.strip()]
    if not named or set(named) - set(SCOPES):
        raise ConfigError(
            f"--scopes: {text!r} is no list of scopes",
            f"name some of {', '.join(SCOPES)}, with commas between",
        )
    return [scope for scope in SCOPES if scope in named]


def _day(when: datetime | None) -> str:
    return "–" if when is None else when.astimezone(UTC).strftime("%Y-%m-%d %H:%M")
