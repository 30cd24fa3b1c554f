"""Asks what an audit is to measure before it is started, and makes the audit that the choices mean."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.widgets import Button, Input, Static

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.audit import audit_fields, audit_of_run, data_path
from studio.probe.data import Reading
from studio.probe.data.places import full_word
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.tui.screens.dialogs import Dialog
from widgets.key_footer import KeyFooter
from widgets.text_field import TextLine

_DEFAULT = AuditRequest("base")
_EMPTY_MEANS = {"answers": "0", "speed": "0"}
"""What an emptied line means, by field: no answers, and no speed."""
_ANSWERS = "6"
"""Prompts answered unless something else is typed: enough to read, too few to prove much."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One choice.

    Attributes:
        key: A field of the request, or `steps`.
        label: What can be chosen.
        value: What is taken unless something else is typed.
        hint: What an empty line means, shown while it is empty.
    """

    key: str
    label: str
    value: str = ""
    hint: str = ""


def base_wishes() -> tuple[Wish, ...]:
    """Return what can be chosen of an audit of a base."""
    return (
        Wish("rows", "Rows, at most", str(_DEFAULT.rows)),
        Wish("forms", "Roundings", ",".join(_DEFAULT.forms)),
        Wish("kept", "Plans that keep the N worst blocks", ",".join(map(str, _DEFAULT.kept)), "none"),
    )


def run_wishes() -> tuple[Wish, ...]:
    """Return what can be chosen of an audit of a run's adapter."""
    there = find_spec("lm_eval") is not None
    return (
        Wish("rows", "Held-out rows, at most", "", "all that the run held out"),
        Wish("answers", "Prompts answered side by side", _ANSWERS, "none"),
        Wish("check_regex", "Pattern of a good answer", "", "a regular expression; not needed"),
        Wish("speed", "Measure tokens/s (1 yes, 0 no)", "1", "0"),
        Wish("gguf", "A GGUF file to measure too", "", "a path; exports are found without"),
        Wish("lm_eval", "Tasks of lm-eval", "", "names; not needed" if there else "not installed: pip install lm-eval"),
    )


def race_wishes(recipe: Recipe) -> tuple[Wish, ...]:
    """Return what can be chosen of a race of a recipe."""
    steps = str(recipe.train.steps) if recipe.train.steps else ""
    return (
        Wish("steps", "Optimizer steps of each lane", steps, "to the end of the recipe's epochs"),
        Wish("lanes", "Lanes", ",".join(_DEFAULT.lanes), "also qlora+loftq, qlora+mixed"),
    )


def base_request(recipe: Recipe, said: Mapping[str, str]) -> AuditRequest:
    """Return the audit of a recipe's base.

    Raises:
        BadInput: The shipped data are missing from this installation, or a choice is not what its field wants.
    """
    return AuditRequest(
        "base",
        model=recipe.model.base,
        revision=recipe.model.revision,
        data=data_path(full_word(recipe.data.words[0], Reading.of(recipe))),
        format=recipe.data.format,
        **{"seed": recipe.train.seed, "seq_len": recipe.train.seq_len, **audit_fields(said)},
    )


def run_request(paths: RunPaths, said: Mapping[str, str]) -> AuditRequest:
    """Return the audit of a run's adapter.

    Raises:
        BadInput: It is no training run, has no adapter, no record of its held-out rows, or a choice is not what its
            field wants.
    """
    # An empty line of rows means all rows that the run held out, which is what `audit_of_run` takes by itself.
    words = {key: value or _EMPTY_MEANS.get(key, "") for key, value in said.items() if value or key != "rows"}
    gguf = words.pop("gguf", "")
    places = (str(Path(gguf).expanduser().absolute()),) if gguf else ()
    return audit_of_run(paths, **audit_fields(words), gguf=places)


def race_request(recipe: Recipe, said: Mapping[str, str]) -> AuditRequest:
    """Return the race of a recipe.

    Raises:
        BadInput: The steps are no number.
    """
    steps = said.get("steps") or "0"
    if not (steps.isascii() and steps.isdigit() and int(steps[:12]) <= 10**7):
        raise BadInput(f"steps: found {plain(steps, one_line=True, limit=40)}; wanted a whole number.")
    recipe = recipe.with_("train.steps", int(steps))
    lanes = audit_fields({"lanes": said["lanes"]}) if said.get("lanes") else {}
    return AuditRequest("race", model=recipe.model.base, revision=recipe.model.revision, recipe=recipe, **lanes)


class AskAudit(Dialog[dict[str, str]]):
    """Closes with what was chosen, by field, or with None; r starts, the arrows go from line to line."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "start", "Start"),
        Binding("up", "app.focus_previous", show=False),
        Binding("down", "app.focus_next", show=False),
    ]

    DEFAULT_CSS = """
    AskAudit {
        & > Vertical { width: 76; }
        & .wish { height: 1; }
        & .wish Static { width: 36; }
        & .wish TextLine { width: 1fr; }
        & #audit-refused { color: $text-error; }
        & #audit-keys { height: 1; margin-top: 1; }
        & Button { margin-right: 2; }
    }
    """

    def __init__(self, title: str, wishes: Sequence[Wish], said: Mapping[str, str], *, refused: str = "") -> None:
        """Ask.

        Args:
            title: What is going to be measured.
            wishes: The choices.
            said: What was chosen the last time.
            refused: What was wrong with that.
        """
        super().__init__()
        self._title, self._wishes, self._said, self._refused = title, wishes, said, refused

    def compose(self) -> ComposeResult:
        """Make the parts: title, a line for each choice, what starts it."""
        with Vertical():
            yield Static(Content(plain(self._title, one_line=True)), markup=False)
            yield Static("")
            for wish in self._wishes:
                with Horizontal(classes="wish"):
                    yield Static(wish.label, markup=False)
                    value = self._said.get(wish.key, wish.value)
                    yield TextLine(value, placeholder=wish.hint, id=f"wish-{wish.key}")
            if self._refused:
                yield Static(Content(plain(self._refused)), id="audit-refused", markup=False)
            with Horizontal(id="audit-keys"):
                yield Button("Start (r)", variant="primary", compact=True, id="audit-start")
                yield Button("Back (escape)", compact=True, id="audit-back")
            yield KeyFooter()

    def on_mount(self) -> None:
        """Put the cursor on the start, so that enter takes everything as it is; after a refusal, on the first line."""
        self.query_one("#audit-start").focus()
        if self._refused:
            self.query(TextLine).first().focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """A line is done: go on to the next, and from the last to the start."""
        event.stop()
        self.screen.focus_next()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Start, or go back."""
        event.stop()
        if event.button.id == "audit-start":
            self.action_start()
        else:
            self.action_leave()

    def action_start(self) -> None:
        """Close with the choices."""
        self.dismiss({wish.key: self.query_one(f"#wish-{wish.key}", TextLine).value.strip() for wish in self._wishes})
