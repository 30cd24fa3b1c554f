"""What is watched over a training while it works: losses that leap up, slow steps, the card, the disk, the clock.

Each finding is a warning in the run's log, told once until it is over. Nothing here stops a run or changes what it
learns; a checkpoint from before a spike is kept from being deleted.
"""

import os
import shutil
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from studio.core.errors import JobFailed
from studio.core.events import Planned, RunEvent, Saved, Started, StepDone, Warned
from studio.core.gpu_catalogue import GIB
from studio.core.text import duration_text, plain
from studio.core.unusual import LossSpikes, Pace, SlowSteps, Spike
from studio.probe.cards import CardState, card_state, main_memory
from studio.probe.machine import spills_to_ram
from studio.runs.checkpoints import complete_checkpoints, healthy_before, keep_back, step_of
from studio.runs.disk import RESUME
from studio.runs.layout import RunPaths
from studio.runs.memory_kills import ALMOST_FULL
from studio.runs.worker import Worker

_GONE_WRONG = ("nonfinite_loss", "nonfinite_gradient", "adapter_nonfinite")
"""Failures after which the weights are worth nothing, and older ones are wanted."""
_CLOCK_SECONDS = 5.0
"""By how much a clock must be set to be told: small corrections come of themselves."""
_FILLS_SECONDS = 1800.0
"""A disk is told of that will be full within this time, as fast as it fills."""
_SEEN_SECONDS = 300.0
"""How long it is looked at before that is said."""
_BYTES_A_WEIGHT = 12
"""What a checkpoint takes at most a trained weight, until one was saved: itself and two moments of Adam, in fp32."""
_SPARE_BYTES = 64 * 2**20
"""Room for the log, and for what the system itself writes, beside what the run saves."""
_MEMORY_SHARE = 0.05
"""Main memory is almost full where less of it is available. earlyoom warns below 10 % and kills below 5 %."""
_FULL_SHARE = 0.02
"""A card counts as full where less of its memory is free."""


def way_back(failure: JobFailed, worker: Worker) -> JobFailed:
    """Return a failure with the last healthy checkpoint named in its advice; unchanged where there is none to go to.

    Args:
        failure: Why a training ends.
        worker: Of the run.
    """
    # The step that failed is the one after the last that was told.
    healthy = healthy_before(worker.paths, worker.last_step + 1) if failure.kind in _GONE_WRONG else None
    if healthy is None:
        return failure
    return JobFailed(failure.kind, str(failure), f"{failure.advice}. {_to_go_back(worker.paths, healthy)}")


def _to_go_back(paths: RunPaths, healthy: Path) -> str:
    step, command = step_of(healthy), RESUME.replace("RUN", plain(paths.name, one_line=True))
    return f"The last checkpoint from before is that of step {step}; to go back to it: {command} --checkpoint {step}"


@dataclass(frozen=True, slots=True)
class Clocks:
    """The clocks of the machine, in seconds.

    Attributes:
        wall: Unix time, which may be set.
        steady: Never set; rests while the machine sleeps.
        boot: Never set, and does not rest; None where the system has none.
    """

    wall: float
    steady: float
    boot: float | None


def _clocks() -> Clocks:
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return Clocks(time.time(), time.monotonic(), None if boot is None else time.clock_gettime(boot))


