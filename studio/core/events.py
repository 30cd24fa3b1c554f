"""What a job tells: one frozen value for each line of `events.jsonl`.

A line of an unknown kind is kept as `Unknown` and is no error. Unknown fields of a known kind are dropped.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol

PAIR_FIGURES = ("margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward")
"""What steps and evaluations of pairs of answers tell besides their loss: means over the pairs.

A log-probability is that of an answer, with orpo of one of its tokens. A reward is beta times a log-probability, with
dpo less that under the base; the margin is the chosen reward less the rejected one, and the accuracy the share of pairs
whose margin is above 0.
"""

MEMORY_FIELDS = (
    "allocated_bytes",
    "reserved_bytes",
    "peak_bytes",
    "device_bytes",
    "resident_bytes",
    "resident_peak_bytes",
)
"""What a `MemorySeen` may tell."""

SILENT = "silent"
"""Topic of a warning that a training told nothing for long. It comes from a watchdog: it is no sign of life."""

SCHEMA = 1
"""Number at the start of every line, to be raised when an older reader would misread the lines of a newer writer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunEvent:
    """Anything that happened in a run. `at` is unix seconds."""

    kind: ClassVar[str] = "RunEvent"
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(RunEvent):
    """A process took the run. `resumed_from` is the optimizer step that it continues after, 0 for a fresh start.

    `total_steps` is known this early only where the recipe counts steps; `Planned` has it in any case. `recipe` holds
    the tables of a training run's recipe and `versions` those of its libraries: what is known of the run before base
    and data are read. `Identified` has the rest. A resume compares with the first of each in the log. `date` is the
    local time in ISO 8601 of a training run's first start, which its chat template is told for good.
    """

    kind: ClassVar[str] = "Started"
    job: str
    method: str | None = None
    model: str | None = None
    total_steps: int | None = None
    resumed_from: int = 0
    versions: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    date: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed(RunEvent):
    """What this start does otherwise than the run's first one; told right after `Started` where there is something.

    `recipe` holds the fields of the recipe that differ, each with its value at the first start and its value now, as
    words. `extensions` holds the steps that the run was given beyond its plan: `after`, `steps` and `tail`.
    """

    kind: ClassVar[str] = "Changed"
    recipe: dict[str, Any] = field(default_factory=dict)
    extensions: list[Any] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified(RunEvent):
    """Base and data by content, told at every start once both have been read and before anything is trained.

    `base` is the fingerprint of the base without its single tensors. `rows` holds `train` and `held_out`, how many
    rows each has, and `train_sum` and `held_out_sum`, checksums over their contents in order.
    """

    kind: ClassVar[str] = "Identified"
    base: dict[str, Any]
    rows: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned(RunEvent):
    """What is known once data and model are loaded. Rows are counted after dropping and splitting.

    `batch_tokens` are those of the largest micro-batch of the first step, padding included; the longest row is in it.
    `card` identifies the card: `name`, `uuid`, `pci`; empty on a CPU. `four_bit_share` is the share of the weights of
    linear maps and routed experts inside the layers that is in 4 bits, `kept_16bit_bytes` what is not quantised.
    `left_out` counts the rows of all files that are neither trained on nor held out, by reason (`core.left_out`).
    """

    kind: ClassVar[str] = "Planned"
    total_steps: int
    trainable_parameters: int
    rows: int
    held_out_rows: int
    device: str
    dtype: str
    loss_path: str
    batch_tokens: int | None = None
    card: dict[str, str] = field(default_factory=dict)
    four_bit_share: float | None = None
    kept_16bit_bytes: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase(RunEvent):
    """What the job is busy with; `fraction` is how much of it is done, 0 to 1, where that is known."""

    kind: ClassVar[str] = "Phase"
    name: str
    fraction: float | None = None
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(RunEvent):
    """One optimizer step. `tokens` counts real (not padding) input tokens, `loss_tokens` those with a label.

    Of pairs of answers, `loss_tokens` counts the pairs; they alone have the last fields (`PAIR_FIGURES`).
    """

    kind: ClassVar[str] = "StepDone"
    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    tokens: int
    seconds: float
    loss_tokens: int | None = None
    margin: float | None = None
    accuracy: float | None = None
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySeen(RunEvent):
    """Memory in bytes; None is "not available". A run on CUDA fills the first four, one on a CPU the resident ones."""

    kind: ClassVar[str] = "MemorySeen"
    step: int
    stage: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    peak_bytes: int | None = None
    device_bytes: int | None = None
    resident_bytes: int | None = None
    resident_peak_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated(RunEvent):
    """Mean loss per labelled token on the held-out rows after `step` optimizer steps.

    `gain` is the loss minus that before the first step, paired row by row, with the `low` and `high` end of its 95 %
    interval. Below zero the run is better than its base.

    Of pairs of answers, loss and gain are per pair, `loss_tokens` counts the pairs, and the last fields are there
    (`PAIR_FIGURES`).
    """

    kind: ClassVar[str] = "Evaluated"
    step: int
    loss: float
    loss_tokens: int
    rows: int
    seconds: float
    gain: dict[str, float | None] | None = None
    margin: float | None = None
    accuracy: float | None = None
    chosen_logp: float | None = None
    rejected_logp: float | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled(RunEvent):
    """A held-out prompt answered after `step` optimizer steps (greedy), beside the answer in the data."""

    kind: ClassVar[str] = "Sampled"
    step: int
    index: int
    prompt: str
    answer: str
    expected: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(RunEvent):
    """Something whole lies on disk. `what` is checkpoint, adapter, merged ...; a path inside the run is relative."""

    kind: ClassVar[str] = "Saved"
    what: str
    path: str
    step: int | None = None
    size_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned(RunEvent):
    """Something the user should know that does not stop the job.

    `shift_seconds` is by how much the machine's clock was set forward since the event before, where that is what is
    told: `at` of this event and of those before differ by it beside the time that has passed.
    """

    kind: ClassVar[str] = "Warned"
    message: str
    topic: str = ""
    shift_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shrunk(RunEvent):
    """Memory was refused, and the training goes on after `step` in a smaller form (`train.on_oom`).

    `stage` is what it was doing: load, work, optimizer, eval or save. `settings` are the fields of the recipe that have
    other values from now on, also after a resume; empty where it only freed what it could and tries again. `words` say
    it. `batch_tokens` are those of the largest micro-batch of the next step, as in `Planned`; unknown while loading.
    """

    kind: ClassVar[str] = "Shrunk"
    step: int
    stage: str
    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Restarted(RunEvent):
    """The run goes on by itself after a crash (`--restarts`), for the `number`th time of `of`; `because` says why."""

    kind: ClassVar[str] = "Restarted"
    number: int
    of: int
    because: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(RunEvent):
    """The job waits between two steps (`paused` true) or goes on (`paused` false).

    `reason` is why it waits without having been asked to: a disk that refuses.
    """

    kind: ClassVar[str] = "Paused"
    step: int
    paused: bool
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(RunEvent):
    """Terminal: the job ended without its result. `failure` is a short stable name, `advice` what to do next."""

    kind: ClassVar[str] = "Failed"
    failure: str
    message: str
    advice: str
    step: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(RunEvent):
    """Terminal: `outcome` is done, or stopped when the user asked for an early end (the adapter so far is saved)."""

    kind: ClassVar[str] = "Finished"
    outcome: str
    step: int | None = None
    seconds: float | None = None
    result: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unknown(RunEvent):
    """A line of an unknown kind, or one that lacks a field that its kind needs; `raw` is the whole line."""

    kind: ClassVar[str] = "Unknown"
    raw: dict[str, Any]


