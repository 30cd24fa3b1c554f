"""README says what the program does: its field reference is the program's own."""

from pathlib import Path

from studio.commands.recipes import field_reference, field_rows
from studio.core.recipe import FIELDS

README = Path(__file__).parents[2] / "README.md"


def test_the_field_reference_is_current() -> None:
    told = (
        README.read_text("utf-8").partition("<!-- fields")[2].partition("-->\n")[2].partition("\n<!-- /fields -->")[0]
    )
    assert told == field_reference(), "README is behind: put in what `lora-studio recipes --fields` prints"


def test_every_field_is_in_it_once() -> None:
    assert sorted(row["path"] for row in field_rows()) == sorted(FIELDS)
