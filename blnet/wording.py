"""Words that go with numbers."""

from __future__ import annotations


def counted(count: int, what: str) -> str:
    """Return how many of something there are: "1 epoch", "2 epochs"."""
    return f"{count} {what}{'' if count == 1 else 's'}"
