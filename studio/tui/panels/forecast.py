"""Memory as it will be: gauge, the trade between LoRA and QLoRA, and what would make the recipe fit."""

from typing import TYPE_CHECKING

from textual import work
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.timer import Timer
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.tui.panels.fixes import FixList
from studio.tui.services import Services
from widgets.gauge import Gauge, Reading

if TYPE_CHECKING:  # the estimator takes 0.1 s to import: a thread brings it after the first frame
    from studio.core.fit import Fix
    from studio.probe.forecast import Forecaster, Outlook
    from studio.probe.trade import Sides

_PRICE_AFTER_SECONDS = 0.15
_READING = "reading the model ..."


class MemoryGauges(Vertical):
    """A gauge of the card's memory, and a row for main memory, made only when something waits there for the first time.

    The styles of a gauge are a fifteenth of the work before the first frame.
    """

    DEFAULT_CSS = """
    MemoryGauges {
        height: auto;
        & .-host { height: 1; }
        &#gauge-rows Gauge { height: 1; padding: 0 1; }
    }
    """

    def __init__(self, *, rows: bool = False) -> None:
        """Start empty; `rows` gives the card's memory one row, too, which is all that a small screen has."""
        super().__init__(id="gauge-rows" if rows else "gauges")
        self._labels = ("VRAM", "RAM ") if rows else ("", "RAM")
        self._card = Gauge(unit="GiB", label=self._labels[0], id="gauge-row" if rows else "gauge")
        self._host: Gauge | None = None
        self.shown = Reading(), Reading()
        """What is shown of the card and of main memory."""

    def compose(self) -> ComposeResult:
        """Make the card's."""
        yield self._card

    def show(self, reading: Reading, host: Reading) -> bool:
        """Show the card's memory, and main memory where something waits there. True: the card's level changed."""
        before, self.shown = self.shown[0].level, (reading, host)
        self._card.reading = reading
        if self._host is None and host.parts:
            self._host = Gauge(unit="GiB", label=self._labels[1], classes="-host")
            self.mount(self._host)
        if self._host is not None:
            self._host.reading, self._host.display = host, bool(host.parts)
        return before != reading.level


