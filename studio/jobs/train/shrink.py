"""What becomes of a training whose memory is refused: it frees what it can and goes on in a smaller form.

Only with `train.on_oom = "shrink"`; else each refusal is raised as it came. Nothing of a step that was begun is kept.
A smaller micro-batch is taken at once. Every other form loads the model again, from a checkpoint that is saved first.
What was changed lies in `shrunk.json`, so that a resumed run takes the same form; `recipe.toml` is not edited.
"""

import ctypes
import gc
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol, TypeVar

import torch

from studio.core.changes import Change, applied
from studio.core.events import Planned, Shrunk, Warned
from studio.core.placement.shrink import smaller, streamed
from studio.core.recipe import FIELDS, Recipe
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.memory import MemoryWatch
from studio.probe.calibrate import card_named, remember_refusal
from studio.probe.models import find_base
from studio.probe.shape import shape_of_base
from studio.runs.atomic import read_object, write_whole
from studio.runs.failure import Stage, memory_failure, ran_out_of_memory, stage_of
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker

_T = TypeVar("_T")
_CHANGED = ("train.micro_batch", "train.accumulation", "train.recompute", "train.offload_checkpoints", "model.stream",
            "eval.sample_tokens")  # fmt: skip
_EVALUATED = "evaluated_rows"
_AGAIN = "what could be freed is free, and it is tried again"


class LoadAgain(Exception):
    """The training goes on in a form for which the model has to be loaded again; all that it needs is saved."""


class BetweenSteps(Protocol):
    """What is made smaller of the work between steps.

    Attributes:
        batcher: Makes the batches of held-out rows.
        recipe: In the form that the training runs in now.
    """

    batcher: Batcher
    recipe: Recipe

    @property
    def memory(self) -> MemoryWatch:
        """The counters of the device."""

    def checkpoint(self, state: TrainState) -> bool:
        """Save a checkpoint; return whether one of this state is on the disk."""


