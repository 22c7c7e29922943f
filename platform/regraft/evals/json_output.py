"""Answers that have to be JSON, and of a given shape."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from regraft.evals.base import Answer, Metric, Output


class JsonOutput(Metric):
    """Whether the answer is JSON, fits the schema, and has the reference's fields right.

    A fence of Markdown around it does no harm; words around it do. Without a schema `json_schema` is whether
    it is JSON. `json_fields` is the share of the top-level fields of the reference, if that is an object,
    that the answer has with the very value.
    """

    outputs: ClassVar[tuple[Output, ...]] = (
        Output("json_valid"),
        Output("json_schema"),
        Output("json_fields"),
    )

    name: Literal["json"] = "json"
    json_schema: dict[str, Any] | None = Field(None, description="A JSON schema (draft 2020-12).")

    @field_validator("json_schema")
    @classmethod
    def _is_a_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None:
            from jsonschema import Draft202012Validator, SchemaError

            try:
                Draft202012Validator.check_schema(value)
            except SchemaError as error:
                raise ValueError(f"is no JSON schema: {error.message}") from error
        return value

    @cached_property
    def _validator(self) -> Any:
        from jsonschema import Draft202012Validator

        return Draft202012Validator(self.json_schema or {})

    def score(self, answer: Answer) -> dict[str, float]:
        """Parse, validate, compare."""
        try:
            got = json.loads(_bare(answer.output))
        except ValueError:
            return {"json_valid": 0.0, "json_schema": 0.0, "json_fields": 0.0}
        scores = {"json_valid": 1.0, "json_schema": float(self._validator.is_valid(got))}
        return scores | {"json_fields": _fields(got, answer.reference)}


def _fields(got: Any, reference: str) -> float:
    try:
        want = json.loads(_bare(reference))
    except ValueError as error:
        raise ValueError(f"the reference is no JSON: {error}") from error
    if not isinstance(want, dict) or not want:
        return float(bool(got == want))
    if not isinstance(got, dict):
        return 0.0
    return sum(1 for key, value in want.items() if key in got and got[key] == value) / len(want)


def _bare(text: str) -> str:
    """The text without a fence of Markdown around it."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text[text.index("\n") + 1 : -3]
    return text
