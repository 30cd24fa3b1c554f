"""Where the data set lies that ships with the program."""

from pathlib import Path

from studio.core.errors import BadInput

EMBEDDED = "embedded"
_NAME = Path("data") / "stdlib_qa.jsonl"


def shipped_data() -> Path:
    """Return the path of the shipped data set: inside the installed package, or in a checkout's `recipes/`.

    Raises:
        BadInput: The installation lacks it.
    """
    package = Path(__file__).parents[2]
    places = (package / "_recipes" / _NAME, package.parent / "recipes" / _NAME)
    for place in places:
        if place.is_file():
            return place
    raise BadInput(f"The embedded data set is missing from this installation ({places[0]}). Install lora-studio again.")
