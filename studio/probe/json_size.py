"""How much a JSON text holds, told before it is read: objects made of it take up to fifty times its bytes."""

MOST_VALUES = 1_200_000
"""More than any file of a real model: 150 000 tensors in a header, with eight values each. Read in a second or so, into
some 200 MB."""


def values_in(raw: bytes) -> int:
    """Return how many values a JSON text can hold at most, names of members not counted.

    Each value comes after a comma or an opening bracket, but for the first; those within strings count as well.

    Args:
        raw: The text, in UTF-8.
    """
    return 1 + sum(map(raw.count, (b",", b"[", b"{")))
