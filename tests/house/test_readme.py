"""README and docs/ say what the program does: their links lead somewhere, and what they show is what it prints."""

import argparse
import json
import re
import shlex
from pathlib import Path

import pytest

from studio.cli import VERBS, whole_parser
from studio.commands.recipes import field_reference, field_rows
from studio.core.recipe import FIELDS
from tests.cli.conftest import Cli, cli, home  # noqa: F401  fixtures
from tests.house.reference import RECORDED, REFERENCE, pages, recorded

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^```\n(.*?)^```", re.MULTILINE | re.DOTALL)
_MOST_LINES = 130
"""Two pages: what a first visitor reads before trying."""


def _links(page: Path) -> list[str]:
    return [link for link in _LINK.findall(page.read_text("utf-8")) if "://" not in link]


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _leads(page: Path, link: str) -> bool:
    place, _, anchor = link.partition("#")
    target = (page.parent / place).resolve() if place else page
    return target.is_relative_to(ROOT) and target.is_file() and (not anchor or anchor in _anchors(target))


def _shown() -> list[tuple[str, str, list[str]]]:
    """Return each command whose output a page shows, with the lines that are shown of it; `...` stands for others."""
    found = []
    for page in PAGES:
        for block in _BLOCK.findall(page.read_text("utf-8")):
            for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
                command, *lines = part.splitlines()
                if command.startswith(("lora-studio plan", "lora-studio fit")):
                    found.append((page.name, command, [line for line in lines if line not in ("", "...")]))
    return found


def _commands() -> list[tuple[str, str]]:
    """Return each command of ours that a page names, in a block or within a sentence."""
    said = re.compile(r"(?:^(?:\$ )?|`)(?:\.venv/bin/)?lora-studio +([a-z][^`\n]*)", re.MULTILINE)
    return sorted({(page.name, words) for page in PAGES for words in said.findall(page.read_text("utf-8"))})


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Return the options of a parser and of all below it."""
    found = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(_options, action.choices.values()))
    return found


def _unknown(command: str) -> list[str]:
    """Return the verb and the options of a command that the program does not know."""
    (verbs,) = (each for each in whole_parser()._actions if isinstance(each, argparse._SubParsersAction))
    verb, *words = re.split(r"\s{2,}", command)[0].split()
    if verb not in verbs.choices:
        return [verb]
    named = re.findall(r"(?<!\S)\[?(--[a-z][\w-]*)", " ".join(words))
    return [option for option in named if option not in _options(verbs.choices[verb])]


def test_the_readme_has_two_pages() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= _MOST_LINES


@pytest.mark.parametrize(("page", "link"), [(page, link) for page in PAGES for link in _links(page)])
def test_every_link_leads_somewhere(page: Path, link: str) -> None:
    assert _leads(page, link), f"{page.relative_to(ROOT)} links to {link}, which is not there"


@pytest.mark.parametrize("link", ["docs/gone.md", "../README.md", "docs/data.md#gone", "#gone"])
def test_a_link_that_leads_nowhere_is_noticed(link: str) -> None:
    assert not _leads(ROOT / "README.md", link)


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in _links(ROOT / "README.md")}
    assert set(PAGES) - linked == {ROOT / "README.md"}


def test_commands_are_read() -> None:
    assert len(_commands()) > 60


@pytest.mark.parametrize(("page", "command"), _commands())
def test_every_command_of_a_page_is_known(page: str, command: str) -> None:
    assert _unknown(command) == [], f"{page} names lora-studio {command}"


@pytest.mark.parametrize("command", ["brew RUN", "plan RECIPE --card 4090", "merge RUN [--into DIR]"])
def test_a_command_that_is_not_known_is_noticed(command: str) -> None:
    assert len(_unknown(command)) == 1


def test_plans_are_shown() -> None:
    assert {page for page, *_ in _shown()} >= {"README.md", "plan.md"}


@pytest.mark.parametrize(("page", "command", "lines"), _shown())
def test_what_a_page_shows_is_printed(cli: Cli, page: str, command: str, lines: list[str]) -> None:  # noqa: F811
    printed = cli(*shlex.split(command)[1:]).out.splitlines()
    assert len(lines) > 3
    assert [line for line in lines if line not in printed] == [], f"{page} is behind"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    """The pages of docs/reference/, made anew."""
    return pages()


@pytest.mark.parametrize("name", sorted(path.name for path in REFERENCE.iterdir()))
def test_the_reference_is_current(made: dict[str, str], name: str) -> None:
    assert made.get(name) == (REFERENCE / name).read_text("utf-8"), f"docs/reference/{name} is behind: make docs"


@pytest.mark.slow
def test_the_recorded_documents_are_those_that_jobs_print() -> None:
    assert recorded() == json.loads(RECORDED.read_text("utf-8")), "python -m tests.house.reference --record"


def test_every_verb_with_json_has_its_documents_told(made: dict[str, str]) -> None:
    told = set(re.findall(r"^## (.*)$", made["json.md"], re.MULTILINE))
    assert told >= {"audit base", "audit run", "measure", "chat", "setup", "gpus", "models", "data show"}


def test_every_page_of_the_reference_is_there(made: dict[str, str]) -> None:
    assert sorted(made) == sorted(path.name for path in REFERENCE.iterdir())


def test_the_field_reference_is_that_of_the_program() -> None:
    assert field_reference() in (REFERENCE / "fields.md").read_text("utf-8")


def test_every_field_is_in_it_once() -> None:
    assert sorted(row["path"] for row in field_rows()) == sorted(FIELDS)


def test_every_verb_is_in_the_reference() -> None:
    told = re.findall(r"^## lora-studio (\S+)$", (REFERENCE / "verbs.md").read_text("utf-8"), re.MULTILINE)
    assert told == list(VERBS)
