"""What the table of families does not hold: cells that are open, and trainings that are refused."""

REFUSED: dict[tuple[str, str], str] = {
    ("falcon", "qlora"): "whose linear layers transformers does not hand to bitsandbytes: take method lora",
}
"""Trainings that a library cannot do, at most six: family and method, and the words in which a start is refused."""

OPEN: dict[str, dict[str, str]] = {}
"""Cells that do not hold yet: family, check, reason. Each mark is strict."""
