"""What is compared: the frozen reference, and a window of captured exchanges."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from monitoring.baseline import QualityBaseline
from regraft.errors import DataError
from regraft.records import CapturedExchange, Record, content_hash

REFERENCE_FILE = "reference.json"


class Row(Record):
    """One exchange as the detectors see it. One without a session is a session of its own."""

    id: str
    prompt: str
    output: str
    session: str | None = None


class Reference(Record):
    """The promoted model's own answers to ordinary prompts. `id` is the hash of all the rest.

    Attributes:
        source: Whether they are answers on the evaluation sets, or of the first accepted traffic.
        until: When the last exchange of that traffic began, UTC in ISO 8601; windows begin after it.
        quality: What later windows' quality is held against.
    """

    id: str
    model: str
    version: int
    rows: tuple[Row, ...]
    source: Literal["evaluation", "traffic"] = "evaluation"
    until: str = ""
    quality: QualityBaseline = QualityBaseline()


class Window(Record):
    """The exchanges of one check, with what was left out of them and why."""

    rows: tuple[Row, ...]
    start: str = ""
    end: str = ""
    given: int = 0
    errors: int = 0
    other_versions: int = 0
    repeats: int = 0
    not_sampled: int = 0

    @classmethod
    def of(
        cls,
        exchanges: Sequence[CapturedExchange],
        max_rows: int,
        model: str | None = None,
        version: int | None = None,
    ) -> Window:
        """Select the rows to compare.

        Turns of one session, and one prompt asked again and again, are alike: as separate rows they would
        make ordinary windows look strange to a permutation test. One row of each is kept.

        Args:
            exchanges: What was captured, in any order.
            max_rows: A larger window is sampled by the hash of the exchange ids.
            model: Leave out the exchanges of other models, where given.
            version: Leave out the exchanges of other versions, where given.
        """
        own = [
            e
            for e in exchanges
            if (model is None or e.model == model) and (version is None or e.model_version == version)
        ]
        answered = [e for e in own if e.error is None]
        rows = rows_of(answered)
        return cls(
            rows=tuple(rows[:max_rows]),
            start=min((e.created for e in exchanges), default=""),
            end=max((e.created for e in exchanges), default=""),
            given=len(exchanges),
            errors=len(own) - len(answered),
            other_versions=len(exchanges) - len(own),
            repeats=len(answered) - len(rows),
            not_sampled=max(0, len(rows) - max_rows),
        )

    @property
    def left_out(self) -> str:
        """What was left out, in words; empty if nothing was."""
        counts = {
            "failed": self.errors,
            "of other models or versions": self.other_versions,
            "repeated a session or a prompt": self.repeats,
            "not sampled": self.not_sampled,
        }
        return ", ".join(f"{count} {why}" for why, count in counts.items() if count)


def distinct(rows: Iterable[Row]) -> list[Row]:
    """Keep the first row of each prompt, whatever its spacing and case."""
    found: dict[str, Row] = {}
    for row in rows:
        found.setdefault(" ".join(row.prompt.lower().split()), row)
    return list(found.values())


def sampled(rows: Sequence[Row], max_rows: int) -> list[Row]:
    """Distinct rows in hash order, at most `max_rows` of them."""
    return distinct(sorted(rows, key=lambda row: hashed(row.id)))[:max_rows]


def session_of(row: Row) -> str:
    """The session of a row; a row without one is a session of its own."""
    return f"row:{row.id}" if row.session is None else f"session:{row.session}"


def sessions_in(rows: Iterable[Row]) -> int:
    """How many sessions rows are of."""
    return len({session_of(row) for row in rows})


def accepted(
    exchanges: Sequence[CapturedExchange], disliked: frozenset[str], count: int
) -> list[CapturedExchange] | None:
    """The first accepted traffic: what was answered whole, is not empty, and that nobody disliked.

    Args:
        exchanges: What was captured, in any order.
        disliked: Ids of answers with bad feedback.
        count: Rows wanted: sessions with a prompt of their own, as detectors see them.

    Returns:
        The exchanges of the first so many, oldest first, every turn until the last of them began; None while
        there are fewer.
    """
    taken: list[CapturedExchange] = []
    sessions: set[str] = set()
    enough = count
    for exchange in sorted(exchanges, key=lambda e: (e.created, e.id)):
        if exchange.error is not None or not exchange.output.strip() or exchange.id in disliked:
            continue
        taken.append(exchange)
        sessions.add(f"row:{exchange.id}" if exchange.session is None else exchange.session)
        if len(sessions) >= enough:
            lacking = count - len(rows_of(taken))
            if lacking <= 0:
                return taken
            enough = len(sessions) + lacking  # each further session is a row more at most
    return None


def rows_of(exchanges: Iterable[CapturedExchange]) -> list[Row]:
    """Exchanges as the detectors see them, one row of each session and prompt, by the hash of their ids."""
    sessions: set[str] = set()
    kept = []
    # Ordered by hash, the choice depends neither on the order given nor on time of day or content.
    for exchange in sorted(exchanges, key=lambda e: hashed(e.id)):
        if exchange.session is not None:
            if exchange.session in sessions:
                continue
            sessions.add(exchange.session)
        kept.append(
            Row(id=exchange.id, prompt=exchange.prompt_text, output=exchange.output, session=exchange.session)
        )
    return distinct(kept)


def freeze(
    folder: Path,
    *,
    model: str,
    version: int,
    rows: Iterable[Row],
    source: Literal["evaluation", "traffic"] = "evaluation",
    until: str = "",
    quality: QualityBaseline | None = None,
) -> Reference:
    """Write the reference of a promoted version, in place of any that was there.

    Args:
        folder: Where it is kept.
        model: Name of the registered model.
        version: The promoted version, whose answers these are.
        rows: Ordinary prompts and the promoted version's answers.
        source: Where they come from.
        until: When the last exchange of accepted traffic began.
        quality: What quality was over these answers.

    Raises:
        DataError: If there are no rows, or two have one id.
    """
    kept = tuple(rows)
    if not kept:
        raise DataError(f"no exchanges to freeze as the reference of {model}/{version}", "answer some first")
    if len({row.id for row in kept}) != len(kept):
        raise DataError(
            f"the reference of {model}/{version} has an id twice", "give each exchange its own id"
        )
    whole = Reference(
        id="", model=model, version=version, rows=kept, source=source, until=until,
        quality=quality or QualityBaseline(),
    )  # fmt: skip
    reference = whole.model_copy(update={"id": _hash(whole)})
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / REFERENCE_FILE
    # A reader sees the old file or the new one, never half of one.
    partial = target.with_suffix(".partial")
    partial.write_text(reference.model_dump_json(indent=1), encoding="utf-8")
    partial.replace(target)
    return reference


def load(folder: Path) -> Reference:
    """Read a frozen reference and check it against its hash.

    Raises:
        DataError: If there is none, it cannot be read, or it was changed since it was frozen.
    """
    path = folder / REFERENCE_FILE
    mend = "promote the model again to freeze a new reference"
    try:
        reference = Reference.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise DataError(f"{path}: no reference is frozen here", mend) from error
    except (OSError, ValueError, ValidationError) as error:
        raise DataError(f"{path}: not a reference: {error}", mend) from error
    if reference.id != _hash(reference):
        raise DataError(f"{path}: changed since it was frozen as {reference.id}", mend)
    return reference


def _hash(reference: Reference) -> str:
    # What rows and references did not have in earlier versions is left out where it has its default: what
    # was frozen then stays valid.
    said: list[Any] = [
        reference.model,
        reference.version,
        [[row.id, row.prompt, row.output, *([row.session] * bool(row.session))] for row in reference.rows],
    ]
    more = reference.model_dump(mode="json", include={"source", "until", "quality"}, exclude_defaults=True)
    return content_hash([*said, more] if more else said)


def hashed(identifier: str) -> str:
    """What puts ids into an order that depends neither on time nor on content."""
    return hashlib.sha256(identifier.encode()).hexdigest()
