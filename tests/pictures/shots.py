"""What is pictured: each screen of the studio as a person meets it, reached by the keys that a person presses."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace

from studio.probe.setup import Answers
from studio.runs.recipe_file import load_recipe, shipped_recipes
from studio.tui.app import StudioApp
from studio.tui.services import Services
from tests.pictures.home import Home

CARD = "RTX 4090"
"""What is planned for: pictures must not depend on the machine that they are taken on."""
STRANGE = "strange.jsonl"
"""A file whose columns make no known row."""


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture.

    Attributes:
        name: What its files are called.
        screen: The class of the screen that it shows.
        words: What it shows, for those who cannot see it.
        steps: Keys, each with what stands on the screen once it was heeded; an empty key only waits. What stands behind
            `type:` is typed.
        recipe: The shipped recipe that the studio opens on.
        changes: Fields of it that are changed.
        run: The role of the run that the studio opens on; empty for none.
        setup: What the guided set-up was told on an earlier visit; None where the studio does not begin with it.
        live: Whether a training runs meanwhile.
        no_runs: Whether the list of runs is empty.
        busy: The run that is at work on the card; empty for none.
    """

    name: str
    screen: str
    words: str
    steps: tuple[tuple[str, str], ...] = ()
    recipe: str = "demo"
    changes: tuple[tuple[str, object], ...] = ()
    run: str = ""
    setup: Answers | None = None
    live: bool = False
    no_runs: bool = False
    busy: str = ""


LARGE = "llama-3.1-8b-qlora-24gb"
_ASKED = Answers(card=CARD)
_OVER = (("method", "lora"), ("train.seq_len", 8192), ("train.micro_batch", 4))
_TO_MODEL = ("enter", "Which model")
_TO_DATA = ("enter", "learn from")
_DONE = ("", "done")