KINDS: dict[str, type[RunEvent]] = {
    kind.kind: kind
    for kind in (
        Started,
        Changed,
        Identified,
        Planned,
        Phase,
        StepDone,
        MemorySeen,
        Evaluated,
        Sampled,
        Saved,
        Warned,
        Shrunk,
        Restarted,
        Paused,
        Failed,
        Finished,
    )
}

_NAMES = {name: tuple(item.name for item in fields(kind)) for name, kind in KINDS.items()}


class Sink(Protocol):
    """What is told of a run's events."""

    def take(self, event: RunEvent) -> None:
        """Take in one event."""

    def close(self, ended: str) -> None:
        """Take in how the run ended: finished, stopped, failed or crashed."""


def event_to_dict(event: RunEvent) -> dict[str, Any]:
    """Return an event's JSON object, schema number first.

    JSON has no NaN and no infinity: such a number becomes null, and `<field>_nonfinite` beside it says which it was.
    """
    if isinstance(event, Unknown):
        return event.raw
    table: dict[str, Any] = {"schema": SCHEMA, "kind": event.kind}
    for item in fields(event):
        value = getattr(event, item.name)
        if isinstance(value, float) and not math.isfinite(value):
            table[item.name], table[f"{item.name}_nonfinite"] = None, str(value)
        elif value is not None:
            table[item.name] = value
    return table


def event_from_dict(table: dict[str, Any]) -> RunEvent:
    """Return the event of a JSON object. Unknown fields are dropped; an object that is no event becomes `Unknown`."""
    kind = KINDS.get(str(table.get("kind")))
    at = table.get("at")
    number = float(at) if isinstance(at, (int, float)) else 0.0
    if kind is None:
        return Unknown(at=number, raw=table)
    values: dict[str, Any] = {}
    for name in _NAMES[kind.kind]:
        value = table.get(name)
        if value is not None:
            values[name] = value
        elif (flag := table.get(f"{name}_nonfinite")) in ("nan", "inf", "-inf"):
            values[name] = float(flag)
        elif name in table:
            values[name] = None
    values["at"] = number
    try:
        return kind(**values)
    except TypeError:
        return Unknown(at=number, raw=table)
