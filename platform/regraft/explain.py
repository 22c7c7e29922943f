"""What is wrong with an experiment file, in words: the file and line, the field, the mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from regraft.errors import ConfigError
from regraft.methods import METHODS_BY_NAME


def dotted(loc: tuple[Any, ...]) -> str:
    """A field as people write it: `sweep.methods.1.rank`."""
    return ".".join(str(part) for part in loc)


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """The end of a message that names the closest of the known words; empty if none is close."""
    close = difflib.get_close_matches(wrong, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def place(path: Path, tree: Any, loc: tuple[Any, ...]) -> str:
    """`file:line` of the deepest part of `loc` that the YAML has; of the key where there is one."""
    node, line = tree, 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return f"{path}:{line}"


def explain(path: Path, tree: Any, error: ValidationError, model: type[BaseModel]) -> ConfigError:
    """All mistakes that a check of the whole file found, a line each."""
    lines = []
    for item in error.errors():
        loc = item["loc"]
        problem = item["msg"].removeprefix("Value error, ")
        field, colon, rest = problem.partition(": ")
        if not loc and colon:  # a check across sections names its field itself
            loc = tuple(int(p) if p.isdigit() else p for p in field.split("."))
            problem = rest
        if item["type"] == "extra_forbidden":
            problem = "unknown key" + did_you_mean(str(loc[-1]), _keys_at(model, loc[:-1]))
        elif item["type"] == "missing":
            problem = "this key is required"
        lines.append(f"{place(path, tree, loc)}: {dotted(loc) or 'the file'}: {problem}")
    return ConfigError("\n".join(lines), "mend the named keys; docs/configuration.md lists every key")


def _keys_at(model: type[BaseModel], loc: tuple[Any, ...]) -> list[str]:
    current: Any = model
    for part in loc:
        field = current.model_fields.get(part) if isinstance(part, str) else None
        options = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        current = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if current is None:
            return []
    return list(current.model_fields)


def explain_method(
    path: Path, tree: Any, where: tuple[Any, ...], entry: dict[str, Any], error: ValidationError
) -> ConfigError:
    """What is wrong with one entry of `sweep.methods`, whose fields may be lists and ranges."""
    names = entry.get("name")
    name = (
        next((n for n in names if n not in METHODS_BY_NAME), names[0])
        if isinstance(names, list) and names
        else names
    )
    if not isinstance(name, str) or name not in METHODS_BY_NAME:
        return ConfigError(
            f"{place(path, tree, (*where, 'name'))}: {dotted(where)}.name: unknown method {name!r}"
            + did_you_mean(str(name), METHODS_BY_NAME),
            f"use one of {', '.join(METHODS_BY_NAME)}",
        )
    lines = []
    for item in error.errors():
        name = str(item["loc"][0])  # which of several names it was
        field = next((p for p in item["loc"][1:] if isinstance(p, str)), "")
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            problem = f"{name} has no field {field!r}"
            problem += did_you_mean(field, METHODS_BY_NAME[name].model_fields)
        loc = (*where, field)
        lines.append(f"{place(path, tree, loc)}: {dotted(loc)}: {problem}")
    fields = ", ".join(METHODS_BY_NAME[name].model_fields)
    return ConfigError("\n".join(lines), f"{name} takes {fields}")
