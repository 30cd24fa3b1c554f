"""How the configure screen offers the fields of a recipe that are chosen: values and the words shown for them."""

from studio.core.recipe import FIELDS, choices_of
from studio.core.value_kinds import Switch

OFF, ON = "off", "on"

SHOWN = {"lora": "LoRA 16-bit", "qlora": "QLoRA 4-bit"}
"""What is shown for a choice whose word says too little."""


def options_of(path: str) -> tuple[tuple[str, str], ...]:
    """Return the values and words that a field is chosen from; empty where it is no choice."""
    if isinstance(FIELDS[path].kind, Switch):
        return (OFF, OFF), (ON, ON)
    return tuple((value, SHOWN.get(value, value)) for value in choices_of(path))
