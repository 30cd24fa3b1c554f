"""The configure screen: shows the recipe, lets the user change each field of it, and starts it."""

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container
from textual.screen import Screen
from textual.timer import Timer
from textual.worker import get_current_worker

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.runs.last_recipe import RecipeSource
from studio.runs.layout import RunPaths
from studio.tui.asks import OpenRun, ShowAudits, ShowData, ShowRuns, ShowSetup
from studio.tui.changes import Change, Changes, Keeper
from studio.tui.panels.data_note import DataNote
from studio.tui.panels.field_help import FieldHelp
from studio.tui.panels.fixes import FixList, applied_text
from studio.tui.panels.forecast import Forecast, MemoryGauges
from studio.tui.panels.recipe_form import RecipeForm
from studio.tui.panels.top_bar import TopBar
from studio.tui.screens.dialogs import AskTurn, Confirm, ask
from studio.tui.screens.recipe_dialogs import ask_to_open, ask_to_save
from studio.tui.services import Services
from studio.tui.told import Abandoned, ReadingTold
from widgets.gauge import Gauge
from widgets.key_footer import KeyFooter
from widgets.tab_row import TabRow

if TYPE_CHECKING:
    from studio.core.fit import Fix

_FIRST_FIELD = "adapter.rank"
_HUGE_CELLS, _HIGH_ROWS, _KEYS_AFTER_SECONDS = 160, 50, 0.5


