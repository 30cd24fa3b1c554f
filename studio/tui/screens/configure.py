"""The configure screen: shows the recipe, lets the user change each field of it, and starts it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.timer import Timer
from textual.worker import get_current_worker

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.last_recipe import LastRecipe, RecipeSource, sound_part
from studio.runs.layout import RunPaths
from studio.tui.asks import OpenRun, ShowAudits, ShowData, ShowRuns, ShowSetup
from studio.tui.changes import Change, Changes
from studio.tui.panels.data_note import DataNote
from studio.tui.panels.field_help import FieldHelp
from studio.tui.panels.forecast import Forecast
from studio.tui.panels.recipe_form import RecipeForm
from studio.tui.panels.top_bar import TopBar
from studio.tui.screens.cards import CardScreen
from studio.tui.screens.dialogs import Confirm
from studio.tui.screens.recipe_dialogs import ask_to_open, ask_to_save
from studio.tui.services import Services
from studio.tui.told import Abandoned, ReadingTold
from widgets.gauge import Gauge
from widgets.key_footer import KeyFooter

_CHECKING = "Checking recipe, model and data, then starting ..."
_FIRST_FIELD = "adapter.rank"
_KEEP_AFTER_SECONDS = 1.0
_KEYS_AFTER_SECONDS = 0.5


class ConfigureScreen(Screen[None]):
    """Owns the recipe and can launch it. The form tells which field was turned; the checks tell what is wrong."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "launch", "Run"),
        Binding("m", "turn_method", "LoRA/QLoRA"),
        Binding("f", "make_fit", "Fit"),
        Binding("u", "undo", "Undo"),
        Binding("ctrl+r", "redo", "Redo"),
        Binding("g", "choose_card", "Card"),
        Binding("v", "turn_view", "Memory"),
        Binding("d", "show_data", "Data"),
        Binding("o", "show_runs", "Runs"),
        Binding("a", "show_audits", "Audit"),
        Binding("s", "save", "Save", show=False),
        Binding("O", "open", "Open"),
        Binding("S", "setup", "Guided set-up", show=False),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("q", "app.quit", "Quit"),
    ]

    DEFAULT_CSS = """
    ConfigureScreen {
        & #gauge-row { height: 1; padding: 0 1; }
        & #work { height: 1fr; layout: vertical; }
        & RecipeForm { height: 2fr; }
        & #side { height: 1fr; layout: vertical; border-top: solid $foreground 20%; }
        & Forecast { display: none; }
        &.-memory RecipeForm, &.-memory FieldHelp { display: none; }
        &.-memory Forecast { display: block; }
    }
    ConfigureScreen.-wide {
        & #gauge-row { display: none; }
        & #work { layout: horizontal; }
        & RecipeForm { width: 1fr; height: 1fr; display: block; }
        & #side { width: 1fr; border-top: none; border-left: solid $foreground 20%; }
        & Forecast { display: block; height: auto; max-height: 80%; }
        & FieldHelp { display: block; border-top: solid $foreground 20%; }
        &.-memory Forecast { max-height: 100%; }
        &.-memory FieldHelp { display: none; }
    }
    """

    @dataclass
    class Refused(Message):
        """The checks found why the recipe cannot run: the reasons, line by line."""

        reason: str

    @dataclass
    class Launched(Message):
        """A run was started."""

        paths: RunPaths

    @dataclass
    class OverBudget(Message):
        """The recipe does not fit this machine's card: what to ask before it is launched all the same."""

        recipe: Recipe
        question: Content

    def __init__(
        self, recipe: Recipe, *, runs_root: Path, services: Services, source: RecipeSource | None = None
    ) -> None:
        """Open on a recipe; `source` is the user's file that it came from."""
        super().__init__()
        self.recipe = recipe
        self._runs_root, self._services = runs_root, services
        # Fields with problems are kept for the next visit with the value that they have in `_sound`.
        self._source, self._sound = source, recipe
        self._launching = False
        self._keep_timer: Timer | None = None
        self._keys_timer: Timer | None = None
        self._form, self._forecast = RecipeForm(recipe), Forecast(recipe, services=services)
        self._changes = Changes()
        self._left_field = _FIRST_FIELD

    def compose(self) -> ComposeResult:
        """Make the parts: bar, gauge, form, forecast, advice, keys."""
        yield TopBar("Configure", card=self._services.card)
        yield Gauge(unit="GiB", label="VRAM", id="gauge-row")
        with Container(id="work"):
            yield self._form
            with Container(id="side"):
                yield self._forecast
                yield FieldHelp()
        yield DataNote(self.recipe, services=self._services)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Show the recipe."""
        self._form.show(self.recipe)
        self._form.focus_field(_FIRST_FIELD)
        self._show_problems()
        self.bindings_updated_signal.subscribe(self, self._name_keys, immediate=True)
        self.call_after_refresh(self._forecast.begin)

    def on_screen_resume(self) -> None:
        """Look at the card again: runs may have come and gone."""
        if self._form.is_mounted and self._forecast.forecaster is not None:
            self._forecast.look()

    def on_recipe_form_turned(self, message: RecipeForm.Turned) -> None:
        """Take over the new value of a field."""
        change = Change(self.recipe, self.recipe.with_(message.path, message.value))
        self._do(change, run=message.path if message.step else "", shown=True)

    def on_forecast_told(self, message: Forecast.Told) -> None:
        """Show the reading in a narrow screen's row at the top, too; its level decides whether `f` is offered."""
        row = self.query_one("#gauge-row", Gauge)
        before, row.reading = row.reading.level, message.reading
        if before != message.reading.level:
            self.refresh_bindings()

    def on_forecast_planned_for(self, message: Forecast.PlannedFor) -> None:
        """Name the planned card in the top bar: a small screen names it nowhere else."""
        self.query_one(TopBar).plan_for(message.card)

    def on_recipe_form_reached(self, message: RecipeForm.Reached) -> None:
        """Explain the field."""
        if message.path != self._left_field:
            self._changes.end_run()
        self._left_field = message.path
        self.query_one(FieldHelp).show_field(message.path)

    def on_configure_screen_refused(self, message: Refused) -> None:
        """Say why nothing was started."""
        self._end_launch()
        self.query_one(FieldHelp).show_problems(message.reason.splitlines())

    def on_configure_screen_launched(self, message: Launched) -> None:
        """Watch what was started."""
        self._end_launch()
        self._show_problems()
        self.post_message(OpenRun(message.paths))

    def on_configure_screen_over_budget(self, message: OverBudget) -> None:
        """Ask whether to launch all the same."""
        self._end_launch()

        def decide(answer: bool | None) -> None:
            if answer and message.recipe is self.recipe:  # a yes to this recipe is none to another
                self._begin_launch(sure=True)

        self.app.push_screen(Confirm(message.question, "launch it"), decide)

    def _name_keys(self, _: object) -> None:
        """Let the texts name keys only while these are keys, and no letters that go into a field."""
        named = not self._form.typing
        self._forecast.name_keys(named)
        self.query_one(DataNote).name_keys(named)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer keys only where they do something."""
        if action == "make_fit":
            return self.query_one("#gauge", Gauge).reading.level in ("doubtful", "bad") if self.is_mounted else False
        if action in ("undo", "redo"):
            return self._changes.possible[action == "redo"] and not self._form.editing
        return True

    def action_launch(self) -> None:
        """Check everything and start the run; with problems, list them and start nothing."""
        self._form.after_turns(self._launch_checked)

    def _launch_checked(self) -> None:
        if not self._launching and not self._show_problems():
            self._begin_launch(sure=False)

    def action_turn_method(self) -> None:
        """Switch between LoRA and QLoRA."""
        self._form.turn_method()

    def action_show_runs(self) -> None:
        """Show the list of runs."""
        self.post_message(ShowRuns())

    def action_show_data(self) -> None:
        """Show the data as the model reads it."""
        self.post_message(ShowData(self.recipe))

    on_data_note_wanted = action_show_data

    def action_show_audits(self) -> None:
        """Show what was measured of 4 bits, and measure more."""
        self.post_message(ShowAudits())

    def action_setup(self) -> None:
        """Go through the guided set-up."""
        self.post_message(ShowSetup())

    def take_setup(self, recipe: Recipe, card: str) -> None:
        """Show the recipe that the set-up recommends and plan for its card; `u` brings back the recipe of before."""
        if card != self._forecast.planned:
            self._forecast.plan_for(card)
        self._open(recipe)

    def action_make_fit(self) -> None:
        """Make the recipe fit the card of the forecast and say what was changed."""
        self._form.after_turns(self._make_fit)

    def _make_fit(self) -> None:
        forecaster = self._forecast.forecaster
        if forecaster is None or self.recipe.problems():
            return
        from studio.tui.panels.forecast_text import applied_text  # noqa: PLC0415  with the estimator

        fix = forecaster.fix_that_fits(self.recipe)
        if fix is None:
            self.app.notify("Nothing here makes it fit: take a smaller model or a larger card.", markup=False)
            return
        self._do(Change(self.recipe, fix.recipe))
        self.app.notify(applied_text(fix), markup=False)

    def action_undo(self) -> None:
        """Take the last change of the recipe back."""
        self._form.after_turns(lambda: self._go(self._changes.undo(), "Undone"))

    def action_redo(self) -> None:
        """Make the change again that was taken back last."""
        self._form.after_turns(lambda: self._go(self._changes.redo(), "Redone"))

    def _go(self, change: Change | None, word: str) -> None:
        if change is not None:
            self._change(change)
            self.app.clear_notifications()  # u pressed ten times says what the tenth did, and fills no screen
            self.app.notify(f"{word}: {change.words}.", markup=False)

    def action_choose_card(self) -> None:
        """Choose the card to plan for."""

        def take(name: str | None) -> None:
            if name is not None:
                self._forecast.plan_for(name)

        self.app.push_screen(CardScreen(self._forecast.planned), take)

    def action_save(self) -> None:
        """Save the recipe."""

        def saved(source: RecipeSource) -> None:
            self._source = source
            self._keep_soon()

        ask_to_save(self.app, self.recipe, saved)

    def action_open(self) -> None:
        """Show another recipe; `u` brings back the recipe of before."""
        ask_to_open(self.app, self.recipe, self._runs_root, self._source, self._open)

    def _open(self, recipe: Recipe, source: RecipeSource | None = None) -> None:
        self._do(Change(self.recipe, recipe, self._source, source))

    def action_turn_view(self) -> None:
        """Give the forecast more room and the arrow keys, or take both back.

        On a narrow screen it takes the place of the form, on a wide one that of the help on the field.
        """
        memory = not self.has_class("-memory")
        self.set_class(memory, "-memory")
        self._forecast.can_focus = memory
        if memory:
            self._forecast.focus()
        else:
            self._form.focus_field(self._left_field)

    def _do(self, change: Change, *, run: str = "", shown: bool = False) -> None:
        """Make a change that can be undone; `run` is as in `Changes.note`, `shown` as in `_change`."""
        self._changes.note(change, run)
        self._change(change, shown=shown)

    def _change(self, change: Change, *, shown: bool = False) -> None:
        """Take another recipe and tell everything that follows it. The recipe changes nowhere else.

        Args:
            change: To what, and from which file where that is another one.
            shown: Whether the form shows its values already, because the user turned them there.
        """
        self.recipe = recipe = change.after
        if change.moves_source:
            self._source = change.after_source
        if shown:
            self._form.show_what_follows(recipe)
        else:
            self._form.show(recipe)
            self.refresh_bindings()
        if self._keys_timer is not None:
            self._keys_timer.stop()
        self._keys_timer = self.set_timer(_KEYS_AFTER_SECONDS, self.refresh_bindings)  # costs more than the gauge
        self._forecast.follow(recipe)
        self.query_one(DataNote).follow(recipe)
        self._show_problems()
        self._keep_soon()

    def _keep_soon(self) -> None:
        """Keep the recipe for the next visit once nothing was turned for a moment, or when the studio is left."""
        if self._keep_timer is not None:
            self._keep_timer.stop()
        self._keep_timer = self.set_timer(_KEEP_AFTER_SECONDS, self._keep_now)

    def on_unmount(self) -> None:
        """Keep what was turned in the last moment."""
        if self._keep_timer is not None:
            with contextlib.suppress(OSError, StudioError):
                self._services.keep_recipe(self._left())

    def _keep_now(self) -> None:
        self._keep_timer = None
        self._keep(self._left())

    @work(thread=True, group="keep")
    def _keep(self, last: LastRecipe) -> None:
        try:
            self._services.keep_recipe(last)
        except (OSError, StudioError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            told = f"The recipe is not kept for the next visit: {plain(reason)} s saves it to a file."
            self.app.call_from_thread(self.app.notify, told, severity="warning", markup=False)

    def _left(self) -> LastRecipe:
        """Return the recipe as it would be found on the next visit."""
        self._sound = sound_part(self.recipe, self._sound)
        return LastRecipe(self._sound, self._source)

    def _begin_launch(self, *, sure: bool) -> None:
        self._launching = True
        self.query_one(FieldHelp).show_busy(_CHECKING)
        self._launch(self.recipe, sure, self._forecast.planned)

    @work(thread=True)
    def _launch(self, recipe: Recipe, sure: bool, planned: str) -> None:
        try:
            from studio.tui.panels.forecast_text import question_before_launch  # noqa: PLC0415  with the estimator

            question = None if sure else question_before_launch(recipe, self._services, planned)
            if question is not None:
                self.post_message(self.OverBudget(recipe, question))
                return
            worker, show = get_current_worker(), self.query_one(FieldHelp).show_busy
            told = ReadingTold(lambda words: self.app.call_from_thread(show, words), lambda: worker.is_cancelled)
            paths = self._services.start(recipe, self._runs_root, told)
        except Abandoned:
            return
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
