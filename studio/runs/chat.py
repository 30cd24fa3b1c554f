"""A chat with a model: what is asked and answered, and the process that answers.

The process (`python -m studio.jobs.chat`) reads a JSON object a line on its stdin and writes one a line on its stdout.
It has pipes instead of a run directory or a port. A chat leaves nothing to come back to, so it must end when the
process that asks has ended, in whatever way: a pipe tells it. And nobody else on the machine can use a pipe.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self

from studio.core.errors import BadInput, StudioError
from studio.core.text import plain
from studio.runs.failure import Doing
from studio.runs.last_words import reason_in
from studio.runs.supervise import child_environment

MODULE = "studio.jobs.chat"
Side = Literal["tuned", "base"]
_LEAVE_SECONDS = 2.0
_LAST_CHARACTERS = 16_000


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """Which model answers.

    Attributes:
        base: A model folder, a hub id or `embedded`; a merged model's folder if there is no adapter.
        adapter: Absolute path of a PEFT folder; empty to chat with `base` alone.
        revision: Revision of a hub model.
        method: `lora` or `qlora`: whether the base is loaded in 16 or in 4 bit.
        dtype: Type of the unquantised weights: `auto`, `bf16`, `fp16` or `fp32`.
        quant_type: QLoRA's 4-bit code.
        double_quant: Whether the scales are quantised too.
        skip_modules: What stays in 16 bit, as in a recipe.
        attention: Which attention implementation.
        device: As in a recipe.
        data_format: Format of the training data, which decides the plain template of a model without a chat template.
        trust_remote_code: Whether Python code that comes with the base is run.
        beside: Another model, which answers as the base if `base` is a merged model; empty for none.
        beside_revision: Revision of that model.
        environment: What is added to the process's environment, so that it computes on the chosen card.
        note: What the user should know about the card.
    """

    base: str
    adapter: str = ""
    revision: str = ""
    method: str = "lora"
    dtype: str = "auto"
    quant_type: str = "nf4"
    double_quant: bool = True
    skip_modules: tuple[str, ...] = ()
    attention: str = "sdpa"
    device: str = "auto"
    data_format: str = "chat"
    trust_remote_code: bool = False
    beside: str = ""
    beside_revision: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen. At temperature 0 it is the likeliest, so that tuning alone makes a difference."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 512
    seed: int = 0

    def problems(self) -> list[str]:
        """Return what is wrong, in a sentence for each value."""
        ranges = {
            "temperature": (0, 5), "top_p": (0.01, 1), "top_k": (0, 10**6), "repetition_penalty": (0.5, 3),
            "max_new_tokens": (1, 10**6), "seed": (0, 2**63 - 1),
        }  # fmt: skip
        return [
            f"{name.replace('_', ' ')} is {getattr(self, name)}; wanted {low:,} to {high:,}."
            for name, (low, high) in ranges.items()
            if not low <= getattr(self, name) <= high
        ]


@dataclass(frozen=True, slots=True)
class Loading:
    """The model is being loaded."""

    detail: str = ""
    fraction: float | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Questions can be asked. `notes` are for the user to know."""

    sides: tuple[str, ...] = ()
    device: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer."""

    side: Side
    text: str


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer is whole. `reason` is stop (a stop token), length, cancelled, or context (no room is left)."""

    side: Side
    tokens: int
    seconds: float
    reason: str
    dropped_turns: int = 0


@dataclass(frozen=True, slots=True)
class TurnDone:
    """All sides have answered."""


@dataclass(frozen=True, slots=True)
class ChatFailed:
    """A question could not be answered, or (`fatal`) the process ends."""

    message: str
    advice: str = ""
    fatal: bool = True
    bad_input: bool = False


ChatEvent = Loading | Ready | Piece | Answered | TurnDone | ChatFailed
_EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Loading, Ready, Piece, Answered, TurnDone, ChatFailed)
}


def event_line(event: ChatEvent) -> str:
    """Return an event as one line of JSON."""
    return json.dumps({"kind": type(event).__name__, **asdict(event)})


def read_event(line: str) -> ChatEvent | None:
    """Return the event of a line; None for any other line."""
    try:
        table = json.loads(line)
        kind = _EVENTS[table.pop("kind")]
        known = {item.name for item in fields(kind)}
        values = {
            key: tuple(value) if isinstance(value, list) else value for key, value in table.items() if key in known
        }
        event: ChatEvent = kind(**values)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return event