class ConfigureScreen(Screen[None]):
    """Owns the recipe and can launch it. The form tells which field was turned; the checks tell what is wrong."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "launch", "Run"),
        Binding("f", "make_fit", "Fit"),
        Binding("F", "fill", "Fill"),
        Binding("u", "undo", "Undo"),
        Binding("ctrl+r", "redo", "Redo"),
        Binding("slash", "find", "Find", key_display="/"),
        Binding("v", "turn_view", "Memory"),
        Binding("d", "show_data", "Data"),
        Binding("g", "choose_card", "Card"),
        Binding("m", "turn_method", "LoRA/QLoRA"),
        Binding("x", "choose_fix", "Fixes"),
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
        & #tabs { padding: 0 1; }
        & #work { height: 1fr; layout: vertical; }
        & RecipeForm { height: 1fr; }
        & FieldHelp { height: 7; border-top: solid $foreground 40%; }
        & Forecast { display: none; }
        &.-memory RecipeForm, &.-memory FieldHelp { display: none; }
        &.-memory Forecast { display: block; }
    }
    ConfigureScreen.-wide {
        & #gauge-rows, & #tabs { display: none; }
        & #work { layout: grid; }
        & RecipeForm, & FieldHelp, & DataNote { height: 100%; border: round $foreground 40%; display: block; }
        & DataNote { text-wrap: wrap; }
        & Forecast { display: block; height: 100%; }
    }
    """

    def __init__(
        self, recipe: Recipe, *, runs_root: Path, services: Services, source: RecipeSource | None = None
    ) -> None:
        """Open on a recipe; `source` is the user's file that it came from."""
        super().__init__()
        self.recipe, self._source, self._runs_root, self._services = recipe, source, runs_root, services
        self._keeper, self._changes = Keeper(self, recipe, services), Changes()
        self._keys_timer: Timer | None = None
        self._form, self.forecast = RecipeForm(recipe), Forecast(recipe, services=services)
        self._left_field, self._launching, self._waits = _FIRST_FIELD, False, False

    def compose(self) -> ComposeResult:
        """Make the parts: bar, gauge, form, forecast, advice, keys."""
        yield TopBar("Configure", card=self._services.card)
        yield MemoryGauges(rows=True)
        yield TabRow([("recipe", "Recipe"), ("memory", "Memory, fixes, trade")], "recipe", id="tabs")
        with Container(id="work"):
            yield self._form
            yield self.forecast
            yield FieldHelp()
            yield DataNote(self.recipe, services=self._services)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Show the recipe."""
        self._form.show(self.recipe)
        self._form.focus_field(_FIRST_FIELD)
        self._show_problems()
        self.bindings_updated_signal.subscribe(self, self._name_keys, immediate=True)

    def on_screen_resume(self) -> None:
        """Look at the card again: runs may have come and gone."""
        if self._waits:
            self.begin()
        elif self._form.is_mounted:
            self.forecast.look_again()

    def begin(self, *, waits: bool = False) -> None:
        """Look at model, card and data for the first time; where it `waits`, only when the screen is shown again."""
        self._waits = waits
        if not waits:
            self.forecast.begin()
            self.query_one(DataNote).begin()

    def on_recipe_form_turned(self, message: RecipeForm.Turned) -> None:
        """Take over the new value of a field."""
        after = self.recipe.with_(message.path, message.value)
        self._do(after, run=message.path if message.step else "", shown=True)

    def on_forecast_told(self, message: Forecast.Told) -> None:
        """Show the reading in a narrow screen's row at the top, too; its level decides whether `f` is offered."""
        if self.query_one("#gauge-rows", MemoryGauges).show(message.reading, message.host):
            self.refresh_bindings()

    def on_forecast_planned_for(self, message: Forecast.PlannedFor) -> None:
        """Name the planned card in the top bar: a small screen names it nowhere else."""
        self.query_one(TopBar).plan_for(message.card)

    def on_resize(self) -> None:
        """Use the room: show all fields where they fit, unless the user has folded or unfolded them."""
        if not self._form.fold_chosen:
            self._form.unfold(self.size.width >= _HUGE_CELLS or self.size.height >= _HIGH_ROWS)
        self._lay_out()

    def _lay_out(self) -> None:
        """Place the parts of a wide screen; not by classes, because each would style all fields anew."""
        huge, work = self.size.width >= _HUGE_CELLS, self.query_one("#work").styles
        data_rows = 16 if self.size.height >= _HIGH_ROWS else 3
        work.grid_size_columns, work.grid_size_rows = (3, 2) if huge else (2, 3)
        work.grid_columns = "5fr 6fr 5fr" if huge else "14fr 16fr"
        work.grid_rows = "12 1fr" if huge else f"1fr 10 {data_rows}" if self._form.unfolded else "14 10 1fr"
        self._form.styles.row_span, self.forecast.styles.row_span = (2, 2) if huge else (1, 3)

    def on_data_note_measured(self, message: DataNote.Measured) -> None:
        """Hold the length against the longest row."""
        self._form.know_longest(message.longest_tokens, self.recipe)
        self.forecast.know_longest(message.longest_tokens)

    def on_fix_list_chosen(self, message: FixList.Chosen) -> None:
        """Make a fix that was chosen, and go back to where the user came from."""
        self._take_fix(message.fix)
        self._form.focus_field(self._left_field)

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        """Show the recipe or its memory."""
        if (message.key == "memory") != self.has_class("-memory"):
            self.action_turn_view()

    on_recipe_form_folded = _lay_out

    def on_recipe_form_reached(self, message: RecipeForm.Reached) -> None:
        """Explain the field; on a wide screen a field that is reached takes the cursor back from the memory."""
        if self.has_class("-wide", "-memory"):
            self.remove_class("-memory")
            self.forecast.can_focus = False
        if message.path != self._left_field:
            self._changes.end_run()
        self._left_field = message.path or self._left_field
        self.query_one(FieldHelp).show_field(message.path)

    def _refused(self, reason: str) -> None:
        """Say why nothing was started: the checks found the reasons, line by line."""
        self._busy_with("")
        self.query_one(FieldHelp).show_problems(reason.splitlines())

    def _launched(self, paths: RunPaths) -> None:
        """Watch what was started."""
        self._busy_with("")
        self._show_problems()
        self.post_message(OpenRun(paths))

    def _ask_first(self, recipe: Recipe, dialog: Confirm | AskTurn) -> None:
        """Ask whether to launch what does not fit all the same, or whether to wait for a card that is busy."""
        self._busy_with("")

        def decide(answer: bool) -> None:
            if recipe is self.recipe:  # a yes to this recipe is none to another
                # What waits has the card for itself: what is free of it now says nothing.
                self._begin_launch(sure=answer, queue=answer and isinstance(dialog, AskTurn))

        ask(self.app, dialog, decide)

    def _name_keys(self, _: object) -> None:
        """Let the texts name keys only while these are keys, and no letters that go into a field."""
        named = not self._form.typing
        self.forecast.name_keys(named)
        self.query_one(DataNote).name_keys(named)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer keys only where they do something."""
        if action == "make_fit":
            return self.query_one("#gauge", Gauge).reading.level in ("doubtful", "bad") if self.is_mounted else False
        if action in ("find", "fill"):
            return not self._form.typing
        if action == "choose_fix":
            return self.is_mounted and self.query_one(FixList).has_class("-shown")
        if action in ("undo", "redo"):
            return self._changes.possible[action == "redo"] and not self._form.editing
        return True

    def action_launch(self) -> None:
        """Check everything and start the run; with problems, list them and start nothing."""
        self._form.after_turns(self._begin_launch)

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
        if card != self.forecast.planned:
            self.forecast.plan_for(card)
        self._open(recipe)

    def action_make_fit(self) -> None:
        """Make the recipe fit the card of the forecast."""
        self._form.after_turns(lambda: self._take_fix(self.forecast.fix_to_make()))

    def action_fill(self) -> None:
        """Offer settings that fill the card for an aim; what is taken is one change, which `u` takes back."""
        from studio.tui.screens.fill import ask_to_fill  # noqa: PLC0415  not needed for the first frame

        self._form.after_turns(lambda: ask_to_fill(self.app, self.forecast.forecaster, self.recipe, self._do))

    def _take_fix(self, fix: "Fix | None") -> None:
        if fix is not None:
            self._do(fix.made_to(self.recipe))
            self.app.notify(applied_text(fix), markup=False)

    def action_choose_fix(self) -> None:
        """Move to the list of fixes, which on a narrow screen stands in the other tab."""
        if not self.forecast.display:
            self.action_turn_view()
        self.forecast.query_one(FixList).focus()

    def action_find(self) -> None:
        """Find a field by its name or by what it does, and go to it."""
        from studio.tui.screens.find_field import FindScreen  # noqa: PLC0415  not needed for the first frame

        def take(path: str) -> None:
            if self.has_class("-memory"):
                self.action_turn_view()
            self._form.focus_field(path)

        ask(self.app, FindScreen(self.recipe), take)

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
        from studio.tui.screens.cards import CardScreen  # noqa: PLC0415  not needed for the first frame

        ask(self.app, CardScreen(self.forecast.planned), self.forecast.plan_for)

    def action_save(self) -> None:
        """Save the recipe."""

        def saved(source: RecipeSource) -> None:
            self._source = source
            self._keeper.soon(self.recipe, self._source)

        ask_to_save(self.app, self.recipe, saved)

    def action_open(self) -> None:
        """Show another recipe; `u` brings back the recipe of before."""
        ask_to_open(self.app, self.recipe, self._runs_root, self._source, self._open)

    def _open(self, recipe: Recipe, source: RecipeSource | None = None) -> None:
        self._make(Change(self.recipe, recipe, self._source, source))

    def action_turn_view(self) -> None:
        """Give the forecast the arrow keys and, on a narrow screen, the place of the form; or take both back."""
        memory = not self.has_class("-memory")
        self.set_class(memory, "-memory")
        self.query_one(TabRow).current = "memory" if memory else "recipe"
        self.forecast.can_focus = memory
        if memory:
            self.forecast.focus()
        else:
            self._form.focus_field(self._left_field)

    def _do(self, after: Recipe, *, run: str = "", shown: bool = False) -> None:
        self._make(Change(self.recipe, after), run=run, shown=shown)

    def _make(self, change: Change, *, run: str = "", shown: bool = False) -> None:
        """Make a change that can be undone; `run` is as in `Changes.note`, `shown` as in `_change`."""
        self._changes.note(change, run)
        self._change(change, shown=shown)

    def _change(self, change: Change, *, shown: bool = False) -> None:
        """Take another recipe and tell everything that follows it; `shown` if the form shows its values already."""
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
        self.forecast.follow(recipe)
        self.query_one(DataNote).follow(recipe)
        self._show_problems()
        self._keeper.soon(self.recipe, self._source)

    def on_unmount(self) -> None:
        """Keep what was turned in the last moment."""
        self._keeper.at_once()

    def _begin_launch(self, *, sure: bool = False, queue: bool | None = None) -> None:
        if not self._launching and not self._show_problems():
            self._busy_with("Checking recipe, model and data, then starting ...")
            self._launch(self.recipe, sure, queue, self.forecast.planned)

    @work(thread=True)
    def _launch(self, recipe: Recipe, sure: bool, queue: bool | None, planned: str) -> None:
        try:
            from studio.tui.panels.forecast_text import question_before_launch  # noqa: PLC0415  with the estimator

            if queue is None and (at_work := self._services.at_work(recipe)):
                self.call_later(self._ask_first, recipe, AskTurn(at_work))
                return
            known = (recipe, self._services, planned, self.forecast.longest_tokens)
            if not sure and (question := question_before_launch(*known)) is not None:
                self.call_later(self._ask_first, recipe, Confirm(question, "launch it"))
                return
            worker, show = get_current_worker(), self.query_one(FieldHelp).show_busy
            told = ReadingTold(lambda words: self.app.call_from_thread(show, words), lambda: worker.is_cancelled)
            paths = self._services.start(recipe, self._runs_root, told, queue=bool(queue))
        except Abandoned:
            return
        except StudioError as error:
            self.call_later(self._refused, str(error))
        else:
            self.call_later(self._launched, paths)

    def _busy_with(self, words: str) -> None:
        self._launching = bool(words)
        self.query_one(FieldHelp).show_busy(words)

    def _show_problems(self) -> bool:
        """List what is wrong with the recipe and return whether anything is."""
        problems = [str(problem) for problem in self.recipe.problems()]
        self.query_one(FieldHelp).show_problems(problems)
        return bool(problems)
