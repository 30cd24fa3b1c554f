"""The data as the model will read it: rows token by token, what they add up to, what is left out, which rows repeat."""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.runs.piped import Loading, NotAnswered
from studio.runs.show import FILTERS, Filter, NoRow, Opened, RowShown, ShowEvent, ShowProcess, ShowRequest, Summary
from studio.tui.panels.data_text import facts_text, left_out_text, repeats_text, row_head, row_tokens
from studio.tui.readable import count
from studio.tui.services import Services
from widgets.key_footer import KeyFooter
from widgets.tab_row import TabRow
from widgets.token_view import Token, TokenView

_MOST_BELOW = 40
"""Rows that are shown below the one that was asked for: more than a screen of the shortest ones has room for."""
_VIEWS = (("row", "1 Row"), ("facts", "2 Lengths, shares"), ("left", "3 Left out"), ("repeats", "4 Repeats"))
_ASKS = {"number": "the number of a row, then enter", "words": "words that a row says, then enter; n finds the next"}


class DataScreen(Screen[None]):
    """Looks at the data of a recipe. The process that reads it lives as long as this screen.

    In wide terminals a row stands beside the view that was chosen, else there is one view at a time. Where a row leaves
    room, those that follow it stand below it.
    """

    HELP = "The rows as the model reads them, token by token; what is learnt is marked."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n,right", "go(1)", "Next", key_display="n →"),
        Binding("p,left", "go(-1)", "Before", key_display="p ←"),
        Binding("g", "ask('number')", "Row"),
        Binding("slash", "ask('words')", "Search"),
        Binding("f", "turn_filter", "Only"),
        Binding("t", "turn_borders", "Tokens"),
        Binding("tab", "next_view(1)", "View", priority=True),
        Binding("shift+tab", "next_view(-1)", "View before", show=False, priority=True),
        *(Binding(str(place), f"view('{key}')", key, show=False) for place, (key, _) in enumerate(_VIEWS, start=1)),
        Binding("r", "again", "Again"),
        Binding("question_mark", "app.help", "Help", key_display="?"),
        Binding("escape", "leave", "Back"),
    ]

    DEFAULT_CSS = """
    DataScreen {
        & #data-head { height: 1; padding: 0 1; background: $panel; text-wrap: nowrap; text-overflow: ellipsis; }
        & TabRow { padding: 0 1; }
        & #data-row-head { height: auto; max-height: 2; padding: 0 1; }
        & #data-views { height: 1fr; }
        & .view { display: none; width: 1fr; height: 1fr; padding: 0 1; }
        & .view.-chosen { display: block; }
        & #beside { display: none; width: 1fr; height: 1fr; }
        & #beside.-chosen { display: block; }
        & VerticalScroll { scrollbar-size-vertical: 1; }
        & VerticalScroll > Static { height: auto; }
        & #data-note { height: auto; max-height: 4; padding: 0 1; color: $text-warning; display: none; }
        & #data-note.-shown { display: block; }
        & Input { display: none; margin: 0 1; }
    }
    DataScreen.-wide {
        & #data-views { layout: horizontal; }
        & #row { display: block; width: 3fr; }
        & #beside { display: block; width: 2fr; border-left: solid $foreground 20%; }
        & #facts { display: block; }
        & #left, & #repeats { height: auto; max-height: 60%; margin-bottom: 1; }
    }
    """

    view: reactive[str] = reactive("row")
    """Which view is chosen."""

    class Heard(Message):
        """The process said something."""

        def __init__(self, process: ShowProcess | None, event: ShowEvent) -> None:
            """Carry it, and the process, which may have been replaced meanwhile."""
            super().__init__()
            self.process, self.event = process, event

    def __init__(self, request: ShowRequest, *, services: Services) -> None:
        """Look at the data of a recipe."""
        super().__init__()
        self._request, self._services = request, services
        self._process: ShowProcess | None = None
        self._opened: Opened | None = None
        self._summary = Summary()
        self._row: RowShown | None = None
        self._below: list[RowShown] = []
        # The process answers in turn: for each row that it was asked for, whether it is to stand below another one.
        self._asked: deque[bool] = deque()
        self._only: Filter = "all"
        self._sought = ""
        self._asking = ""
        self._state = "starting"
        self._closed = self._ended = False

    def compose(self) -> ComposeResult:
        """Make the parts: head, names of the views, row, views, note, line, keys."""
        yield Static("", id="data-head", markup=False)
        yield TabRow(_VIEWS, self.view)
        yield Static("", id="data-row-head", markup=False)
        with Container(id="data-views"):
            yield TokenView(id="row").add_class("view")
            with Vertical(id="beside"):
                for key in ("left", "repeats", "facts"):
                    with VerticalScroll(id=key, classes="view"):
                        yield Static("", markup=False)
        yield Static("", id="data-note", markup=False)
        yield Input(compact=True)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Start the process."""
        self._show_head()
        self._choose(self.view)
        self._talk()

    def on_unmount(self) -> None:
        """End the process with the screen, however it is left."""
        self._closed = True
        if self._process is not None:
            self._process.close()

    def watch_view(self, view: str) -> None:
        """Show the chosen view."""
        if self.is_mounted:
            self._choose(view)

    def on_tab_row_wanted(self, message: TabRow.Wanted) -> None:
        """Choose the view whose name was clicked."""
        self.view = message.key

    def on_resize(self) -> None:
        """Draw the bars for the new width, and fill the new room."""
        self.call_after_refresh(self._show_facts)
        self.call_after_refresh(self._ask_below)

    def on_data_screen_heard(self, message: Heard) -> None:
        """Show what the process said."""
        if message.process is not self._process:
            return
        event = message.event
        match event:
            case Loading():
                self._state = event.detail + (f" {event.fraction:.0%}" if event.fraction else "")
            case Opened():
                self._open(event)
            case RowShown() | NoRow():
                self._take(event, below=self._asked.popleft())
            case Summary():
                self._summary = event
                self._show_facts()
            case NotAnswered():
                self._ended = self._ended or event.fatal
                if not event.fatal and self._asked:
                    self._asked.popleft()
                self._note(f"{event.message} {event.advice}" + (" r looks again." if event.fatal else ""))
                self._state = "ended" if self._ended else self._state
                self.refresh_bindings()
        self._show_head()

    async def on_key(self, event: events.Key) -> None:
        """Take keys that were typed at once with the one that opens the line, before the line has the focus."""
        line = self.query_one(Input)
        if self._asking and self.focused is line and event.is_printable and event.character:
            line.insert_text_at_cursor(event.character)
            event.stop()
        elif self._asking and event.key == "enter":
            await line.action_submit()
            event.stop()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Go to the row of that number, or to the next one that says these words."""
        event.stop()
        asking, words = self._asking, event.value.strip()
        self._end_asking()
        if self._process is None:
            return
        if asking == "number" and words:
            digits = words.replace(" ", "").replace(",", "")
            if digits.isdecimal():
                self._ask(self._process.ask_number, int(digits[:18]))
            else:
                self._note(f"'{words}' is no number of a row.")
        elif asking == "words":
            self._sought = words
            place = self._row.place if self._row else 0
            if words:
                self._ask(partial(self._process.ask_next, around=True), place - 1, 1, self._only, words)
            elif self._row is not None:
                self._show_row(self._row)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer keys only where they do something."""
        if action in ("go", "ask", "turn_filter", "turn_borders"):
            return self._opened is not None and not self._ended and not self._asking
        if action in ("next_view", "view"):
            return not self._asking
        return self._ended if action == "again" else True

    def action_go(self, step: int) -> None:
        """Show the next row or the one before, of those that are gone through."""
        if self._process is not None:
            place = self._row.place if self._row else -1
            self._ask(self._process.ask_next, place, step, self._only, self._sought)

    def action_ask(self, what: str) -> None:
        """Ask for a number or words."""
        self._asking = what
        line = self.query_one(Input)
        line.placeholder, line.value = _ASKS[what], self._sought if what == "words" else ""
        line.display = True
        self.set_focus(line)  # not focus(): it waits, and keys that were typed at once would miss the line
        self.refresh_bindings()

    def action_turn_filter(self) -> None:
        """Go through other rows: all, cut ones, those left out, held-out ones, repeats."""
        self._only = FILTERS[(FILTERS.index(self._only) + 1) % len(FILTERS)]
        if self._process is not None and self._only != "all":
            self._ask(self._process.ask_next, -1, 1, self._only, self._sought)
        self._note("")
        self._show_row_head()

    def action_turn_borders(self) -> None:
        """Show where tokens end, or no longer."""
        view = self.query_one(TokenView)
        view.borders = not view.borders

    def action_view(self, key: str) -> None:
        """Choose a view."""
        self.view = key

    def action_next_view(self, direction: int) -> None:
        """Choose the view after or before."""
        keys = [key for key, _ in _VIEWS]
        self.view = keys[(keys.index(self.view) + direction) % len(keys)]

    def action_again(self) -> None:
        """Start another process after the last one has ended."""
        self._ended, self._opened, self._process, self._state = False, None, None, "starting"
        self._asked.clear()
        self._note("")
        self._show_head()
        self.refresh_bindings()
        self._talk()

    def action_leave(self) -> None:
        """End the question, or leave the screen."""
        if self._asking:
            self._end_asking()
        else:
            self.dismiss()

    def _end_asking(self) -> None:
        self._asking = ""
        self.query_one(Input).display = False
        self._choose(self.view)
        self.refresh_bindings()

    def _choose(self, view: str) -> None:
        self.query_one(TabRow).current = view
        for key, _ in _VIEWS:
            self.query_one(f"#{key}").set_class(key == view, "-chosen")
        self.query_one("#beside").set_class(view != "row", "-chosen")
        self.set_focus(self.query_one(f"#{view}"))

    def _open(self, opened: Opened) -> None:
        self._opened = opened
        self._show_facts()
        self.refresh_bindings()
        if opened.rows and self._process is not None:
            self._ask(self._process.ask_place, 0)
        elif not opened.rows:
            self._note("No row of this file can be used: see what was found in them.")
            self.view = "left"

    def _ask(self, ask: Callable[..., None], *words: object, below: bool = False) -> None:
        self._asked.append(below)
        ask(*words)

    def _ask_below(self) -> None:
        """Ask for the row that follows the last one, where there is room for it and no other row is waited for."""
        if self._row is None or self._process is None or self._asked or len(self._below) >= _MOST_BELOW:
            return
        if self.query_one(TokenView).free_rows > 1:
            last = (self._below or [self._row])[-1]
            self._ask(self._process.ask_next, last.place, 1, self._only, self._sought, below=True)

    def _take(self, row: RowShown | NoRow, *, below: bool) -> None:
        """Show the row that was asked for, or add the one that follows unless another was asked for meanwhile."""
        if isinstance(row, NoRow):
            if not below:
                self._note(row.message)
        elif not below:
            self._show_row(row)
        elif all(self._asked):
            self._below.append(row)
            head = Token(row_head(row, "all", "").plain, "head")
            self.query_one(TokenView).add([head, *row_tokens(row)])
            self._ask_below()

    def _show_row(self, row: RowShown) -> None:
        self._row, self._below = row, []
        self._note("")
        self.query_one(TokenView).show(row_tokens(row) or [Token("(empty)", "note")], self._sought)
        self._show_row_head()
        self._ask_below()

    def _show_row_head(self) -> None:
        words = row_head(self._row, self._only, self._sought) if self._row else Content("")
        self.query_one("#data-row-head", Static).update(words)

    def _show_facts(self) -> None:
        if self._opened is None or not self.is_mounted:
            return
        place = self.query_one("#facts")
        room = place.scrollable_content_region.width or self.app.size.width // 2
        texts = {
            "facts": facts_text(self._opened, self._summary, room),
            "left": left_out_text(self._opened, self._summary),
            "repeats": repeats_text(self._summary),
        }
        for key, text in texts.items():
            self.query_one(f"#{key} > Static", Static).update(text)

    def _show_head(self) -> None:
        state = plain(self._state, one_line=True)
        if self._opened is not None and not self._ended:
            left = sum(self._summary.left_out.values()) or sum(self._opened.left_out.values())
            told = f", {count(left)} left out" if left else ""
            state = f"{plain(self._opened.described, one_line=True)}{told}"
        recipe = self._request.recipe
        name = "" if recipe.data.sources else plain(recipe.data.path.rpartition("/")[2], one_line=True, limit=30)
        model = plain(recipe.model.base.rstrip("/").rpartition("/")[2], one_line=True, limit=30)
        words = Content.assemble(("Data", "bold"), f"  {name}  ", state, f"  as {model} reads it")
        self.query_one("#data-head", Static).update(words)

    def _note(self, words: str) -> None:
        note = self.query_one("#data-note", Static)
        note.update(Content(plain(words.strip())))
        note.set_class(bool(words.strip()), "-shown")

    @work(thread=True, group="show")
    def _talk(self) -> None:
        """Start the process and pass on what it says, until the screen is left."""
        try:
            process = self._services.show_data(self._request)
        except StudioError as error:
            self.post_message(self.Heard(None, NotAnswered(str(error))))
            return
        self._process = process
        while not self._closed:  # the screen may have been left while the process was started
            event = process.next_event(0.2)
            if event is not None:
                self.post_message(self.Heard(process, event))
                if isinstance(event, NotAnswered) and event.fatal:
                    break
        process.close()
