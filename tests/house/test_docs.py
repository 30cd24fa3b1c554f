"""The pages in docs/ speak of the program as it is: what they name is there, and their lists are those of the code."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from studio.runs.layout import RunPaths

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text("utf-8")
_PLACE = re.compile(r"(?<![\w/.])((?:studio|widgets|tests|docs|recipes)/(?:[\w./-]*[\w/])?)(?::(\w+(?:\.\w+)*))?")
PLACES = sorted(
    {(page.name, *place) for page in (ROOT / "docs").rglob("*.md") for place in _PLACE.findall(page.read_text("utf-8"))}
)


def _section(heading: str) -> str:
    return ARCHITECTURE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def _names(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    """Yield what a file binds at its top and inside its classes, as `name` and `Class.name`."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from _names(node.body, f"{prefix}{node.name}.")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (prefix + target.id for target in targets if isinstance(target, ast.Name))


@cache
def _names_in(path: str) -> frozenset[str]:
    return frozenset(_names(ast.parse((ROOT / path).read_text("utf-8")).body))


def _has(path: str, name: str) -> bool:
    if not name:
        return (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
    return (ROOT / path).is_file() and name in _names_in(path)


def test_the_pages_are_read() -> None:
    assert len([name for page, _, name in PLACES if name and page == "architecture.md"]) > 40


@pytest.mark.parametrize(("page", "path", "name"), PLACES)
def test_what_a_page_names_is_there(page: str, path: str, name: str) -> None:
    assert _has(path, name), f"docs/{page} names {path}{name and f':{name}'}, which is not there any more"


@pytest.mark.parametrize(
    "place", ["studio/gone.py", "studio/gone/", "studio/cli.py:gone", "studio/core/recipe.py:Recipe.gone"]
)
def test_what_is_not_there_is_noticed(place: str) -> None:
    (found,) = _PLACE.findall(f"`{place}`")
    assert not _has(*found)


def test_names_without_a_file_stand_in_the_file_before_them() -> None:
    for words in re.findall(r"^.*beside it.*$", ARCHITECTURE, re.MULTILINE):
        path = _PLACE.findall(words)[0][0]
        assert all(_has(path, name) for name in re.findall(r"`(\w+)`", words))


def test_the_run_directory_is_that_of_the_code() -> None:
    block = _section("The run directory").partition("```\n")[2].partition("```")[0]
    told = {line.split()[0].rstrip("/") for line in block.splitlines()}
    paths = RunPaths(Path("run"))
    places = {name: getattr(paths, name) for name in vars(RunPaths) if not name.startswith("_")}
    assert told == {place.name for place in places.values() if isinstance(place, Path) and place != paths.root}


def test_the_layers_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    (layers,) = [each["layers"] for each in contracts if each["name"] == "rooms are layers"]
    sentence = _section("The rooms").partition("**Layers**")[2].partition("\n- ")[0]
    assert re.findall(r"`([^`]+)`", sentence) == layers