SHOTS = (
    Shot(
        "run-live", "RunScreen", "A training under way: loss, memory, time left", (("", "Stop"),), run="live", live=True
    ),
    Shot(
        "run-stop", "Confirm", "Asking before a training is stopped", (("", "Stop"), ("x", "y")), run="live", live=True
    ),
    Shot(
        "runs",
        "RunsScreen",
        "All runs: what runs, what ended, what came of it",
        (("", "Stop"), ("escape", "Rank"), ("o", "docs-long")),
        live=True,
    ),
    Shot("setup-machine", "SetupScreen", "Set-up: what it will train on", (("", "1 Machine"),), setup=_ASKED),
    Shot(
        "setup-model", "SetupScreen", "Set-up: the model that is to learn", (_TO_MODEL, ("", "SmolLM2")), setup=_ASKED
    ),
    Shot(
        "setup-data",
        "SetupScreen",
        "Set-up: what it is to learn from",
        (_TO_MODEL, _TO_DATA, ("", "rows")),
        setup=_ASKED,
    ),
    Shot(
        "setup-recipe",
        "SetupScreen",
        "Set-up: the recipe that follows, with its reasons",
        (_TO_MODEL, _TO_DATA, ("enter", "What is it for"), ("enter", "and why"), ("", "Alpha")),
        setup=_ASKED,
    ),
    Shot(
        "setup-columns",
        "ColumnsScreen",
        "Set-up: which column holds the question, which the answer",
        (_TO_MODEL, _TO_DATA, ("", "frage"), ("enter", "antwort")),
        setup=Answers(card=CARD, data=STRANGE),
    ),
    Shot("configure", "ConfigureScreen", "Configuring an 8B model for a 24 GB card", (("", "GiB"),), LARGE),
    Shot(
        "configure-over",
        "ConfigureScreen",
        "A recipe that does not fit, and what would help",
        (("", "does not fit"),),
        LARGE,
        _OVER,
    ),
    Shot(
        "busy", "AskTurn", "Launching on a card where a run is at work", (("r", "busy"),), LARGE, busy="docs-20261128"
    ),
    Shot(
        "configure-memory", "ConfigureScreen", "Where the memory of a recipe goes", (("", "GiB"), ("v", "GiB")), LARGE
    ),
    Shot("fill", "FillScreen", "Filling the card", (("", "GiB"), ("F", "as many bits"), ("", "x1.")), LARGE),
    Shot("cards", "CardScreen", "Choosing a card to plan for", (("", "GiB"), ("g", "4090")), LARGE),
    Shot(
        "open",
        "OpenScreen",
        "Opening a recipe: files, runs and shipped ones",
        (("", "GiB"), ("O", "Open a recipe"), ("", "Rank 16")),
        LARGE,
    ),
    Shot("find", "FindScreen", "Finding a field by a word", (("", "GiB"), ("slash", ""), ("type:rate", "")), LARGE),
    Shot("save", "AskLine", "Saving a recipe", (("", "GiB"), ("s", "Save the recipe as")), LARGE),
    Shot("help", "HelpScreen", "The keys of a screen, explained", (("", "GiB"), ("question_mark", "Keys")), LARGE),
    Shot("palette", "CommandPalette", "The command palette", (("", "GiB"), ("ctrl+p", "Search")), LARGE),
    Shot(
        "data",
        "DataScreen",
        "Rows of the data token by token, and what is learnt of them",
        (("d", "Row"), ("", "<|im_start|>")),
    ),
    Shot("run", "RunScreen", "The demo's run: loss, held-out loss and memory", (_DONE,), run="done"),
    Shot("run-samples", "RunScreen", "Held-out answers before and after", (_DONE, ("2", "Samples")), run="done"),
    Shot("run-log", "RunScreen", "What a training told", (_DONE, ("3", "Log")), run="done"),
    Shot("run-memory", "RunScreen", "The predicted peak beside the measured one", (_DONE, ("5", "Memory")), run="done"),
    Shot("run-crashed", "RunScreen", "A run whose process was killed", (("", "crashed"),), run="crashed"),
    Shot("runs-empty", "RunsScreen", "The list of runs before the first one", (("o", "No runs"),), no_runs=True),
    Shot(
        "compare",
        "CompareScreen",
        "Two runs beside each other",
        (("o", "docs-lora"), ("end", ""), ("space", ""), ("up", ""), ("space", ""), ("c", "loss")),
    ),
    Shot(
        "merge",
        "MergeScreen",
        "Merging an adapter: what, into what, in which formats",
        (_DONE, ("m", "Merge into")),
        run="done",
    ),
    Shot(
        "merge-done",
        "MergeProgressScreen",
        "A merge that was verified",
        (("o", "Merges"), ("type:/merge-", ""), ("enter", ""), ("m", "Verified")),
    ),
    Shot("audit", "AuditScreen", "What 4 bits cost this adapter", (("a", "Audit"), ("", "held"))),
    Shot("audit-ask", "AskAudit", "Asking for an audit", (("o", "demo-"), ("end", ""), ("a", "Start"))),
    Shot("chat", "ChatScreen", "The tuned model and its base, side by side", (_DONE, ("t", "Ask")), run="done"),
)
PAGES = ("configure", "run", "runs", "open", "data")
"""The pictures that README and docs/ show: 120x40 and dark, in docs/pictures."""


def studio_for(shot: Shot, home: Home) -> StudioApp:
    """Return the studio as it is before the shot's first key; it keeps nothing for the next visit."""
    recipe = load_recipe(shipped_recipes()[shot.recipe])
    for path, value in (*shot.changes, ("name", "shell-helper" if shot.recipe == LARGE else recipe.name)):
        recipe = recipe.with_(path, value)
    services = Services()
    unkept: dict[str, Callable[..., object]] = {
        "recall_planned": lambda: CARD,
        "at_work": lambda _: [shot.busy] if shot.busy else [],
        "recall_answers": lambda: _answers(shot.setup, home),
        **{name: lambda *_: None for name in ("keep_planned", "keep_answers", "keep_theme", "keep_recipe")},
    }
    for name, call in unkept.items():
        setattr(services, name, call)
    root = home.folder / "no-runs" if shot.no_runs else home.runs
    watched = home.run(shot.run).root if shot.run else None
    return StudioApp(recipe, runs_root=root, open_run=watched, setup=shot.setup is not None, services=services)


def _answers(said: Answers | None, home: Home) -> Answers:
    if said is None or said.data != STRANGE:
        return said or Answers()
    file = home.folder / STRANGE
    rows = [{"frage": f"What does str.{name} do?", "antwort": help_of} for name, help_of in _METHODS]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), "utf-8")
    return replace(said, data=str(file))


_METHODS = [(name, str(getattr(str, name).__doc__).splitlines()[0]) for name in dir(str) if not name.startswith("_")]
