"""From the recipe on the screen to a running job: check it, ask where it would not fit, start it."""

from pathlib import Path

from textual import work
from textual.content import Content
from textual.message import Message
from textual.screen import Screen

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths
from studio.tui.asks import OpenRun
from studio.tui.engine import Engine
from studio.tui.fixes import fix_that_fits
from studio.tui.panels.field_help import FieldHelp
from studio.tui.panels.forecast import Forecast
from studio.tui.panels.forecast_text import cpu_text, over_budget_text
from studio.tui.screens.confirm import Confirm

_CHECKING = "Checking recipe, model and data, then starting ..."


class LaunchScreen(Screen[None]):
    """A screen that owns a recipe, shows a forecast and advice, and can launch it."""

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

    class OverBudget(Message):
        """The recipe does not fit this machine's card."""

        def __init__(self, recipe: Recipe, question: Content) -> None:
            """Carry the recipe and the question to ask."""
            super().__init__()
            self.recipe = recipe
            self.question = question

    def __init__(self, recipe: Recipe, *, runs_root: Path, engine: Engine) -> None:
        """Launch into a folder of runs."""
        super().__init__()
        self.recipe = recipe
        self._runs_root, self._engine = runs_root, engine
        self._launching = False

    def on_launch_screen_refused(self, message: Refused) -> None:
        """Say why nothing was started."""
        self._end_launch()
        self.query_one(FieldHelp).show_problems(message.reason.splitlines())

    def on_launch_screen_launched(self, message: Launched) -> None:
        """Watch what was started."""
        self._end_launch()
        self._show_problems()
        self.post_message(OpenRun(message.paths))

    def on_launch_screen_over_budget(self, message: OverBudget) -> None:
        """Ask once more."""
        self._end_launch()

        def decide(answer: bool | None) -> None:
            if answer and message.recipe is self.recipe:
                self._begin_launch(sure=True)

        self.app.push_screen(Confirm(message.question, "launch it"), decide)

    def action_launch(self) -> None:
        """Check everything and start the run; with problems, list them and start nothing."""
        if not self._launching and not self._show_problems():
            self._begin_launch(sure=False)

    def _begin_launch(self, *, sure: bool) -> None:
        self._launching = True
        self.query_one(FieldHelp).show_busy(_CHECKING)
        self._launch(self.recipe, sure, self.query_one(Forecast).planned)

    @work(thread=True)
    def _launch(self, recipe: Recipe, sure: bool, planned: str) -> None:

        try:
            question = None if sure else question_before_launch(recipe, self._engine, planned)
            if question is not None:
                self.post_message(self.OverBudget(recipe, question))
                return
            paths = self._engine.start(recipe, self._runs_root)
        except StudioError as error:
            self.post_message(self.Refused(str(error)))
        else:
            self.post_message(self.Launched(paths))

    def _end_launch(self) -> None:
        self._launching = False
        self.query_one(FieldHelp).show_busy("")

    def _show_problems(self) -> bool:
        """List what is wrong with the recipe and return whether anything is."""
        problems = [str(problem) for problem in self.recipe.problems()]
        self.query_one(FieldHelp).show_problems(problems)
        return bool(problems)


def question_before_launch(recipe: Recipe, engine: Engine, planned: str = "") -> Content | None:
    """Return the question to ask when a recipe is expected not to fit; None where it fits or nobody can tell.

    The card is this machine's, whatever is planned for; on a CPU a recipe that was planned for a card is asked about
    as well. A model that cannot be sized yet asks nothing: the start says what is wrong with it.

    Raises:
        BadInput: The recipe's targets or rank do not suit the model.
    """
    try:
        forecaster = engine.forecaster(recipe, "")
    except StudioError:
        return None
    outlook = forecaster.outlook(recipe)
    if forecaster.device.gpu is None:
        free_bytes = engine.free_ram_bytes()
        too_large = free_bytes is not None and outlook.estimate.device.low > free_bytes
        return cpu_text(outlook, planned, free_bytes if too_large else None) if planned or too_large else None
    if outlook.verdict != "does not fit":
        return None
    return over_budget_text(outlook, forecaster.device, fix_that_fits(recipe, forecaster), spills=engine.spills())
