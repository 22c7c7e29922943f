"""What is wrong with an experiment file, in words: the file and line, the field, the mend."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from regraft.errors import ConfigError
from regraft.methods import METHOD_CLASSES


def dotted(loc: tuple[Any, ...]) -> str:
    """A field as people write it: `sweep.methods.1.rank`."""
    return ".".join(str(part) for part in loc)


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
            close = difflib.get_close_matches(str(loc[-1]), _keys_at(model, loc[:-1]), n=1)
            problem = "unknown key" + (f"; did you mean {close[0]!r}?" if close else "")
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
    classes = {str(c.model_fields["name"].default): c for c in METHOD_CLASSES}
    names = entry.get("name")
    name = (
        next((n for n in names if n not in classes), names[0]) if isinstance(names, list) and names else names
    )
    if not isinstance(name, str) or name not in classes:
        close = difflib.get_close_matches(str(name), list(classes), n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return ConfigError(
            f"{place(path, tree, (*where, 'name'))}: {dotted(where)}.name: unknown method {name!r}{hint}",
            f"use one of {', '.join(classes)}",
        )
    lines = []
    for item in error.errors():
        name = str(item["loc"][0])  # which of several names it was
        field = next((p for p in item["loc"][1:] if isinstance(p, str)), "")
        problem = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            close = difflib.get_close_matches(field, list(classes[name].model_fields), n=1)
            problem = f"{name} has no field {field!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        loc = (*where, field)
        lines.append(f"{place(path, tree, loc)}: {dotted(loc)}: {problem}")
    fields = ", ".join(classes[name].model_fields)
    return ConfigError("\n".join(lines), f"{name} takes {fields}")