@dataclass(slots=True)
class TrainingWatch:
    """Hears every event of a training from now on, and looks around every few seconds.

    Attributes:
        worker: Gets the warnings.
        clocks: Reads the clocks.
        free_bytes: Returns the free bytes of the disk that a folder lies on.
        card: Returns how the card with a UUID is doing.
        memory: Returns total and free bytes of main memory; None where the system does not tell.
        spills: Whether the driver moves into main memory what does not fit on a card.
    """

    worker: Worker
    clocks: Callable[[], Clocks] = _clocks
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free
    card: Callable[[str], CardState] = card_state
    memory: Callable[[], Any] = main_memory
    spills: Callable[[], bool] = spills_to_ram
    _losses: LossSpikes = field(default_factory=LossSpikes)
    _paces: SlowSteps = field(default_factory=SlowSteps)
    _before: Clocks | None = None
    _free: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=200))
    _saved_bytes: int = 0
    _to_come: int = 1
    _uuid: str = ""
    _state: CardState | None = None
    _usual_reasons: tuple[str, ...] | None = None
    _told: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.worker.listeners.append(self.hear)
        self.worker.looks.append(self.look)

    def hear(self, event: RunEvent) -> None:
        """Take in an event that the run has told."""
        if isinstance(event, StepDone):
            self._look_at_clocks()  # a short run may end before the next look
            if spike := self._losses.see(event.step, event.loss):
                self._tell_spike(spike)
            if pace := self._paces.see(event.step, event.tokens, event.seconds):
                self._tell_pace(pace)
        elif isinstance(event, Planned):
            self._uuid = event.card.get("uuid", "")
            self._saved_bytes = _BYTES_A_WEIGHT * event.trainable_parameters
        elif isinstance(event, Started):
            keep = event.recipe.get("train", {}).get("keep_checkpoints", 1)
            self._to_come = max(1, keep - len(complete_checkpoints(self.worker.paths.checkpoints)))
        elif isinstance(event, Saved) and event.what == "checkpoint":
            self._saved_bytes, self._to_come = event.size_bytes or self._saved_bytes, max(1, self._to_come - 1)

    def look(self) -> None:
        """Look at clock, disk, main memory and card; called every few seconds from a thread of its own."""
        self._look_at_clocks()
        self._look_at_disk()
        self._look_at_memory()
        self._look_at_card()

    def _tell(self, topic: str, message: str, shift_seconds: float | None = None) -> None:
        self.worker.emit(Warned, topic=topic, message=message, shift_seconds=shift_seconds)

    def _tell_once(self, topic: str, message: str) -> None:
        """Tell something that lasts; `_over` lets it be told again."""
        if topic not in self._told:
            self._told.add(topic)
            self._tell(topic, message)

    def _tell_spike(self, spike: Spike) -> None:
        healthy = healthy_before(self.worker.paths, spike.step)
        then = ""
        if healthy is not None:
            with suppress(OSError):
                keep_back(healthy)
            then = f". {_to_go_back(self.worker.paths, healthy)}; it is kept"
        self._tell(
            "spike",
            f"the loss has leapt up from about {spike.usual:.3g} to {spike.loss:.3g} since step {spike.step} and stays "
            f"there: rows of another kind, or a learning rate that is too high{then}",
        )

    def _tell_pace(self, pace: Pace) -> None:
        if not pace.slow:
            self._tell("slow", f"since about step {pace.step} steps are as fast as before again ({pace.seconds:.3g} s)")
            return
        why = "; ".join(self._reasons_for_slowness()) or "nothing that can be seen from here is the reason"
        self._tell(
            "slow",
            f"since about step {pace.step} a token takes {pace.times:.1f} times as long as before (steps of "
            f"{pace.seconds:.3g} s): {why}",
        )

    def _reasons_for_slowness(self) -> list[str]:
        if not self._uuid:
            load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
            cores = os.cpu_count() or 1
            return [f"the machine has more to do than its {cores} cores can: load {load:.1f}"] if load > cores else []
        state = self.card(self._uuid)
        found = [reason for reason in state.reasons if reason not in (self._usual_reasons or ())]
        full = state.free_bytes is not None and state.free_bytes < _FULL_SHARE * (state.total_bytes or 0)
        if full and self.spills():
            found.append("the card's memory is full, and the driver moves what does not fit into main memory")
        if found and state.celsius is not None:
            found.append(f"the card is at {state.celsius} degrees Celsius")
        return found

    def _look_at_clocks(self) -> None:
        now, before = self.clocks(), self._before
        self._before = now
        if before is None:
            return
        steady = now.steady - before.steady
        slept = 0.0
        if now.boot is not None and before.boot is not None:
            slept = now.boot - before.boot - steady
        if slept > _CLOCK_SECONDS:
            self._tell("clock", f"the machine slept for {duration_text(slept)}, and the run with it")
        shift = now.wall - before.wall - steady - slept
        if abs(shift) > _CLOCK_SECONDS:
            way = "forward" if shift > 0 else "back"
            self._tell(
                "clock",
                f"the machine's clock was set {way} by {duration_text(abs(shift))}: times of day in the log before and "
                "after do not fit together. Durations are measured by a steady clock, and are right",
                shift,
            )

    def _look_at_disk(self) -> None:
        try:
            free = self.free_bytes(self.worker.paths.root)
        except OSError:
            return
        now = self.clocks().steady
        self._free.append((now, free))
        # The checkpoints that are still to come, and one more: a new one is whole before an old one is deleted.
        needed = (self._to_come + 1) * self._saved_bytes + _SPARE_BYTES
        began, then = self._free[0]
        lost = (then - free) / (now - began) if now - began >= _SEEN_SECONDS else 0.0
        full_in = (free - needed) / lost if lost > 0 else float("inf")
        if free < needed:
            self._tell_once(
                "disk",
                f"the disk of the run is almost full: {free / GIB:.2f} GiB are free, and saving takes up to "
                f"{needed / GIB:.2f} GiB. Free some space",
            )
        elif full_in < _FILLS_SECONDS:
            self._tell_once(
                "disk",
                f"the disk of the run fills by {lost * 60 / GIB:.2f} GiB a minute: in {duration_text(full_in)} the "
                f"{needed / GIB:.2f} GiB are not there any more that saving takes ({free / GIB:.2f} GiB are free)",
            )
        elif free > 2 * needed and full_in > 2 * _FILLS_SECONDS:
            self._told.discard("disk")

    def _look_at_memory(self) -> None:
        memory = self.memory()
        if memory is None:
            return
        if memory.free < _MEMORY_SHARE * memory.total:
            self._tell_once(
                ALMOST_FULL,
                f"main memory is almost full: {memory.free / GIB:.1f} of {memory.total / GIB:.1f} GiB are available; "
                "the system, or a guard such as earlyoom or systemd-oomd, soon ends a large process, which may be this "
                "one. Close other programs",
            )
        elif memory.free > 2 * _MEMORY_SHARE * memory.total:
            self._told.discard(ALMOST_FULL)

    def _look_at_card(self) -> None:
        if not self._uuid:
            return
        state, before = self.card(self._uuid), self._state
        if state.gone and before is not None:  # what was never seen cannot have vanished: a driver may hide a card
            self._tell_once(
                "card",
                f"the driver says that the card of this run cannot be used any more: {state.gone}. Its next call to "
                f"the card fails or hangs; what the run learnt since its last checkpoint is lost. Restart the computer "
                f"if nvidia-smi does not show the card, then: {RESUME}",
            )
        if not state.gone and state.total_bytes is not None:
            self._state = state
            self._told.discard("card")
            # What holds it back all the time, such as a power limit, is not why steps have become slow.
            if self.worker.last_step and self._usual_reasons is None:
                self._usual_reasons = state.reasons
