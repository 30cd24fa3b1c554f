"""Try it: one question, two columns of answers, the base's and the tuned model's, as they are written."""

from dataclasses import replace
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.screen import Screen
from textual.widgets import Input, Static

from studio.core.errors import StudioError
from studio.core.text import plain
from studio.probe.chat import request_of_run
from studio.runs.chat import (
    Answered,
    ChatEvent,
    ChatProcess,
    Conversation,
    Piece,
    Ready,
    Sampling,
    TurnDone,
    told_system,
)
from studio.runs.layout import RunPaths
from studio.runs.piped import Loading, NotAnswered
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt
from studio.tui.copying import Copied
from studio.tui.services import Services
from widgets.key_footer import KeyFooter

_TITLES = {"base": "base", "tuned": "tuned"}
_STEPS = (0.0, 0.3, 0.7, 1.0)
_LONGEST = 20_000
_LONGEST_TOLD = 300
_LOADING = "The model is loading; a question can be typed already"


class Column(VerticalScroll):
    """Shows what one side has said. A model wrote it, so it is never read as markup."""

    DEFAULT_CSS = """
    Column {
        width: 1fr;
        padding: 0 1;
        border-top: solid $foreground 20%;
        border-title-color: $foreground;
        border-title-style: bold;
        & > Static { height: auto; }
    }
    """

    def __init__(self, side: str) -> None:
        """Start empty."""
        super().__init__(Static("", markup=False), id=f"side-{side}")
        self.border_title = _TITLES[side]
        self._said: list[tuple[str, str, str]] = []

    def ask(self, question: str) -> None:
        """Begin another answer."""
        self._said.append((question, "", ""))
        self._show()

    def write(self, text: str) -> None:
        """Go on with the last answer."""
        if self._said:
            question, answer, end = self._said[-1]
            self._said[-1] = (question, (answer + text)[-_LONGEST:], end)
            self._show()

    def conclude(self, words: str) -> str:
        """End the last answer; return it."""
        if not self._said:
            return ""
        question, answer, _ = self._said[-1]
        self._said[-1] = (question, answer.strip(), words)
        self._show()
        return answer.strip()

    def divide(self, how: str) -> None:
        """Draw a line below what was said, where a new conversation begins with or without the system prompt."""
        if self._said:
            self._said.append(("", "", f"─── {how} the system prompt, from the beginning ───"))
            self._show()

    @property
    def has_said(self) -> bool:
        """Whether a question or an answer stands here."""
        return bool(self._said)

    def clear(self) -> None:
        """Remove all questions and answers."""
        self._said.clear()
        self._show()

    def _show(self) -> None:
        lines: list[str | tuple[str, str]] = []
        for question, answer, end in self._said:
            if question:
                lines += [(f"{plain(question)}\n", "bold"), f"{plain(answer)}\n"]
            lines.append((f"{end}\n\n", "dim"))
        self.query_one(Static).update(Content.assemble(*lines))
        self.scroll_end(animate=False)


