"""What a record is, and the hash that tells contents apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict


def content_hash(value: Any, length: int = 16) -> str:
    """Hash a JSON-serialisable value by content, independent of key order.

    Args:
        value: Anything `json.dumps` takes.
        length: Hexadecimal digits to keep.

    Returns:
        The first `length` hexadecimal digits of the SHA-256 of the canonical JSON.
    """
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


class Record(BaseModel):
    """A frozen record: unknown fields are an error, fields never change."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
