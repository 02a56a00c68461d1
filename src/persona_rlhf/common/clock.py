"""The time of records, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """The time in UTC, to the second (ISO 8601, with a Z)."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