@dataclass(slots=True)
class Conversation:
    """The conversation so far, with a history for each side: the sides answer differently."""

    system: str = ""
    turns: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def messages(self, side: str, question: str) -> list[dict[str, str]]:
        """Return the messages of a side with a new question at their end."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        said = [
            {"role": role, "content": text}
            for pair in self.turns.get(side, [])
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        return [*head, *said, {"role": "user", "content": question}]

    def add(self, side: str, question: str, answer: str) -> None:
        """Keep an answered question."""
        self.turns.setdefault(side, []).append((question, answer))

    def clear(self) -> None:
        """Forget all."""
        self.turns.clear()


class ChatProcess:
    """The parent's end of a chat. Use as a context: leaving it ends the process."""

    def __init__(self, request: ChatRequest, *, module: str = MODULE) -> None:
        """Start the process; it loads the model at once.

        Raises:
            StudioError: It cannot be started.
        """
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._events: queue.Queue[ChatEvent | None] = queue.Queue()
        try:
            self._process: Any = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=child_environment(request.environment),
                cwd=Path.home(),
                # Ctrl-C is for the parent alone: it stops an answer, not the process that holds the model.
                start_new_session=sys.platform != "win32",
            )
        except OSError as error:
            raise StudioError(f"the chat's process cannot be started: {error.strerror or error}.") from error
        threading.Thread(target=self._listen, daemon=True).start()
        self._send({"load": asdict(request)})

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the process."""
        self.close()

    def ask(self, messages: dict[str, list[dict[str, str]]], sampling: Sampling) -> None:
        """Ask every side its own messages; the answers come as events.

        Args:
            messages: For each side, in the order in which they answer.
            sampling: How.
        """
        self._send({"ask": messages, "sampling": asdict(sampling)})

    def cancel(self) -> None:
        """End the answers that are being given."""
        self._send({"cancel": True})

    def next_event(self, seconds: float) -> ChatEvent | None:
        """Return the next event, None if none came in time; after the process has ended, the reason why."""
        try:
            event = self._events.get(timeout=seconds)
        except queue.Empty:
            return None
        if event is None:
            self._events.put(None)
            return self._ended()
        return event

    def events(self, *, until: type[Any], poll: Callable[[], None] = lambda: None) -> Iterator[ChatEvent]:
        """Yield events up to the first of a kind, or a fatal failure; `poll` is called in between."""
        while True:
            event = self.next_event(0.1)
            poll()
            if event is None:
                continue
            yield event
            if isinstance(event, until) or (isinstance(event, ChatFailed) and event.fatal):
                return

    def close(self) -> None:
        """End the process at once: it has nothing to save."""
        if self._process.poll() is None:
            self._process.kill()
        try:
            self._process.wait(_LEAVE_SECONDS)
        except subprocess.TimeoutExpired:
            return
        finally:
            for stream in (self._process.stdin, self._errors):
                try:
                    stream.close()
                except (OSError, ValueError):  # ValueError: another thread has closed it meanwhile
                    continue

    def _send(self, table: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(table) + "\n")
            self._process.stdin.flush()
        except (OSError, ValueError):
            return  # it has ended: the events say so

    def _listen(self) -> None:
        try:
            for line in self._process.stdout:
                event = read_event(line)
                if event is not None:
                    self._events.put(event)
        except (OSError, ValueError):
            pass
        self._process.wait()
        self._events.put(None)

    def _ended(self) -> ChatFailed:
        """Return why the process is gone, as far as its last lines tell: native code ends it without an event."""
        code = self._process.poll()
        killed = " (the system does that when its memory is full)" if code == -9 else ""
        try:
            self._errors.seek(0, 2)
            self._errors.seek(max(0, self._errors.tell() - _LAST_CHARACTERS))
            said = self._errors.read().decode("utf-8", "replace").strip()
        except (OSError, ValueError):
            said = ""
        if reason := reason_in(said.splitlines(), Doing("chat"), then="then start the chat again"):
            return ChatFailed(f"the chat's process has ended: {reason}", reason.advice)
        last = plain(said.splitlines()[-1], one_line=True, limit=300) if said else ""
        words = f", exit code {code}{killed}{': ' + last if last else ''}"
        return ChatFailed(f"the chat's process has ended{words}", "start the chat again")


def check_sampling(sampling: Sampling) -> Sampling:
    """Return the sampling itself.

    Raises:
        BadInput: Values are out of range; the message names all of them.
    """
    if problems := sampling.problems():
        raise BadInput(" ".join(problems))
    return sampling
