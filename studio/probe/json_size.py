"""How much a JSON text holds, found out before it is parsed: its objects can take up to fifty times its bytes."""

MOST_VALUES = 1_200_000
"""More than any file of a real model has: 150 000 tensors in a header, with eight values each. To parse so many takes
about a second and some 200 MB."""


def values_in(raw: bytes) -> int:
    """Return how many values a JSON text can hold at most, without the names of members.

    Each value but the first comes after a comma or an opening bracket. Those inside strings are counted too, so the
    real number may be smaller.

    Args:
        raw: The text, in UTF-8.
    """
    return 1 + sum(map(raw.count, (b",", b"[", b"{")))
