"""The one chat format: JSON lines, each `{"messages": [...], "id": ..., "tags": {...}}`.

Reading validates every line and reports all that is wrong at once, by file, line and field.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from regraft.errors import DataError
from regraft.records import Example, content_hash

MAX_REPORTED = 20
_FORMAT = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


def read_chats(path: Path) -> tuple[Example, ...]:
    """Read and validate a file of chats.

    Args:
        path: A JSON Lines file in UTF-8.

    Returns:
        The examples in file order. An example without an `id` gets one from its content.

    Raises:
        DataError: If the file is missing or empty, or any line is wrong; the message names the lines.
    """
    try:
        # Not splitlines(): it also splits at separators that JSON leaves inside a text.
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}", "check the path under data: in the YAML") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", "save the file as UTF-8") from error
    examples: list[Example] = []
    problems: list[str] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            example = parse_chat(json.loads(line))
        except json.JSONDecodeError as error:
            problems.append(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}")
            continue
        except ValueError as error:
            problems += [f"{path}:{number}: {problem}" for problem in str(error).splitlines()]
            continue
        if example.id in first_seen:
            problems.append(
                f"{path}:{number}: id: {example.id!r} is already the id of line {first_seen[example.id]}"
            )
        first_seen.setdefault(example.id, number)
        examples.append(example)
    if problems:
        more = len(problems) - MAX_REPORTED
        shown = problems[:MAX_REPORTED] + ([f"… and {more} more"] if more > 0 else [])
        raise DataError("\n".join(shown), f"each line is {_FORMAT}")
    if not examples:
        raise DataError(f"{path}: no examples", f"each line is {_FORMAT}")
    return tuple(examples)


def parse_chat(raw: Any) -> Example:
    """Validate one chat.

    Raises:
        ValueError: Naming each wrong field, one to a line.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"the line: must be an object, not {type(raw).__name__}")
    if not raw.get("id"):
        raw = {**raw, "id": content_hash(raw.get("messages"))}
    try:
        example = Example.model_validate(raw)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the line'}: {e['msg']}" for e in error.errors()]
        raise ValueError("\n".join(problems)) from None
    _check_turns(example)
    return example


def _check_turns(example: Example) -> None:
    roles = [m.role for m in example.messages]
    start = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[start:], start=start):
        expected = "user" if (index - start) % 2 == 0 else "assistant"
        if role != expected:
            raise ValueError(f"messages.{index}.role: is {role!r}, but user and assistant must alternate")
    if roles[-1] != "assistant":
        raise ValueError(f"messages.{len(roles) - 1}.role: the last turn must be the assistant's answer")
    for index, message in enumerate(example.messages):
        if not message.content.strip():
            raise ValueError(f"messages.{index}.content: is blank")


def write_chats(path: Path, examples: Iterable[Example]) -> None:
    """Write examples in the same format, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    with scratch.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(e.model_dump(mode="json"), ensure_ascii=False) + "\n" for e in examples)
    scratch.replace(path)
