"""How many examples a property is tried with."""

from hypothesis import settings


def examples(count: int) -> int:
    """Return this many, or ten times as many where properties are explored (see `tests/conftest.py`)."""
    return count * settings().max_examples // 100
