"""What a run of the checks leaves: a file for machines and a Markdown section for `results.md`.

Several runs may fill one pair of files, so that the whole can be taken in parts: a check that runs again replaces what
it said before. Results of another machine, card or software are not mixed in: the older pair is set aside by its date.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu.runner import FAILED, NOT_RUN, OK, SKIP, Result

SCHEMA = 1
_SAME = ("device", "card", "versions", "driver")


@dataclass(slots=True)
class Report:
    """All results so far of one machine.

    Attributes:
        machine: What they were seen on: device, card, versions, driver.
        date: Of the first of them.
        results: By the name of the check.
    """

    machine: dict[str, Any]
    date: str
    results: dict[str, Result] = field(default_factory=dict)

    def add(self, result: Result) -> None:
        """Keep a result; one that was not run replaces nothing."""
        if result.outcome != NOT_RUN or result.name not in self.results:
            self.results[result.name] = result

    def ordered(self, names: Sequence[str]) -> list[Result]:
        """Return the results of some names, in their order; a check that is no longer in the list has none."""
        return [self.results[name] for name in names if name in self.results]

    def save(self, folder: Path, names: Sequence[str]) -> tuple[Path, Path]:
        """Write both files and return them."""
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"results-{self.machine['device']}"
        machine, section = stem.with_suffix(".json"), stem.with_suffix(".md")
        ordered = self.ordered(names)
        table = {
            "schema": SCHEMA,
            "date": self.date,
            "machine": self.machine,
            "missing": [name for name in names if name not in self.results],
            "checks": [result.as_json() for result in ordered],
        }
        machine.write_text(json.dumps(table, indent=1, default=str) + "\n", "utf-8")
        section.write_text(self.section(names), "utf-8")
        return machine, section

    def section(self, names: Sequence[str]) -> str:
        """Return the Markdown section: heading, versions, one table of all checks, and what each printed besides."""
        machine = self.machine
        ordered = self.ordered(names)
        missing = [name for name in names if name not in self.results]
        title = machine["card"] if machine["device"] != "cpu" else "Rehearsal on a CPU: nothing here was seen on a card"
        lines = [
            f"## {self.date}, {title}",
            "",
            f"Driver {machine.get('driver') or '-'}; " + ", ".join(f"{n} {v}" for n, v in machine["versions"].items()),
            "",
            f"{summary(ordered)}{f'; {len(missing)} not yet run' if missing else ''}.",
            "",
            "| part | check | result | s | what was seen |",
            "|---|---|---|---|---|",
            *(
                f"| {one.part} | {_cell(one.name)} | {one.outcome} | {one.seconds:.0f} | {_cell(_told(one))} |"
                for one in ordered
            ),
            "",
        ]
        for result in ordered:
            body = (*result.lines, *(f"printed: {line}" for line in result.output))
            if body:
                lines += [f"**{_cell(result.name)}**", "", "```", *body, "```", ""]
        return "\n".join(lines)


def open_report(folder: Path, machine: dict[str, Any]) -> Report:
    """Return the report of a machine in a folder, with what is in it already; one of another machine is set aside."""
    path = folder / f"results-{machine['device']}.json"
    today = time.strftime("%Y-%m-%d")
    try:
        table = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return Report(machine, today)
    same = table.get("schema") == SCHEMA and all(table["machine"].get(key) == machine.get(key) for key in _SAME)
    if same:
        kept = {one["name"]: Result.read(one) for one in table["checks"]}
        return Report(machine, table["date"], kept)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for old in (path, path.with_suffix(".md")):
        if old.exists():
            old.rename(old.with_name(f"{old.stem}-until-{stamp}{old.suffix}"))
    return Report(machine, today)


def summary(results: Iterable[Result]) -> str:
    """Return how many checks came out how."""
    outcomes = [result.outcome for result in results]
    return ", ".join(f"{outcomes.count(word)} {word}" for word in (OK, FAILED, SKIP, NOT_RUN) if word in outcomes)


def line_of(result: Result) -> str:
    """Return what the terminal shows of a result."""
    head = f"{result.outcome:8}{result.name}: {result.said}  [{result.seconds:.1f} s]"
    more = [f"        {line}" for line in result.lines]
    more += [f"        not as before: {line}" for line in result.changed]
    more += [f"        printed: {line}" for line in result.output]
    return "\n".join([head, *more])


def _told(result: Result) -> str:
    return "; ".join((result.said, *(f"not as before: {line}" for line in result.changed)))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
