"""Makes the pages of docs/reference/ from the code: `make docs`, or `python -m tests.house.reference`.

Fields come from their declarations, verbs from the parser, the run folder and its events from the docstrings of the
code that names them, and the JSON documents from documents that the verbs print here. Verbs that load a model take a
minute: the keys of what they print are kept in tests/data/json_keys.json. `python -m tests.house.reference --record`
has them printed anew, and a slow test compares.
"""

import argparse
import dataclasses
import inspect
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from studio.cli import main, whole_parser
from studio.commands.recipes import field_reference, field_rows
from studio.core.events import KINDS, Evaluated, Finished, Planned, Saved, Started, StepDone
from studio.probe.cards import Card, CardProcess
from studio.probe.device import Sight
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import load_recipe, shipped_recipes
from tests.fakes.runs import make_run, write_log

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"
RECORDED = ROOT / "tests" / "data" / "json_keys.json"
_NOTE = "<!-- made by `make docs`: edit the code, not this page -->"
_TYPES = {bool: "true or false", int: "integer", float: "number", str: "text", type(None): "null"}
_TOLD = {
    "recipe": "object: a recipe, [its fields](fields.md) by section",
    "changes[].settings": "object: fields of the recipe by path",
    "next[].settings": "object: fields of the recipe by path",
    "plan": "object: as `plan --json` prints it",
    "counts": "object: kinds of findings, and how many there are",
    "files": "object: names of files, and their bytes",
    "left_out": "object: reasons, and how many rows are left out for them",
    "choices[].settings": "object: fields of the recipe by path",
    "machine": "object: as `doctor --json` prints it",
    "estimate": "object: as `plan --json` prints it",
    "report.blocks[].drift": "object: forms, and the drift of each",
    "report.blocks[].weight_error": "object: forms, and the error of each",
    "report.proposals[].precision": "object: parts of the model, and the bits of each",
    "report.answers.rows[].answers": "object: forms, each with text, tokens, stopped and scores",
    "report.answers.checks[].scores": "object: forms, each with mean and more, both with value, low and high",
}
"""Objects whose keys differ from case to case, or stand elsewhere already."""
_OF_THE_MACHINE = ("machine", "torch", "calibration")
"""Parts of what `doctor` prints whose keys follow from the machine on which this is made."""
_FIELDS = """`lora-studio recipes --fields` prints these tables; `?` in the studio shows the same words. A flag stands
beside the fields that have one; every field can be set for one run with `--set FIELD=VALUE`. How a recipe is written:
[a recipe](../recipe.md)."""
_FOLDER = """Every training, measurement, audit, merge and export is a run with a folder of its own. Each file has one
writer; it appears whole, or it only ever grows. Only what a run needed is there."""
_EVENTS = """One event a line. Each has `schema`, `kind` and `at`, unix seconds. A field that is null is left out; a
number that is none (NaN, infinity) is null, with `<field>_nonfinite` beside it. A reader passes over kinds that it does
not know."""
_JSON = """What verbs print with `--json`, key by key, as found in documents that were printed to make this page.
`[]` is each entry of a list. Where only null is told, nothing was known in these cases; in others there is a value.
Keys are added in later versions; none is taken away.

`train`, `merge` and `export` print the summary of their run: what `runs show` prints, without `recipe`, `evals`,
`samples` and `files`. `doctor` also prints `machine`, `torch` and `calibration`. The events of a run are told by
[its folder](run-folder.md)."""
_SHIPPED = "llama-3.1-8b-lora-24gb"


def pages() -> dict[str, str]:
    """Return the text of each page by its file's name."""
    made = {
        "fields.md": _fields(),
        "verbs.md": _verbs(whole_parser()),
        "run-folder.md": _run_folder(),
        "json.md": _documents(),
    }
    return {name: re.sub(r"\n{3,}", "\n\n", text).rstrip() + "\n" for name, text in made.items()}


def _fields() -> str:
    return "\n\n".join(["# Every field of a recipe", _NOTE, _FIELDS, field_reference()])


