"""Times as records have them: UTC, in ISO 8601."""

from __future__ import annotations

from datetime import UTC, datetime


def utc(moment: datetime | str) -> datetime:
    """A time in UTC; one without a zone is taken for it.

    Args:
        moment: A time, or one in ISO 8601.
    """
    time = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
