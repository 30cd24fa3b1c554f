"""`lora-studio import`: another tool's configuration as a recipe, with what could not be carried over and why."""

import argparse
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from studio.commands.options import add_json, add_set
from studio.commands.terminal import DONE, NO, say, table, width_of_terminal, write_json
from studio.core.errors import BadInput, StudioError
from studio.core.foreign.carry import Carried, Carrier, Left, as_number
from studio.core.foreign.rows import SHARE
from studio.core.recipe import FIELDS, Recipe, field_text
from studio.core.text import plain
from studio.probe.foreign_file import read_foreign, recipe_of
from studio.runs.recipe_file import dump_recipe


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "import",
        help="a recipe from axolotl, LLaMA-Factory, TRL or Unsloth",
        description="Reads a YAML or JSON configuration, or the text of a Python script or notebook, which is never "
        "run. Exit 1: it trains something that this program does not, or the recipe has problems.",
    )
    parser.add_argument("file", metavar="FILE", help="the configuration, the script or the notebook")
    parser.add_argument("--out", metavar="RECIPE", help="the recipe's file; without it the recipe is printed")
    parser.add_argument("--model", metavar="M", help="the base, in place of the file's")
    parser.add_argument("--data", metavar="FILE", help="the data, in place of the file's")
    add_set(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Carry a file over, write or print the recipe, and tell what is not in it.

    Raises:
        BadInput: The file is none that is known, or names no base or no data; the recipe's file is there already.
        StudioError: It trains what this program does not.
    """
    path = Path(args.file).expanduser()
    out = Path(args.out).expanduser() if args.out else None
    if out and out.exists():
        raise BadInput(f"{plain(str(out), one_line=True)} is there already: choose another --out.")
    carrier = read_foreign(path)
    recipe = _with_share(carrier, recipe_of(carrier, path, base=args.model, data=args.data, settings=args.set))
    problems = [str(problem) for problem in recipe.problems()]
    given = {"model.base": args.model, "data.path": args.data}
    chosen = {word.partition("=")[0].strip() for word in args.set} | {field for field, word in given.items() if word}
    text = _head(carrier, path) + dump_recipe(recipe, {"name", *carrier.carried, *chosen})
    if out:
        _write(out, text)
    if args.json:
        write_json(_document(carrier, recipe, problems, out))
    else:
        if not out:
            say(text)
        _tell(carrier, problems, path, out)
    return NO if problems else DONE


def _with_share(carrier: Carrier, recipe: Recipe) -> Recipe:
    """Hold out the share of the rows that a file asks for, where its rows lie here and can be counted."""
    asked = next((one for one in carrier.left if one.why == SHARE), None)
    place = Path(recipe.data.path)
    if asked is None or recipe.data.sources or not place.is_file():
        return recipe
    from studio.probe.data.read import read_data  # noqa: PLC0415  0.1 s that only such a file pays

    try:
        rows = len(read_data(place).rows)
    except StudioError:
        return recipe
    carrier.left.remove(asked)
    carrier.put("eval.rows", max(1, round(rows * as_number(asked.setting.value))), asked.setting, f"of {rows} rows")
    return recipe.with_("eval.rows", carrier.carried["eval.rows"].value)


def _head(carrier: Carrier, path: Path) -> str:
    """Return the recipe's head comment: where it comes from, and what of that changes the training."""
    lines = [f"From {carrier.tool}'s {path.name}, by lora-studio import."]
    lines += [f"not carried: {one.setting.words}: {one.why}" for one in carrier.left if one.matters]
    return "".join(f"# {plain(line, one_line=True)}\n" for line in lines) + "\n"


def _write(out: Path, text: str) -> None:
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise BadInput(f"{plain(str(out), one_line=True)} is there already: choose another --out.") from error


def _document(carrier: Carrier, recipe: Recipe, problems: list[str], out: Path | None) -> dict[str, Any]:
    return {
        "tool": carrier.tool,
        "recipe": recipe.to_dict(),
        "carried": [_carried(one) for one in carrier.carried.values()],
        "left": [_left(one) for one in carrier.left],
        "problems": problems,
        "out": str(out) if out else None,
    }


def _carried(one: Carried) -> dict[str, Any]:
    from_file = one.setting is not None
    return {
        "field": one.path,
        "value": FIELDS[one.path].kind.stored(one.value),
        "from": one.setting.key if one.setting else None,
        "line": one.setting.line or None if one.setting else None,
        "default": not from_file,
        "note": one.note,
    }


def _left(one: Left) -> dict[str, Any]:
    setting = one.setting
    return {
        "key": setting.key,
        "value": setting.words,
        "line": setting.line or None,
        "why": one.why,
        "matters": one.matters,
    }


def _tell(carrier: Carrier, problems: list[str], path: Path, out: Path | None) -> None:
    """Tell on stdout where the recipe is in a file, else on stderr."""
    to = sys.stdout if out else sys.stderr

    def tell(text: str = "", indent: str = "") -> None:
        lines = textwrap.wrap(text, width_of_terminal(), subsequent_indent=indent, break_on_hyphens=False)
        say("\n".join(lines), to=to)

    given = [one for one in carrier.carried.values() if one.setting]
    rest = [one for one in carrier.carried.values() if not one.setting]
    whole = len({one.setting.key for one in given if one.setting} | {one.setting.key for one in carrier.left})
    where = f", in {out}" if out else ""
    tell(f"{carrier.tool}'s {path.name}: {whole} settings, {len(given)} fields of the recipe{where}")
    tell()
    say(table([["there", "here"], *([one.setting.words if one.setting else "", _field(one)] for one in given)]), to=to)
    if near := [one for one in carrier.carried.values() if one.note]:
        tell()
        tell("not quite the same:")
        for one in near:
            tell(f"  {_field(one)}: {one.note}", "    ")
    if rest:
        tell()
        tell(f"what {carrier.tool} does where the file says nothing: {', '.join(map(_field, rest))}", "  ")
    for title, left in (
        ("not carried, and the training differs", [one for one in carrier.left if one.matters]),
        ("not carried, and nothing is lost", [one for one in carrier.left if not one.matters]),
    ):
        if left:
            tell()
            tell(f"{title}:")
            for why, ones in _by_reason(left).items():
                tell(f"  {', '.join(_place(one) for one in ones)}: {why}", "    ")
    for problem in problems:
        tell(f"problem: {problem}")
    if out:
        tell()
        tell(f"next: lora-studio plan {plain(str(out), one_line=True)}")


def _field(one: Carried) -> str:
    return f"{one.path} = {field_text(one.path, one.value)}"


def _place(one: Left) -> str:
    if not one.matters:
        return plain(one.setting.key, one_line=True)
    return one.setting.words + (f" (line {one.setting.line})" if one.setting.line else "")


def _by_reason(left: Iterable[Left]) -> dict[str, list[Left]]:
    found: dict[str, list[Left]] = {}
    for one in left:
        found.setdefault(one.why, []).append(one)
    return found
