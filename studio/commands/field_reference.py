"""Every field of a recipe as Markdown, made from the fields, the knobs and the flags themselves."""

from typing import Any

from studio.commands.recipe_flags import flag_of
from studio.core.field_words import SECTIONS, words_of
from studio.core.knobs import KNOBS
from studio.core.recipe import PATHS, Recipe, choices_of

_FIRST_HEADING = "The run"


def field_rows() -> list[dict[str, Any]]:
    """Return section, path, flag, default, allowed values, help and cost of every field, in the screens' order."""
    defaults = Recipe()
    return [_row(heading or _FIRST_HEADING, path, defaults.get(path)) for heading, paths in SECTIONS for path in paths]


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


def _row(section: str, path: str, default: Any) -> dict[str, Any]:
    words = words_of(path)
    return {
        "section": section,
        "path": path,
        "flag": flag_of(path),
        "default": list(default) if isinstance(default, tuple) else default,
        "allowed": _allowed(path),
        "help": words.help,
        "cost": words.cost,
    }


def _allowed(path: str) -> str:
    if path in KNOBS:
        return KNOBS[path].allowed
    if PATHS[path] is bool:
        return "true, false"
    return ", ".join(choices_of(path)) or "text"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return "empty" if value == "" else f"{value:g}" if isinstance(value, float) else str(value)
