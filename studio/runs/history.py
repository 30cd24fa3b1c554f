"""A run's events folded into what screens and reports show. A live and a finished run are the same code path.

Events are folded one after another as they come. When a worker goes on after a checkpoint, the steps after it are done
again: what the log held of them is dropped.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from studio.core.events import (
    SILENT,
    Changed,
    Evaluated,
    Failed,
    Finished,
    Identified,
    MemorySeen,
    Paused,
    Phase,
    Planned,
    Restarted,
    RunEvent,
    Sampled,
    Saved,
    Shrunk,
    Started,
    StepDone,
    Warned,
)
from studio.runs.log import event_from_line
from studio.runs.log_index import Block, read_lines
from studio.runs.series import RECENT_STEPS, MemorySeries, TrainSeries

_MOST_WARNINGS = 1000


@dataclass(slots=True)
class History:
    """All that is known of a run from its events.

    Attributes:
        started: The last start.
        planned: What data and model turned out to be, once both are loaded.
        phase: What the job is busy with.
        changed: What the last start did otherwise than the first one.
        train: The optimizer steps.
        evals: Held-out evaluations, in order of steps.
        memory: Memory readings.
        samples: Held-out answers, in order of steps.
        saved: What lies on disk, in the order of saving.
        warnings: The first thousand of them.
        shrunk: When it was made smaller, as memory was refused.
        restarted: When it went on by itself after a crash.
        as_now: How many of the memory readings are from before it was made smaller last.
        paused: Whether the worker waits.
        paused_for: Why it waits without having been asked to: a disk that refuses.
        failed: How the run failed, unless a worker has started since.
        finished: How the run ended in order, unless a worker has started since.
        unknown: How many lines this version could not read.
        last_at: Unix seconds of the last event; a warning of silence is not counted.
        earlier_seconds: How long the workers before the last one took, less what the clock was set forward since.
    """

    started: Started | None = None
    planned: Planned | None = None
    phase: Phase | None = None
    changed: Changed | None = None
    train: TrainSeries = field(default_factory=TrainSeries)
    evals: list[Evaluated] = field(default_factory=list)
    memory: MemorySeries = field(default_factory=MemorySeries)
    samples: list[Sampled] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    warnings: list[Warned] = field(default_factory=list)
    shrunk: list[Shrunk] = field(default_factory=list)
    restarted: list[Restarted] = field(default_factory=list)
    as_now: int = 0
    paused: bool = False
    paused_for: str = ""
    failed: Failed | None = None
    finished: Finished | None = None
    unknown: int = 0
    last_at: float | None = None
    earlier_seconds: float = 0.0

    def fold(self, events: Iterable[RunEvent]) -> None:
        """Take in further events, in the order of the log."""
        for event in events:
            self._take(event)
        self.train.settle()

    def fold_blocks(self, blocks: Sequence[Block], log: Path) -> None:
        """Take in the next blocks of the log in place of their events. `fold` what follows them, be it nothing."""
        lines = read_lines(log, (place for block in blocks for place in block.rare))
        for block in blocks:
            for line in islice(lines, len(block.rare)):
                if event := event_from_line(line):
                    self._take(event)
            self.train.take(block, log)
            self.memory.take(block, log)
            self.unknown += block.unknown
            self.last_at = block.last_at or self.last_at

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the whole run, once known."""
        if self.planned:
            return self.planned.total_steps
        return self.started.total_steps if self.started else None

    @property
    def objective(self) -> str:
        """What the run learns, in the recipe's word; runs of versions that knew one objective are supervised ones."""
        train = self.started.recipe.get("train") if self.started else None
        word = train.get("objective") if isinstance(train, dict) else None
        return word if isinstance(word, str) else "sft"

    @property
    def last_step(self) -> int:
        """The last optimizer step done; after a resume at least the one it continues from."""
        resumed = self.started.resumed_from if self.started else 0
        return max(resumed, self.train.steps[-1] if self.train.steps else 0)

    @property
    def seconds(self) -> float | None:
        """Seconds from each worker's start to its last event, added up, pauses included; None before the first start.

        The time between two workers is not in it. It is more than the time of the steps: a run also loads, evaluates
        and saves.
        """
        if self.started is None or self.last_at is None:
            return None
        return self.earlier_seconds + max(0.0, self.last_at - self.started.at)

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens per second of the last steps; None before the first."""
        seconds = sum(self.train.seconds[-RECENT_STEPS:])
        return sum(self.train.tokens[-RECENT_STEPS:]) / seconds if seconds > 0 else None

    @property
    def seconds_per_step(self) -> float | None:
        """Mean duration of the last steps; None before the first."""
        window = self.train.seconds[-RECENT_STEPS:]
        return sum(window) / len(window) if window else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds that the remaining steps take at the recent pace, evaluations not counted; None when unknown."""
        pace, total = self.seconds_per_step, self.total_steps
        if self.finished is not None or self.failed is not None:
            return 0.0
        return None if pace is None or total is None else max(0, total - self.last_step) * pace

    def _take(self, event: RunEvent) -> None:
        if isinstance(event, Started):
            self.earlier_seconds = self.seconds or 0.0
        if not (isinstance(event, Warned) and event.topic == SILENT):
            self.last_at = event.at or self.last_at
        match event:
            case StepDone():
                self.train.append(event)
            case MemorySeen():
                self.memory.append(event)
            case Evaluated():
                while self.evals and self.evals[-1].step >= event.step:
                    self.evals.pop()
                self.evals.append(event)
            case Started():
                self._start(event)
            case Phase():
                self.phase = event
            case _:
                self._take_rare(event)

    def _take_rare(self, event: RunEvent) -> None:
        match event:
            case Sampled():
                self.samples = [kept for kept in self.samples if (kept.step, kept.index) != (event.step, event.index)]
                self.samples.append(event)
            case Planned():
                self.planned = event
            case Changed():
                self.changed = event
            case Saved():
                self.saved.append(event)
            case Warned():
                self.earlier_seconds -= event.shift_seconds or 0.0
                if len(self.warnings) < _MOST_WARNINGS:
                    self.warnings.append(event)
            case Shrunk() | Restarted():
                self._take_mended(event)
            case Paused():
                self.paused, self.paused_for = event.paused, event.reason if event.paused else ""
            case Failed():
                self.failed = event
            case Finished():
                self.finished = event
            case Identified():
                pass  # of use only to a resume, which reads the first one in the log
            case _:
                self.unknown += 1

    def _take_mended(self, event: Shrunk | Restarted) -> None:
        if isinstance(event, Restarted):
            self.restarted.append(event)
            return
        self.shrunk.append(event)
        self.as_now = len(self.memory.steps)
        if self.planned and event.batch_tokens:
            self.planned = replace(self.planned, batch_tokens=event.batch_tokens)

    def _start(self, event: Started) -> None:
        """Begin with a new worker: it does the steps after its checkpoint again, so those of before are dropped."""
        self.started, self.planned, self.phase, self.paused, self.paused_for = event, None, None, False, ""
        self.failed = self.finished = self.changed = None
        after = event.resumed_from + 1 if event.resumed_from else 0
        self.train.cut_from(after)
        if self.as_now > self.memory.cut_from(after):
            self.as_now = len(self.memory.steps)
        self.evals = [kept for kept in self.evals if kept.step < after]
        self.samples = [kept for kept in self.samples if kept.step < after]
        self.saved = [kept for kept in self.saved if kept.step is None or kept.step < after]
