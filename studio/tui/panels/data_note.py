"""What is known of the recipe's data, looked up while nothing is turned: the worst in a row, and more below it."""

from functools import partial
from typing import TYPE_CHECKING, Any

from textual import events, work
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from studio.core.errors import StudioError
from studio.core.recipe import FIELDS, Recipe
from studio.core.text import plain_path
from studio.tui.services import Services

if TYPE_CHECKING:
    from textual.timer import Timer

    from studio.probe.data.sampled import RowsGuess
    from studio.runs.show import ShowEvent, ShowProcess, Summary

_LOOK_AFTER_SECONDS = 2.0
_KEEP_SECONDS = 60.0
"""How long the process is kept after it has added up all rows: another row length needs no second look then."""
_NAME_CELLS = 28
_CUT = "train.seq_len"
_UNSEEN = Content.styled("cannot be looked at", "$text-warning")
_GROUND = ("model.base", "model.revision", "model.trust_remote_code", "eval.rows", "train.seed", "train.objective")


class DataNote(Static):
    """Follows the recipe; a click asks for the whole screen. Where it has several rows, the facts follow the first."""

    DEFAULT_CSS = """
    DataNote {
        border-title-color: $text-primary;
        border-title-style: bold;
        height: 1;
        padding: 0 1;
        text-wrap: nowrap;
        text-overflow: ellipsis;
    }
    """

    class Wanted(Message):
        """The user wants to see the rows."""

    class Measured(Message):
        """The longest row is known, or known no more."""

        def __init__(self, longest_tokens: int | None) -> None:
            """Carry its tokens."""
            super().__init__()
            self.longest_tokens = longest_tokens

    class Heard(Message):
        """The process said something."""

        def __init__(self, process: "ShowProcess", event: "ShowEvent") -> None:
            """Carry both."""
            super().__init__()
            self.process, self.event = process, event

    def __init__(self, recipe: Recipe, *, services: Services) -> None:
        """Begin with a recipe; nothing is looked up before `begin`."""
        super().__init__(markup=False)
        self.border_title = "Data"
        self._recipe, self._services = recipe, services
        self._looked: tuple[Any, ...] = ()
        self._waits = True
        self._process: ShowProcess | None = None
        self._opened: Any = None
        self._timer: Timer | None = None
        self._end_timer: Timer | None = None
        self._words, self._keys_named = Content(""), True
        self._summary: Summary | None = None
        self._guess: tuple[Any, RowsGuess | None] = None, None
        self._longest_tokens: int | None = None

    def on_mount(self) -> None:
        """Name the file."""
        self._tell(Content(""))

    def begin(self) -> None:
        """Guess at once from the beginning of the file, and look soon."""
        self._waits = False
        self._look_soon()
        self._guess_soon()

    def on_unmount(self) -> None:
        """End the process."""
        self._end()

    def on_click(self, event: events.Click) -> None:
        """Ask for the rows."""
        event.stop()
        self.post_message(self.Wanted())

    def follow(self, recipe: Recipe) -> None:
        """Take another recipe. Where only the row length is another, the rows are not read again."""
        before, self._recipe = self._recipe, recipe
        self._guess_soon()
        if not self._looked:
            if before.get("data.path") != recipe.get("data.path"):
                self._tell(Content(""))
            return
        if _ground_of(recipe) != self._looked:
            self._looked = ()
            self._end()
            self._know(None)
            self._tell(Content(""))
            self._look_soon()
        elif _cuts(before) != _cuts(recipe):
            if self._process is not None and not recipe.problems():
                self._process.cut_at(recipe.train.seq_len, recipe.rows_per_step)
            else:
                self._looked = ()
                self._look_soon()

    def _guess_soon(self) -> None:
        """Guess anew, where a panel has room for it and the data or what is told of it is another."""
        sought = (_ground_of(self._recipe), _cuts(self._recipe))
        if not self._waits and self.size.height > 1 and sought != self._guess[0] and not self._recipe.problems():
            self._guess = sought, self._guess[1]
            self._guess_now(self._recipe)

    @work(thread=True, exclusive=True, group="data-guess")
    def _guess_now(self, recipe: Recipe) -> None:
        guess = self._services.guess_data(recipe)
        self.app.call_from_thread(self._take_guess, guess)

    def _take_guess(self, guess: "RowsGuess | None") -> None:
        self._guess = self._guess[0], guess
        self._tell(self._words)

    def name_keys(self, named: bool) -> None:
        """Name the key that shows the rows, or do not while letters go into a field."""
        if named != self._keys_named:
            self._keys_named = named
            self._tell(self._words)

    def on_data_note_heard(self, message: Heard) -> None:
        """Say the worst of what the process has found so far."""
        from studio.runs.piped import NotAnswered  # noqa: PLC0415  not needed for the first frame
        from studio.runs.show import Opened, Summary  # noqa: PLC0415  not needed for the first frame
        from studio.tui.panels.data_text import worst_line  # noqa: PLC0415  as above

        message.stop()
        if message.process is not self._process:
            return
        event = message.event
        if isinstance(event, Opened):
            self._opened = event
        elif isinstance(event, Summary) and self._opened is not None and (event.done or not event.rows):
            self._know(event)
            self._tell(worst_line(self._opened, event))
            if event.whole:
                self._end_later()
        elif isinstance(event, NotAnswered) and event.fatal:
            self._know(None)
            # What is wrong is said by the check before a run, and by the screen of the data; here is room for a word.
            self._tell(_UNSEEN)
            self._end()

    def on_resize(self) -> None:
        """Draw it anew: what is told depends on the room."""
        self._tell(self._words)
        self._guess_soon()

    def _know(self, summary: "Summary | None") -> None:
        """Take what the rows add up to, and tell how long the longest is once all of them are in it."""
        self._summary = summary
        known = summary is not None and summary.whole and summary.lengths
        longest = round(known["max"]) if known else None
        if longest != self._longest_tokens:
            self._longest_tokens = longest
            self.post_message(self.Measured(longest))

    def _look_soon(self) -> None:
        if self._timer is not None:
            self._timer.stop()
        if not self._waits:
            self._timer = self.set_timer(_LOOK_AFTER_SECONDS, self._look_now)

    def _look_now(self) -> None:
        if self._recipe.problems():
            self._look_soon()
            return
        self._looked = _ground_of(self._recipe)
        self._talk(self._recipe)

    def _end_later(self) -> None:
        if self._end_timer is not None:
            self._end_timer.stop()
        self._end_timer = self.set_timer(_KEEP_SECONDS, self._end)

    def _end(self) -> None:
        if self._end_timer is not None:
            self._end_timer.stop()  # it was set for this process, not for the next
        process, self._process = self._process, None
        if process is not None:
            process.close()

    def _tell(self, words: Content) -> None:
        self._words = words
        sources = self._recipe.data.sources
        name = f"{len(sources)} sources" if sources else plain_path(str(self._recipe.data.path), _NAME_CELLS)
        shown = words
        if self._keys_named and words == _UNSEEN:
            shown = words + Content.styled(": d says why", "$text-warning")
        elif self._keys_named and not words:
            shown = Content.styled("d shows the rows as the model reads them", "dim")
        tall = self.size.height > 1
        text = Content.assemble("" if tall else ("Data ", "bold"), (f"{name}  ", "dim"), shown)
        if self._summary is not None and self._opened is not None and tall:
            from studio.tui.panels.data_text import glance_text  # noqa: PLC0415  not needed for the first frame

            text = Content.assemble(text, "\n\n", glance_text(self._opened, self._summary, self.content_size.width))
        elif (guess := self._guess[1]) is not None and tall:
            from studio.tui.panels.data_text import guess_text  # noqa: PLC0415  as above

            text = Content.assemble(text, "\n\n", guess_text(guess, self._recipe, self.content_size.width))
        if text != self.content:
            self.update(text, layout=False)

    @work(thread=True, exclusive=True, group="data-note")
    def _talk(self, recipe: Recipe) -> None:
        """Start a process and pass on what it says, until all rows are added up or another one takes its place."""
        try:
            process = self._services.glance_at_data(recipe)
        except StudioError:
            return
        if process is None:
            return
        if not self.is_attached:
            process.close()
            return
        self._process = process
        while self._process is process:
            event = process.next_event(0.2)
            if event is not None:
                self.app.call_from_thread(partial(self.post_message, self.Heard(process, event)))
                if getattr(event, "fatal", False):
                    break
        process.close()


def _ground_of(recipe: Recipe) -> tuple[Any, ...]:
    """Return what the rows depend on, besides where they are cut."""
    paths = [path for path in FIELDS if path.startswith("data.") or path in _GROUND]
    return tuple(recipe.get(path) for path in paths)


def _cuts(recipe: Recipe) -> tuple[Any, ...]:
    return recipe.get(_CUT), recipe.rows_per_step
