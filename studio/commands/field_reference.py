"""Every field of a recipe as Markdown, made from what is declared of the fields."""

from typing import Any

from studio.core.recipe import FIELDS, SECTIONS, choices_of
from studio.core.recipe_field import Field
from studio.core.value_kinds import Switch


def field_rows() -> list[dict[str, Any]]:
    """Return section, path, flag, default, allowed values, help and cost of every field, in the screens' order."""
    return [_row(FIELDS[path]) for _, paths in SECTIONS for path in paths]


def field_reference() -> str:
    """Return one Markdown table a section."""
    lines: list[str] = []
    section = ""
    for row in field_rows():
        if row["section"] != section:
            section = row["section"]
            lines += [
                "",
                f"**{section}**",
                "",
                "| field | default | allowed | what it does, what it costs |",
                "|---|---|---|---|",
            ]
        name = f"`{row['path']}`" + (f" `--{row['flag']}`" if row["flag"] else "")
        lines.append(
            f"| {name} | {_shown(row['default'])} | {row['allowed']} | {row['help']} {row['cost']}".rstrip() + " |"
        )
    return "\n".join(lines[1:])


def _row(field: Field) -> dict[str, Any]:
    return {
        "section": field.heading,
        "path": field.path,
        "flag": field.flag,
        "default": field.kind.stored(field.default),
        "allowed": _allowed(field),
        "help": field.help,
        "cost": field.cost,
    }


def _allowed(field: Field) -> str:
    return "true, false" if isinstance(field.kind, Switch) else ", ".join(choices_of(field.path)) or field.kind.allowed


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value in ("", [], {}):
        return "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)
