"""From plain tables (parsed TOML or JSON) and `path=value` words to a recipe; unknown keys are refused."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from studio.core.errors import BadInput
from studio.core.recipe import FIELDS, Recipe
from studio.core.recipe_field import Problem
from studio.core.text import plain
from studio.core.value_kinds import found_value

_GONE = {"model.skip_modules": 'model.precision, a table: precision = { "model.layers.0" = "16bit" }'}
"""Keys of earlier versions, and what to write in their place."""
_SECTIONS = tuple(dict.fromkeys(path.split(".")[0] for path in FIELDS if "." in path))
_MOST_TOLD = 50
_LONGEST_KEY = 100


def recipe_from_dict(table: Mapping[str, Any]) -> Recipe:
    """Build a recipe from nested tables and check it.

    Raises:
        BadInput: Names every unknown key (with the nearest known one) and every value that is not allowed.
    """
    recipe, unknown = read_table(table)
    return apply_settings(recipe, (), also=unknown)


def read_table(table: Mapping[str, Any]) -> tuple[Recipe, list[Problem]]:
    """Return the recipe of nested tables, unchecked, and a problem for every key that is no field."""
    recipe, unknown = Recipe(), []
    for path, value in _flat(table):
        if path in FIELDS:
            recipe = recipe.with_(path, value)
        elif path in _SECTIONS:
            unknown.append(Problem(path, _kind_of(value), f"a table: [{path}] with its fields below"))
        else:
            unknown.append(_unknown_key(path, told=len(unknown) < _MOST_TOLD))
    return recipe, unknown


def apply_settings(recipe: Recipe, settings: Iterable[str], *, also: Iterable[Problem] = ()) -> Recipe:
    """Apply `path=value` words, as `--set` takes them, and check the result: a setting may mend what was wrong.

    Args:
        recipe: It may have problems: a setting may mend them.
        settings: The words.
        also: Problems that were found before; they are reported with the others.

    Raises:
        BadInput: A word has no `=`, its path is unknown, or the resulting recipe has problems.
    """
    unread = []
    for word in settings:
        path, equals, text = (part.strip() for part in word.partition("="))
        if not equals:
            unread.append(Problem(word, "no '='", "path=value, such as train.learning_rate=2e-4"))
        elif path not in FIELDS:
            unread.append(_unknown_key(path))
        else:
            recipe = recipe.with_(path, FIELDS[path].kind.read(text))
    refuse((*also, *unread, *recipe.problems()))
    return recipe


def refuse(problems: Iterable[Problem]) -> None:
    """Raise one error that lists all problems, or return when there is none.

    Raises:
        BadInput: There is at least one problem.
    """
    lines = [plain(str(problem), one_line=True) for problem in problems]
    if lines:
        count = "a problem" if len(lines) == 1 else f"{len(lines)} problems"
        more = [f"... and {len(lines) - _MOST_TOLD} more"] if len(lines) > _MOST_TOLD else []
        raise BadInput("\n  ".join((f"the recipe has {count}:", *lines[:_MOST_TOLD], *more)))


def _flat(table: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    """Yield the values of nested tables by dotted path; only tables of the recipe's own sections are opened."""
    for key, value in table.items():
        if isinstance(value, Mapping) and key in _SECTIONS:
            yield from ((f"{key}.{inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield key, value


def _kind_of(value: Any) -> str:
    tables = isinstance(value, list) and value and isinstance(value[0], Mapping)
    return "a list of tables" if tables else found_value(value)


def _unknown_key(path: str, *, told: bool = True) -> Problem:
    # Looking for a near one takes a millisecond, and a file that is no recipe may have a hundred thousand keys.
    return Problem(
        plain(path, limit=_LONGEST_KEY), "an unknown key", (_GONE.get(path) or _nearest(path)) if told else ""
    )


def _nearest(path: str) -> str:
    """Return in words which known key an unknown one may mean."""
    by_last = {known.rpartition(".")[2]: known for known in reversed(FIELDS)}
    section, _, last = path.rpartition(".")
    fields = [known.rpartition(".")[2] for known in FIELDS if section and known.rpartition(".")[0] == section]
    close = [] if fields else difflib.get_close_matches(path, [*FIELDS, *_SECTIONS], n=1)
    close_own = difflib.get_close_matches(last, fields, n=1)
    close_last = difflib.get_close_matches(last, by_last, n=1)
    if last in by_last:
        return f"perhaps {by_last[last]}"
    if close:
        return f"perhaps {close[0]}"
    if close_own:
        return f"perhaps {section}.{close_own[0]}"
    if close_last:
        return f"perhaps {by_last[close_last[0]]}"
    if fields:
        return f"one of the fields of [{section}]: {', '.join(fields)}"
    return "one of the tables " + ", ".join(_SECTIONS)