class ChatScreen(Screen[None]):
    """A chat. The model's process lives as long as this screen."""

    HELP = "Questions to the tuned model and its base, side by side. The model is unloaded when this screen is left."
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "stop", "Stop answer", priority=True),
        Binding("ctrl+n", "forget", "New", priority=True),
        Binding("ctrl+t", "warmer", "Temperature", priority=True),
        Binding("ctrl+r", "turn_base", "With base", priority=True),
        Binding("ctrl+o", "turn_system", "System prompt", priority=True),
        Binding("ctrl+y", "app.copy", "Copy", priority=True),
        Binding("f1", "app.help", "Help"),
        Binding("escape", "leave", "Back"),
    ]
    """No key is a prefix of tmux (ctrl+b) or screen (ctrl+a), or stops a terminal's output (ctrl+s) or resumes it
    (ctrl+q)."""

    DEFAULT_CSS = """
    ChatScreen {
        & #chat-head { height: 1; padding: 0 1; background: $panel; text-wrap: nowrap; text-overflow: ellipsis; }
        & #chat-system { height: auto; max-height: 2; padding: 0 1; color: $text-muted; }
        & #columns { height: 1fr; }
        & Column.-hidden { display: none; }
        & #chat-notes { height: auto; max-height: 6; padding: 0 1; color: $text-warning; }
        & Input { margin: 0 1; }
    }
    """

    class Heard(Message):
        """The model's process said something."""

        def __init__(self, event: ChatEvent) -> None:
            """Carry it."""
            super().__init__()
            self.event = event

    class Asks(Message):
        """It is known which model is asked, and what its training's rows began with."""

        def __init__(self, trained_with: SystemPrompt) -> None:
            """Carry the system prompt of the training."""
            super().__init__()
            self.trained_with = trained_with

    def __init__(self, paths: RunPaths, *, services: Services) -> None:
        """Chat with what a run made."""
        super().__init__()
        self._paths, self._services = paths, services
        self._process: ChatProcess | None = None
        self._said, self._sampling, self._trained_with = Conversation(), Sampling(), NO_SYSTEM_PROMPT
        self._sides: tuple[str, ...] = ()
        self._question = ""
        self._sends_when_ready = False
        self._state = "starting the model's process"
        self._busy, self._with_base, self._closed, self._ended = True, True, False, False

    def compose(self) -> ComposeResult:
        """Make the parts: head, columns, notes, question, keys."""
        yield Static("", id="chat-head", markup=False)
        yield Static("", id="chat-system", markup=False)
        with Vertical():
            with Horizontal(id="columns"):
                yield Column("base")
                yield Column("tuned")
            yield Static("", id="chat-notes", markup=False)
            yield Input(placeholder=_LOADING, compact=True)
        yield KeyFooter()

    def on_mount(self) -> None:
        """Start the process; a question can be typed meanwhile."""
        self._show_head()
        self.query_one(Input).focus()
        self._talk()

    def on_unmount(self) -> None:
        """End the process with the screen, however it is left."""
        self._closed = True
        if self._process is not None:
            self._process.close()

    def on_chat_screen_asks(self, message: Asks) -> None:
        """Begin with the system prompt of the training."""
        self._trained_with = message.trained_with
        self._said.system = message.trained_with.usual
        self._show_system()

    def on_chat_screen_heard(self, message: Heard) -> None:
        """Show what the model's process said."""
        event = message.event
        if isinstance(event, Loading):
            self._state = event.detail + (f" {event.fraction:.0%}" if event.fraction else "")
        elif isinstance(event, Ready):
            self._be_ready(event)
        elif isinstance(event, Piece):
            self.query_one(f"#side-{event.side}", Column).write(event.text)
        elif isinstance(event, Answered):
            self._conclude(event)
        elif isinstance(event, TurnDone):
            self._set_busy(False)
        elif isinstance(event, NotAnswered):
            self._note(f"{event.message} {event.advice}")
            self._ended = self._ended or event.fatal
            self._state = "ended" if self._ended else self._state
            self._set_busy(self._ended)  # after any other failure another question can be asked
        self._show_head()

    def on_input_changed(self, event: Input.Changed) -> None:
        """A question that waits to be asked and is changed needs another enter."""
        event.stop()
        self._sends_when_ready = False
        self._show_head()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Ask. While the model is loading or answering, the question stays in its line and is asked afterwards."""
        event.stop()
        if self._busy or self._process is None:
            self._sends_when_ready = bool(event.value.strip()) and not self._ended
            self._show_head()
        else:
            self._ask()

    def _ask(self) -> None:
        line = self.query_one(Input)
        question, self._sends_when_ready = line.value.strip(), False
        if not question or self._process is None:
            return
        line.value = ""
        self._note("")
        self._question = question
        self._set_busy(True)
        for side in self._asked:
            self.query_one(f"#side-{side}", Column).ask(question)
        self._process.ask({side: self._said.messages(side, question) for side in self._asked}, self._sampling)
        self._show_head()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Offer keys only where they do something."""
        if action == "stop":
            return self._busy and bool(self._sides) and not self._ended
        if action in ("forget", "turn_base") and (self._busy or self._ended):
            return False
        if action == "forget":
            return any(column.has_said for column in self.query(Column))
        if action == "turn_system":
            return bool(self._trained_with.text) and not self._busy and not self._ended
        return len(self._sides) > 1 if action == "turn_base" else True

    def action_stop(self) -> None:
        """End the answers that are being given; where the mouse has marked text, copy that."""
        if self.get_selected_text():
            self.action_copy_text()
        elif self._process is not None:
            self._process.cancel()

    def action_forget(self) -> None:
        """Begin a new conversation."""
        if not self._busy:
            self._said.clear()
            for column in self.query(Column):
                column.clear()
            self.refresh_bindings()

    def action_warmer(self) -> None:
        """Take the next higher temperature, and after the highest the lowest."""
        later = [step for step in _STEPS if step > self._sampling.temperature]
        self._sampling = replace(self._sampling, temperature=later[0] if later else _STEPS[0])
        self._show_head()

    def action_turn_base(self) -> None:
        """Ask the base too, or the tuned model alone, which takes half the time."""
        if not self._busy:
            self._with_base = not self._with_base
            self._show_columns()
            self._show_head()

    def action_turn_system(self) -> None:
        """Begin a new conversation without the system prompt of the training, or with it again."""
        self._said = Conversation("" if self._said.system else self._trained_with.text)
        for column in self.query(Column):
            column.divide("with" if self._said.system else "without")
        self._show_system()

    def to_copy(self) -> Copied | None:
        """Return the last answers, under the names of their sides where there are two."""
        last = {side: turns[-1][1] for side in _TITLES if (turns := self._said.turns.get(side))}
        told = [f"{_TITLES[side]}: {answer}" if len(last) > 1 else answer for side, answer in last.items()]
        return Copied("the last answer" + "s" * (len(told) > 1), plain("\n\n".join(told))) if told else None

    def action_leave(self) -> None:
        """End the chat."""
        self.dismiss()

    @property
    def _asked(self) -> tuple[str, ...]:
        return self._sides if self._with_base else tuple(side for side in self._sides if side != "base")

    def _be_ready(self, event: Ready) -> None:
        self._sides = event.sides
        self._state = f"{event.dtype} on {event.device}"
        self._note("\n".join(event.notes))
        self._show_columns()
        self._set_busy(False)

    def _conclude(self, event: Answered) -> None:
        ends = {"length": "cut: long enough", "cancelled": "stopped", "context": "cut: the context is full"}
        pace = f"{event.tokens} tokens, {event.tokens / max(event.seconds, 1e-6):.1f} a second"
        answer = self.query_one(f"#side-{event.side}", Column).conclude(
            "; ".join(word for word in (pace, ends.get(event.reason, "")) if word)
        )
        self._said.add(event.side, self._question, answer)

    def _show_columns(self) -> None:
        for side in ("base", "tuned"):
            self.query_one(f"#side-{side}", Column).set_class(side not in self._asked, "-hidden")

    def _set_busy(self, busy: bool) -> None:
        self._busy = busy
        line = self.query_one(Input)
        line.disabled = self._ended
        if self._ended:
            line.placeholder = "It has ended: escape goes back"
        else:
            answering = "ctrl+c stops the answer" if self._sides else _LOADING
            line.placeholder = answering if busy else "Ask something"
        if not busy and self._sends_when_ready:
            self._ask()
        self.refresh_bindings()

    def _show_head(self) -> None:
        name = plain(self._paths.name, one_line=True, limit=48)
        likeliest = "" if self._sampling.temperature else " (the likeliest token)"
        how = f"temperature {self._sampling.temperature:g}{likeliest}"
        waits = ("  your question is asked then", "$text-warning") if self._sends_when_ready else ""
        state = plain(self._state, one_line=True)
        words = Content.assemble(("Try it", "bold"), f"  {state}", waits, f"  {how}  ", (name, "bold"))
        self.query_one("#chat-head", Static).update(words)

    def _show_system(self) -> None:
        told = plain(told_system(self._trained_with, self._said.system), one_line=True, limit=_LONGEST_TOLD)
        self.query_one("#chat-system", Static).update(Content(told))
        self.refresh_bindings()

    def _note(self, words: str) -> None:
        self.query_one("#chat-notes", Static).update(Content(plain(words.strip())))

    @work(thread=True)
    def _talk(self) -> None:
        """Start the process and pass on what it says, until the screen is left."""
        try:
            request = request_of_run(self._paths)
            self.post_message(self.Asks(request.trained_with))
            process = self._services.chat(request)
        except StudioError as error:
            self.post_message(self.Heard(NotAnswered(str(error))))
            return
        self._process = process
        while not self._closed:  # the screen may have been left while the process was started
            event = process.next_event(0.2)
            if event is not None:
                self.post_message(self.Heard(event))
                if isinstance(event, NotAnswered) and event.fatal:
                    break
        process.close()