class Shrinking:
    """Makes a training smaller.

    Attributes:
        recipe: As the training runs now: the recipe with what was changed.
    """

    def __init__(self, worker: Worker, recipe: Recipe) -> None:
        """Read how small a resumed run was made.

        Args:
            worker: Of the run.
            recipe: As it was asked for.
        """
        self._worker = worker
        self._changed = _kept(worker.paths)
        self.recipe = recipe
        for path in _CHANGED:
            if path in self._changed:
                self.recipe = self.recipe.with_(path, self._changed[path])
        if self.recipe.rows_per_step != recipe.rows_per_step or self.recipe.problems():
            self._changed, self.recipe = {}, recipe  # recipe.toml was edited since: its own rows a step count
        self._parts: tuple[StepBatches, BetweenSteps] | None = None
        self._planned: Planned | None = None
        self._tried_again = self._gave_up = False
        self.state = TrainState(step=0, tokens=0, seconds=0.0, scaler={})

    @property
    def on(self) -> bool:
        """Whether the recipe wants it."""
        return self.recipe.train.on_oom == "shrink"

    def evaluates_by(self, batcher: Batcher) -> Batcher:
        """Return how held-out rows become batches, where training's do so by `batcher`."""
        rows = self._changed.get(_EVALUATED)
        return batcher.of_rows(min(rows, batcher.micro_batch)) if isinstance(rows, int) and rows > 0 else batcher

    def begin(self, batches: StepBatches, between: BetweenSteps, state: TrainState, planned: Planned) -> None:
        """Know the parts of a training that is ready to begin.

        Args:
            batches: Are cut smaller.
            between: Evaluates in smaller batches, and saves before the model is loaded again.
            state: Where the training stands.
            planned: What was told of it.
        """
        self._parts, self._planned, self.state = (batches, between), planned, state

    def attempt(
        self, work: Callable[[], _T], smaller_by: Callable[[], Iterator[str]], undo: Callable[[], None] = lambda: None
    ) -> _T:
        """Return what the work returns; where memory is refused, make it smaller and repeat it.

        Args:
            work: Leaves nothing behind that `undo` does not take back when it fails.
            smaller_by: Yields, at each refusal, what it has made smaller, in words; ends where nothing is left.
            undo: Takes back what failed work has done.

        Raises:
            LoadAgain: The training goes on with the model loaded again.
            Exception: What the work raised, where memory was refused and nothing is left to make smaller, too.
        """
        ways = smaller_by()
        while True:
            try:
                return work()
            except Exception as error:
                if not self.on or not ran_out_of_memory(error):
                    raise
                refused = error
            # Nothing more is asked for while the frames of what failed hold its tensors.
            _let_go(refused)
            free_memory()
            undo()
            doing = self._worker.doing
            stage, why = stage_of(refused, doing), str(memory_failure(refused, doing))
            self._learn()
            if words := next(ways, ""):
                self._tell(stage, why, words)
            elif (change := self._change(stage)) and self._saved():
                self._take(change)
                self._tell(stage, why, change.words)
                self._parts = None  # what is loaded again must not lie in memory twice
                raise LoadAgain
            else:
                self._gave_up = True
                raise refused
            del refused

    def steps(self) -> Iterator[str]:
        """Yield, for the work of a step, smaller micro-batches while the plan has nothing cheaper."""
        while (change := self._change("work")) and {path for path, _ in change.settings} <= set(_CHANGED[:2]):
            batches, between = self._begun
            rows = dict(change.settings)["train.micro_batch"]
            batches.cut_by(batches.batcher.of_rows(rows))
            if between.batcher.micro_batch > rows:
                between.batcher = between.batcher.of_rows(rows)
            self._take(change)
            yield change.words

    def evaluations(self) -> Iterator[str]:
        """Yield, for an evaluation, smaller batches of held-out rows."""
        _, between = self._begun
        while (rows := between.batcher.micro_batch) > 1:
            between.batcher = between.batcher.of_rows(rows // 2)
            self._changed[_EVALUATED] = rows // 2
            yield f"{rows // 2} held-out rows at once, not {rows}"

    def answers(self) -> Iterator[str]:
        """Yield, for a sample answer, shorter ones."""
        while (most := self.recipe.eval.sample_tokens) > 1:
            self._take(Change((("eval.sample_tokens", most // 2),), "", "", "", (1.0, 1.0)))
            self._begun[1].recipe = self.recipe
            yield f"sample answers of {most // 2} tokens at most, not {most}"

    def once(self) -> Iterator[str]:
        """Yield, for what has no size of its own such as saving, that it is tried once more."""
        yield _AGAIN

    def loads_again(self, error: Exception) -> bool:
        """Return whether the training begins again with the model loaded anew, after it ended with this exception.

        Args:
            error: It left `prepare`, or what follows it.
        """
        if isinstance(error, LoadAgain):
            return True
        if not self.on or self._gave_up or not ran_out_of_memory(error):
            return False
        doing = self._worker.doing
        stage, why = stage_of(error, doing), str(memory_failure(error, doing))
        _let_go(error)
        free_memory()
        if self._parts and not self._saved():
            return False
        self._parts = None
        change = self._change(stage)
        if change is not None:
            self._take(change)
        elif self._tried_again or stage != "load":
            return False
        self._tried_again = self._tried_again or change is None
        self._tell(stage, why, change.words if change else _AGAIN)
        return True

    @property
    def _begun(self) -> tuple[StepBatches, BetweenSteps]:
        if self._parts is None:
            raise RuntimeError("nothing is tried before `begin`")
        return self._parts

    def _change(self, stage: Stage) -> Change | None:
        """Return the next smaller form of the recipe; None where there is none."""
        on_card = torch.cuda.is_available() and self.recipe.device.device != "cpu"
        shape = gpu = None
        with suppress(Exception):  # a model that cannot be sized is made smaller all the same
            shape = shape_of_base(find_base(self.recipe.model.base, self.recipe.model.revision))
            gpu = card_named(torch.cuda.get_device_name()) if on_card else None
        if stage == "save":
            return None
        if stage in ("load", "eval"):
            return streamed(self.recipe, shape, on_card=on_card)
        return smaller(self.recipe, shape, gpu, on_card=on_card)

    def _take(self, change: Change) -> None:
        self.recipe = applied(self.recipe, [change])
        self._changed |= {path: FIELDS[path].kind.stored(value) for path, value in change.settings}
        if self._parts:
            self._parts[1].recipe = self.recipe

    def _saved(self) -> bool:
        """Return whether a checkpoint of the last step is on the disk; there is nothing to save before the first."""
        return not self.state.step or self._begun[1].checkpoint(self.state)

    def _tell(self, stage: Stage, why: str, words: str) -> None:
        """Write the smaller form down, so that a resume takes it, and say it."""
        paths, before = self._worker.paths, _kept(self._worker.paths)
        if self._changed != before:
            text = json.dumps({"schema": 1, **self._changed})
            self._worker.patiently("the smaller form cannot be written down", lambda: write_whole(paths.shrunk, text))
        after = f"going on after step {self.state.step}" if self.state.step else "going on"
        self._worker.emit(Warned, topic="memory", message=f"{why}. {words[:1].upper()}{words[1:]}; {after}")
        self._worker.emit(
            Shrunk,
            step=self.state.step,
            stage=stage,
            words=words,
            settings={path: value for path, value in self._changed.items() if before.get(path) != value},
            batch_tokens=self._parts[0].largest_tokens() if self._parts else None,
        )

    def _learn(self) -> None:
        """Keep for later plans what this form held at least when it was refused more."""
        if self._planned is None:
            return
        held = self._begun[1].memory.held()
        if why_not := remember_refusal(self._worker.paths, self.recipe, self._planned, held):
            self._worker.emit(Warned, topic="calibration", message=f"not kept for later estimates: {why_not}")


def free_memory() -> None:
    """Give back what nobody uses: cycles of objects, the cards' cached blocks, and what the C library keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # other C libraries than glibc have no such function
            ctypes.CDLL(None).malloc_trim(0)


def _let_go(error: BaseException) -> None:
    """Let the frames of an exception, and of those before it, give up what they hold."""
    one: BaseException | None = error
    while one is not None:
        traceback.clear_frames(one.__traceback__)
        one = one.__context__


def _kept(paths: RunPaths) -> dict[str, Any]:
    """Return what `shrunk.json` says; empty where the run was never made smaller, or the file is damaged."""
    table = read_object(paths.shrunk)
    known = (*_CHANGED, _EVALUATED)
    return {path: table[path] for path in known if path in table} if table.get("schema") == 1 else {}