class Forecast(VerticalScroll):
    """Follows a recipe. The gauge changes at once; what takes longer waits until nothing was turned for a moment."""

    DEFAULT_CSS = """
    Forecast {
        height: 1fr;
        scrollbar-size-vertical: 1;
        & Static { height: auto; }
        & > Vertical {
            height: auto;
            padding: 0 1;
            border: round $foreground 40%;
            border-title-style: bold;
            border-title-color: $text-primary;
        }
        & #footnote { color: $text-muted; margin: 1 0 0 0; }
    }
    """

    class Told(Message):
        """The gauge shows something else."""

        def __init__(self, reading: Reading, host: Reading) -> None:
            """Carry what it shows, and what the gauge of main memory does."""
            super().__init__()
            self.reading, self.host = reading, host

    class PlannedFor(Message):
        """Another card is planned for."""

        def __init__(self, card: str) -> None:
            """Carry its name; empty for this machine's."""
            super().__init__()
            self.card = card

    class Ready(Message):
        """The model and the card were found, or the reason why they were not."""

        def __init__(self, sought: Recipe, planned: str, ground: "Forecaster | str") -> None:
            """Carry what was sought, and what can estimate it or the reason why nothing can."""
            super().__init__()
            self.sought, self.planned, self.ground = sought, planned, ground

    class Priced(Message):
        """What takes longer was worked out for a recipe."""

        def __init__(
            self,
            recipe: Recipe,
            forecaster: "Forecaster",
            sides: "Sides",
            fixes: "list[Fix]",
            first: "Fix | None",
        ) -> None:
            """Carry what it is for, the table, the fixes and what `f` would do."""
            super().__init__()
            self.recipe, self.forecaster = recipe, forecaster
            self.sides, self.fixes, self.first = sides, fixes, first

    def __init__(self, recipe: Recipe, *, services: Services) -> None:
        """Follow a recipe, at first without a model."""
        super().__init__(can_focus=False)
        self._recipe, self._services = recipe, services
        self.planned = ""
        self._price_timer: Timer | None = None
        self.forecaster: Forecaster | None = None
        self._reason = _READING
        self._keys_named = True
        self._longest_tokens: int | None = None
        self._fixes: tuple[list[Fix], Fix | None, bool] = [], None, False
        self._table: tuple[Sides, bool] | None = None

    def compose(self) -> ComposeResult:
        """Make the parts: gauge with its words, what makes it fit, table with its footnote."""
        with Vertical(id="peak-panel") as panel:
            panel.border_title = "Memory at the peak"
            yield MemoryGauges()
            yield Static("", id="peak", markup=False)
        yield FixList(id="fixes")
        with Vertical(id="trade-panel") as panel:
            panel.border_title = "The trade, for this model, data and card"
            yield Static("", id="trade", markup=False)
            yield Static("", id="footnote", markup=False)

    def on_resize(self) -> None:
        """Show as many columns of the table as there is room for."""
        if self._table is not None and self.forecaster is not None:
            self.call_after_refresh(self._show_table, self._table[0], waiting=self._table[1])

    def look(self, planned: str | None = None) -> None:
        """Find the model and the card anew, in a thread.

        Args:
            planned: A card of the catalogue to plan for, empty for this machine's; None keeps what was chosen.
        """
        if planned is not None and planned != self.planned:
            self.planned = planned
            self.post_message(self.PlannedFor(planned))
        self._find(self._recipe, self.planned)

    def look_again(self) -> None:
        """Look at the card again, as runs may have come and gone."""
        if self.forecaster is not None:
            self.look()

    @work(thread=True)
    def begin(self) -> None:
        """Look for the first time, for the card that was planned for on the last visit."""
        planned = self._services.recall_planned()
        self.app.call_from_thread(self.look, planned)

    def plan_for(self, name: str) -> None:
        """Plan for a card of the catalogue, or with an empty name for this machine's; keep it for the next visit."""
        self.look(name)
        self._keep_planned(name)

    def follow(self, recipe: Recipe) -> None:
        """Show what a recipe needs. Costs microseconds where it was worked out before, else about a millisecond."""
        moved = _ground_of(recipe) != _ground_of(self._recipe)
        self._recipe = recipe
        if moved:
            self.forecaster, self._reason = None, _READING
            self.look()
        self._show()

    def know_longest(self, tokens: int | None) -> None:
        """Take the tokens of the longest row, or that it is not known any more."""
        if tokens != self._longest_tokens:
            self._longest_tokens = tokens
            if self.forecaster is not None:
                self.forecaster.longest_tokens = tokens
                self._show()

    def fix_to_make(self) -> "Fix | None":
        """Return the gentlest changes that make the recipe fit; say so where there are none."""
        if self.forecaster is None or self._recipe.problems():
            return None
        fix = self.forecaster.fix_that_fits(self._recipe)
        if fix is None:
            self.app.notify("Nothing here makes it fit: take a smaller model or a larger card.", markup=False)
        return fix

    @property
    def longest_tokens(self) -> int | None:
        """Tokens of the longest row, where it is known."""
        return self._longest_tokens

    def name_keys(self, named: bool) -> None:
        """Name the keys that help, or do not while letters go into a field."""
        if named != self._keys_named:
            self._keys_named = named
            if self.forecaster is not None:
                from studio.probe.forecast import outlook_or_reason  # noqa: PLC0415  with the estimator

                outlook = outlook_or_reason(self.forecaster, self._recipe)
                if not isinstance(outlook, str):
                    self._show_peak(outlook, self.forecaster)
                self._show_fixes(self._fixes[0], self._fixes[1], over=self._fixes[2])

    def on_forecast_ready(self, message: Ready) -> None:
        """Estimate with what was found, unless something else is wanted by now: a hub may answer late."""
        message.stop()
        if _ground_of(message.sought) != _ground_of(self._recipe) or message.planned != self.planned:
            return
        if isinstance(message.ground, str):
            self.forecaster, self._reason = None, message.ground
        else:
            self.forecaster = message.ground
            self.forecaster.longest_tokens = self._longest_tokens
        self._show()

    def on_forecast_priced(self, message: Priced) -> None:
        """Show what was worked out, unless the recipe has moved on."""
        message.stop()
        if message.recipe is self._recipe and message.forecaster is self.forecaster:
            self._show_table(message.sides, waiting=False)
            short = message.forecaster.outlook(message.recipe).verdict in ("tight", "does not fit")
            self._show_fixes(message.fixes, message.first, over=short)

    @work(thread=True)
    def _keep_planned(self, name: str) -> None:
        try:
            self._services.keep_planned(name)
        except OSError as error:
            told = f"The card is planned for now, but not kept: {error.strerror or error}."
            self.app.call_from_thread(self.app.notify, told, severity="warning", markup=False)

    @work(thread=True, exclusive=True, group="find")
    def _find(self, recipe: Recipe, planned: str) -> None:
        try:
            ground: Forecaster | str = self._services.forecaster(recipe, planned)
        except StudioError as error:
            ground = str(error)
        self.post_message(self.Ready(recipe, planned, ground))

    @work(thread=True, exclusive=True, group="price")
    def _price(self, recipe: Recipe, forecaster: "Forecaster") -> None:
        from studio.probe.trade import sides_of  # noqa: PLC0415  with the estimator

        try:
            sides = sides_of(recipe, forecaster, batches=True)
            short = forecaster.outlook(recipe).verdict in ("tight", "does not fit")
            free = None if short else forecaster.fix_for_nothing(recipe)
            fixes = forecaster.single_fixes(recipe) if short else [free] if free else []
            first = forecaster.fix_that_fits(recipe) if short else None
        except StudioError:
            return
        self.post_message(self.Priced(recipe, forecaster, sides, fixes, first))

    def _show(self) -> None:
        """Show gauge, words and the quick rows of the table; begin to price the rest."""
        if self.forecaster is None:
            self._show_reason(self._reason)
            return
        from studio.probe.forecast import outlook_or_reason  # noqa: PLC0415  a thread has imported it by now
        from studio.tui.reading import host_reading, reading_of  # noqa: PLC0415

        outlook = outlook_or_reason(self.forecaster, self._recipe)
        if isinstance(outlook, str):
            self._show_reason(outlook)
            return
        short = outlook.verdict in ("tight", "does not fit")
        free = self.forecaster.fix_for_nothing(self._recipe) if short else None
        self._show_reading(reading_of(outlook, free), host_reading(outlook, self.forecaster.ram_bytes))
        self.call_after_refresh(self._show_words, self._recipe, outlook, self.forecaster)  # the gauge is drawn first
        self._price_soon()

    def _show_words(self, recipe: Recipe, outlook: "Outlook", forecaster: "Forecaster") -> None:
        if recipe is not self._recipe or forecaster is not self.forecaster:  # it was turned again since the last frame
            return
        from studio.probe.trade import sides_of  # noqa: PLC0415  with the estimator

        self._show_peak(outlook, forecaster)
        if outlook.verdict in (None, "fits") and self._fixes[2]:
            self._show_fixes([], None)
        self._show_table(sides_of(recipe, forecaster, batches=False), waiting=True)

    def _show_peak(self, outlook: "Outlook", forecaster: "Forecaster") -> None:
        from studio.tui.reading import host_words, peak_words, rows_words  # noqa: PLC0415  with the estimator

        warning = host_words(outlook, forecaster.ram_bytes)
        rows = rows_words(self._recipe, self._longest_tokens)
        first, *others = peak_words(outlook, forecaster.device, rows, keys=self._keys_named)
        alarm = [(f"{warning}\n", "$text-error")] if warning else []
        self._update("#peak", Content.assemble(*alarm, first, *((f"\n{line}", "dim") for line in others)))

    def _show_reason(self, reason: str) -> None:
        self._show_reading(Reading(verdict=plain(reason, one_line=True, limit=200)), Reading())
        self._update("#peak", Content(plain(reason) if reason != _READING else ""))
        self._update("#trade", Content(""))
        self._update("#footnote", Content(""))
        self._show_fixes([], None)

    def _show_reading(self, reading: Reading, host: Reading) -> None:
        gauges = self.query_one("#gauges", MemoryGauges)
        if (reading, host) != gauges.shown:
            gauges.show(reading, host)
            self.post_message(self.Told(reading, host))

    def _price_soon(self) -> None:
        if self._price_timer is not None:
            self._price_timer.stop()
        self._price_timer = self.set_timer(_PRICE_AFTER_SECONDS, self._price_now)

    def _price_now(self) -> None:
        if self.forecaster is not None:
            self._price(self._recipe, self.forecaster)

    def _show_table(self, sides: "Sides", *, waiting: bool) -> None:
        from studio.tui.panels.forecast_text import table_text, with_room  # noqa: PLC0415  with the estimator
        from studio.tui.trade import footnote  # noqa: PLC0415  as above

        self._table = sides, waiting
        width = self.query_one("#trade").content_size.width or self.size.width
        self._update("#trade", table_text(sides, self._recipe, waiting=waiting, width=width))
        left_out = len(with_room(sides, self._recipe, width)) < len(sides)
        more = " A wider screen and plan --trade have more columns." if left_out else ""
        self._update("#footnote", Content(footnote(with_room(sides, self._recipe, width)) + more))

    def _show_fixes(self, fixes: "list[Fix]", first: "Fix | None", *, over: bool = False) -> None:
        self._fixes = fixes, first, over
        self.query_one(FixList).show(fixes, first, over=over, keys=self._keys_named)

    def _update(self, name: str, text: Content) -> None:
        """Repaint a text only when it changed, and lay out the screen anew only when the height of the text changed."""
        widget = self.query_one(name, Static)
        before, width = widget.content, widget.content_size.width
        if before == text:
            return
        same = isinstance(before, Content) and width > 0 and before.get_height({}, width) == text.get_height({}, width)
        widget.update(text, layout=not same)


def _ground_of(recipe: Recipe) -> tuple[str, str, str]:
    """Return the settings that a forecaster depends on: as long as they stay, model and card need no new look."""
    return recipe.model.base, recipe.model.revision, recipe.device.device
