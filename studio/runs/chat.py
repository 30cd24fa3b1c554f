"""A chat with a model: what is asked and answered, and the process that answers.

The process (`python -m studio.jobs.chat`) is asked and answers over pipes, see `studio.runs.piped`.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from studio.core.errors import BadInput
from studio.runs.piped import Loading, NotAnswered, PipedProcess
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt

MODULE = "studio.jobs.chat"
Side = Literal["tuned", "base"]


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
        precision: Which parts of a base in 4 bits are held in others, as in a recipe.
        streamed: How many decoder layers wait in main memory.
        attention: Which attention implementation.
        device: As in a recipe.
        data_format: Format of the training data, which decides the plain template of a model without a chat template.
        trust_remote_code: Whether Python code that comes with the base is run.
        beside: Another model, which answers as the base if `base` is a merged model; empty for none.
        beside_revision: Revision of that model.
        environment: What is added to the process's environment, so that it computes on the chosen card.
        note: What the user should know about the card.
        trained_with: The system prompt that the rows of the training began with; an empty one where none is known.
    """

    base: str
    adapter: str = ""
    revision: str = ""
    method: str = "lora"
    dtype: str = "auto"
    quant_type: str = "nf4"
    double_quant: bool = True
    precision: tuple[tuple[str, str], ...] = ()
    streamed: int = 0
    attention: str = "sdpa"
    device: str = "auto"
    data_format: str = "chat"
    trust_remote_code: bool = False
    beside: str = ""
    beside_revision: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    note: str = ""
    trained_with: SystemPrompt = NO_SYSTEM_PROMPT


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


ChatEvent = Loading | Ready | Piece | Answered | TurnDone | NotAnswered
EVENTS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (Loading, Ready, Piece, Answered, TurnDone, NotAnswered)
}


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


def told_system(trained_with: SystemPrompt, system: str) -> str:
    """Return in a sentence which system prompt a chat has, and where that differs from its training; empty for none."""
    if system == trained_with.text and system:
        return f"System prompt, as in {trained_with.rows} of {trained_with.of} rows of the training: {system}"
    own = f"System prompt: {system}" if system else "No system prompt"
    if trained_with.text:
        known = f"{trained_with.rows} of {trained_with.of} rows of the training had: {trained_with.text}"
        return f"{own}; {known}"
    return own if system else ""


class ChatProcess(PipedProcess[ChatEvent]):
    """The parent's end of a chat. Use as a context: leaving it ends the process."""

    def __init__(self, request: ChatRequest, *, module: str = MODULE) -> None:
        """Start the process; it loads the model at once.

        Raises:
            StudioError: It cannot be started.
        """
        super().__init__(
            module,
            {"load": asdict(request)},
            name="chat",
            kinds=EVENTS,
            failed=NotAnswered,
            environment=request.environment,
        )

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


def check_sampling(sampling: Sampling) -> Sampling:
    """Return the sampling itself.

    Raises:
        BadInput: Values are out of range; the message names all of them.
    """
    if problems := sampling.problems():
        raise BadInput(" ".join(problems))
    return sampling
