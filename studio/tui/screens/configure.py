"""The recipe under the user's hands, and its launch."""

from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Footer

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths
from studio.tui.asks import OpenRun, ShowRuns
from studio.tui.engine import Engine
from studio.tui.panels.advice import Advice
from studio.tui.panels.recipe_form import RecipeForm
from studio.tui.panels.top_bar import TopBar

_FIRST_FIELD = "adapter.rank"
_CHECKING = "Checking recipe, model and data, then starting ..."


class ConfigureScreen(Screen[None]):
    """Owns the one recipe; the form says what was turned, the checks say what is wrong."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "launch", "Run"),
        Binding("m", "turn_method", "LoRA/QLoRA"),
        Binding("o", "show_runs", "Runs"),
        Binding("q", "app.quit", "Quit"),
    ]

    DEFAULT_CSS = """
    ConfigureScreen {
        & #work { height: 1fr; layout: vertical; }
        & RecipeForm { height: 2fr; }
        & Advice { border-top: solid $foreground 20%; }
    }
    ConfigureScreen.-wide {
        & #work { layout: horizontal; }
        & RecipeForm { width: 3fr; height: 1fr; }
        & Advice { width: 2fr; border-top: none; border-left: solid $foreground 20%; }
    }
    """

    class Refused(Message):
        """The checks found why the recipe cannot run."""

        def __init__(self, reason: str) -> None:
            """Carry the reason, line by line."""
            super().__init__()
            self.reason = reason

    class Launched(Message):
        """A run was started."""

        def __init__(self, paths: RunPaths) -> None:
            """Carry the run."""
            super().__init__()
            self.paths = paths

    def __init__(self, recipe: Recipe, *, runs_root: Path, engine: Engine) -> None:
        """Open on a recipe."""
        super().__init__()
        self.recipe = recipe
        self._runs_root, self._engine = runs_root, engine
        self._launching = False

    def compose(self) -> ComposeResult:
        """Bar, form, advice, keys."""
        yield TopBar("Configure", card=self._engine.card)
        with Container(id="work"):
            yield RecipeForm(self.recipe)
            yield Advice()
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        """Show the recipe."""
        self._form.show(self.recipe)
        self._form.focus_field(_FIRST_FIELD)
        self._show_problems()

    def on_recipe_form_turned(self, message: RecipeForm.Turned) -> None:
        """A field has another value: so has the recipe."""
        self.recipe = self.recipe.with_(message.path, message.value)
        self._form.show_what_follows(self.recipe)
        self._show_problems()

    def on_recipe_form_reached(self, message: RecipeForm.Reached) -> None:
        """Explain the field."""
        self.query_one(Advice).show_field(message.path)

    def on_configure_screen_refused(self, message: Refused) -> None:
        """Say why nothing was started."""
        self._end_launch()
        self.query_one(Advice).show_problems(message.reason.splitlines())

    def on_configure_screen_launched(self, message: Launched) -> None:
        """Watch what was started."""
        self._end_launch()
        self._show_problems()
        self.post_message(OpenRun(message.paths))

    def action_turn_method(self) -> None:
        """Switch between LoRA and QLoRA."""
        self._form.turn_method()

    def action_show_runs(self) -> None:
        """Show the list of runs."""
        self.post_message(ShowRuns())

    def action_launch(self) -> None:
        """Check everything and start the run; with problems, list them and start nothing."""
        if self._launching or self._show_problems():
            return
        self._launching = True
        self.query_one(Advice).show_busy(_CHECKING)
        self._launch(self.recipe)

    @work(thread=True)
    def _launch(self, recipe: Recipe) -> None:
        try:
            paths = self._engine.start(recipe, self._runs_root)
        except StudioError as error:
            self.post_message(self.Refused(str(error)))
        else:
            self.post_message(self.Launched(paths))

    def _end_launch(self) -> None:
        self._launching = False
        self.query_one(Advice).show_busy("")

    def _show_problems(self) -> bool:
        """List what is wrong with the recipe and return whether anything is."""
        problems = [str(problem) for problem in self.recipe.problems()]
        self.query_one(Advice).show_problems(problems)
        return bool(problems)

    @property
    def _form(self) -> RecipeForm:
        return self.query_one(RecipeForm)