def _verbs(parser: argparse.ArgumentParser) -> str:
    lines = [
        "# Every verb",
        _NOTE,
        "Without a verb, the studio opens. `--json` prints one document on stdout "
        "([its keys](json.md)), everything else goes to stderr. Exit codes: [without a screen](../scripts.md).",
        _arguments(parser),
    ]
    for words, one, verb in _each_verb(parser, "lora-studio"):
        lines += [
            f"{'#' * min(3, len(words.split()))} {words}",
            _sentence(one),
            _plain(verb.description or ""),
            f"```\n{_usage(words, verb)}\n```",
            _arguments(verb),
        ]
    return "\n\n".join(lines)


def _each_verb(parser: argparse.ArgumentParser, words: str) -> Iterator[tuple[str, str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for verb, child in action.choices.items():
                yield f"{words} {verb}", helps.get(verb, ""), child
                yield from _each_verb(child, f"{words} {verb}")


def _usage(words: str, parser: argparse.ArgumentParser) -> str:
    """Return a usage line of our own: Python's versions write theirs differently."""
    verbs = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if verbs:
        return f"{words} {' | '.join(verbs[0].choices)}"
    needed = [f"{a.option_strings[0]} {_value(a)}" for a in parser._actions if a.option_strings and a.required]
    places = [a for a in parser._actions if not a.option_strings]
    put = [f"[{_value(a)}]" if a.nargs in ("?", "*") else _value(a) for a in places]
    return " ".join([words, *put, *needed, "[options]"])


def _arguments(parser: argparse.ArgumentParser) -> str:
    """Return a table of a parser's arguments; those that only set a recipe's field stand in one line."""
    flags = {f"--{row['flag']}": row["help"] for row in field_rows() if row["flag"]}
    rows, fields = [], []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction | argparse._HelpAction):
            continue
        told = _help(parser, action)
        if action.option_strings and told.startswith(flags.get(action.option_strings[0], "\n")):
            fields.append(f"`{action.option_strings[0]}`")
            continue
        names = [f"{name} {_value(action)}".rstrip() for name in action.option_strings] or [_value(action)]
        rows.append(f"| {', '.join(f'`{_cell(name)}`' for name in names)} | {_cell(told)} |")
    if fields:
        rows.append(f"| {' '.join(fields)} | set [fields of the recipe](fields.md) |")
    return "\n".join(["| argument | |", "|---|---|", *rows]) if rows else ""


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return _plain(parser._get_formatter()._expand_help(action)) if action.help else ""


def _value(action: argparse.Action) -> str:
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return ""
    if isinstance(action.metavar, str):
        return action.metavar
    return "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()


def _run_folder() -> str:
    paths = RunPaths(Path("run"))
    places = [
        (place, inspect.getdoc(what))
        for name, what in vars(RunPaths).items()
        if isinstance(what, property) and isinstance(place := getattr(paths, name), Path) and place != paths.root
    ]
    lines = [
        "# The folder of a run",
        _NOTE,
        _FOLDER,
        "\n".join(
            [
                "| place | |",
                "|---|---|",
                *(f"| `{place.name}` | {_cell(_plain(text or ''))} |" for place, text in places),
            ]
        ),
        "## events.jsonl",
        _EVENTS,
    ]
    for kind, event in KINDS.items():
        told = [field for field in dataclasses.fields(event) if field.name != "at"]
        rows = [f"| `{field.name}` | {_type(field)} | {'always' if _needed(field) else ''} |" for field in told]
        lines += [
            f"### {kind}",
            inspect.getdoc(event) or "",
            "\n".join(["| field | type | there |", "|---|---|---|", *rows]),
        ]
    return "\n\n".join(lines)


def _type(field: "dataclasses.Field[Any]") -> str:
    """Return a field's type in the words of JSON; that it may be null is told above the tables."""
    name = field.type if isinstance(field.type, str) else getattr(field.type, "__name__", "")
    name = str(field.type) if "[" in str(field.type) or "|" in str(field.type) else name
    first = name.replace(" | None", "").partition("[")[0]
    return {
        "str": "text",
        "int": "integer",
        "float": "number",
        "bool": "true or false",
        "dict": "object",
        "list": "list",
    }[first]


def _needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _documents() -> str:
    """Return the keys of the documents that verbs print for a small case each."""
    lines = [
        "# JSON documents",
        _NOTE,
        _JSON,
    ]
    found = _found(_printed) | json.loads(RECORDED.read_text("utf-8"))
    for title in sorted(found):
        lines += [f"## {title}", f"`lora-studio {found[title]['command']}`", _key_table(found[title]["keys"])]
    return "\n\n".join(lines)


def recorded() -> dict[str, dict[str, Any]]:
    """Return by title the command and the keys of the documents that take a model, as real jobs print them now."""
    return _found(_printed_by_jobs)


def _found(printed: Callable[[Path], Iterator[tuple[str, list[list[str]]]]]) -> dict[str, dict[str, Any]]:
    """Print documents in a folder of their own; return by title the command, and each key with its kinds of value."""
    made: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        settings = {"LORA_STUDIO_HOME": name, "HF_HUB_OFFLINE": "1", "HF_HOME": f"{name}/hub", "COLUMNS": "80"}
        with patch.dict(os.environ, settings), chdir(name):
            for title, words in printed(Path(name)):
                kinds: dict[str, set[str]] = {}
                for each in words:
                    for key, kind in _keys(_print(each)):
                        if not (title == "doctor" and key.startswith(_OF_THE_MACHINE)):
                            kinds.setdefault(key, set()).add(kind)
                shown = re.sub(r"-\d{8}-\d{6}", "-DATE", shlex.join(words[0]).replace(f"{name}/", ""))
                keys = {key: sorted(kind, key=lambda one: (one == "null", one)) for key, kind in kinds.items()}
                made[title] = {"command": shown, "keys": keys}
    return made


def _printed_by_jobs(folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield what jobs print of a tiny model, in the form of `_printed`."""
    from tests.fakes.tiny_model import make_tiny_model

    make_tiny_model(folder / "tiny")
    rows = [{"prompt": f"what is {n}", "completion": f"{n} is {n}"} for n in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    of_tiny = ["--model", "tiny", "--data", "rows.jsonl", "--seq", "64"]
    yield "data show", [["data", "show", "rows.jsonl", "--model", "tiny", "--row", "1", "--json"]]
    yield "measure", [["measure", *of_tiny, "--gpu", "RTX 4090", "--json"]]
    yield "audit base", [["audit", "base", *of_tiny, "--rows", "16", "--keep", "1", "--json"]]
    sets = ("train.learning_rate=1e-3", "eval.rows=16", "eval.samples=0", "adapter.rank=4", "device.device=cpu")
    words = ["train", "demo", *of_tiny, "--steps", "2", *(word for one in sets for word in ("--set", one)), "--json"]
    run = _print(words)["run"]
    yield "chat", [["chat", run, "--prompt", "what is 1", "--max-tokens", "4", "--json"]]
    yield "audit run", [["audit", "run", run, "--answers", "2", "--answer-tokens", "4", "--json"]]


def _printed(folder: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Yield what is printed: a title, and commands whose documents have the same form."""
    good, bad = folder / "rows.jsonl", folder / "bad.jsonl"
    good.write_text('{"prompt": "list files by size", "completion": "ls -lS"}\n' * 3)
    bad.write_text('{"prompt": "list files by size", "completion": "ls -lS"}\n{"prompt": 3}\n')
    model = folder / "model"
    model.mkdir()
    known = json.loads((ROOT / "studio" / "probe" / "known_models.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(known[load_recipe(shipped_recipes()[_SHIPPED]).model.base]["config"]))
    run = make_run(folder, "try", now=1.0)
    write_log(
        run,
        Started(at=1.0, job="train", method="qlora", model="embedded"),
        Planned(
            at=2.0, total_steps=1, trainable_parameters=8, rows=2, held_out_rows=1, device="cpu", dtype="bf16",
            loss_path="chunked",
        ),
        StepDone(at=3.0, step=1, loss=2.0, learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=1.0, loss_tokens=4),
        Evaluated(
            at=4.0, step=1, loss=1.5, loss_tokens=4, rows=1, seconds=0.5, gain={"gain": -0.1, "low": -0.2, "high": 0.1}
        ),
        Saved(at=5.0, what="adapter", path="adapter", step=1, size_bytes=32),
        Finished(at=6.0, outcome="done", step=1, seconds=5.0),
    )  # fmt: skip
    card = Card(
        0, "NVIDIA GeForce RTX 4090", "GPU-0", 24 * 2**30, 2**30, 23 * 2**30, (8, 9), 3, 47, 61.5,
        processes=(CardProcess(7, "python", 2**30),), mig=False, pci="00000000:01:00.0",
    )  # fmt: skip
    plan = ["plan", _SHIPPED, "--gpu", "RTX 4090", "--json"]
    yield "plan", [plan, ["plan", _SHIPPED, "--method", "qlora", "--vram-gib", "8", "--json"], [*plan, "--trade"]]
    yield "fit", [["fit", _SHIPPED, "--gpu", "RTX 4070", "--json"], ["fit", _SHIPPED, "--vram-gib", "1", "--json"]]
    yield "data check", [["data", "check", str(good), "--json"], ["data", "check", str(bad), "--json"]]
    yield "setup", [["setup", "--model", str(model), "--data", str(good), "--gpu", "RTX 4090", "--json"]]
    with patch("studio.commands.gpus.look", lambda: Sight([card])):
        yield "gpus", [["gpus", "--json"]]
    yield "models", [["models", "--json"]]
    yield "models check", [["models", "check", str(model), "--json"]]
    theirs = folder / "theirs.yml"
    theirs.write_text("base_model: owner/model\nadapter: lora\ndatasets: [{path: rows.jsonl}]\nlogging_steps: 1\n")
    yield "import", [["import", str(theirs), "--json"], ["import", str(theirs), "--out", "mine.toml", "--json"]]
    yield "recipes", [["recipes", "--json"]]
    yield "recipes --fields", [["recipes", "--fields", "--json"]]
    (folder / "cache" / "tools").mkdir(parents=True)
    (folder / "cache" / "tools" / "file").write_text("x")
    yield "clean", [["clean", "--json"]]
    yield "doctor", [["doctor", "--json"]]
    yield "runs list", [["runs", "list", "--json"]]
    yield "runs show", [["runs", "show", run.name, "--json"]]


def _print(words: list[str]) -> Any:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        main(words)
    assert out.getvalue(), f"lora-studio {shlex.join(words)} printed no document: {err.getvalue()}"
    return json.loads(out.getvalue())


def _keys(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield each key of a document with its kind of value."""
    if path in _TOLD and isinstance(value, Mapping):
        yield path, _TOLD[path]
    elif isinstance(value, Mapping):
        if not value:
            yield path, "object"
        for key, inner in value.items():
            yield from _keys(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        if not value:
            yield path, "list"
        for inner in value:
            yield from _keys(inner, f"{path}[]")
    else:
        yield path, _TYPES[type(value)]


def _key_table(found: Mapping[str, Sequence[str]]) -> str:
    """Return the table; an empty list or object whose entries another document has is told by these."""
    rows = []
    for key, kinds in found.items():
        inner = any(other.startswith((f"{key}[]", f"{key}.")) for other in found)
        if inner and set(kinds) <= {"list", "object"}:
            continue
        rows.append(f"| `{key}` | {'null where not known' if inner else ' or '.join(kinds)} |")
    return "\n".join(["| key | value |", "|---|---|", *rows])


def _plain(text: str) -> str:
    return " ".join(text.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".") if text else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;") if "`" not in text else text.replace("|", "\\|")


if __name__ == "__main__":
    if sys.argv[1:] == ["--record"]:
        RECORDED.write_text(json.dumps(recorded(), indent=1) + "\n", "utf-8")
    REFERENCE.mkdir(exist_ok=True)
    for page, words in pages().items():
        (REFERENCE / page).write_text(words, "utf-8")
