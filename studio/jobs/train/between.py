"""What happens between two steps: evaluation, samples, checkpoints, and what the user asks for through `control/`.

Held-out rows go through the same loss path and micro-batch as training, so evaluation never needs more memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from studio.core.errors import StudioError
from studio.core.events import Evaluated, Paused, Sampled, Saved, Warned
from studio.core.intervals import Interval, ratio_interval
from studio.core.recipe import Recipe
from studio.jobs.base.data.rows import Prompt
from studio.jobs.base.data.stored_examples import StoredExamples
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.generation import greedy
from studio.jobs.base.progress import PhaseTeller, heed
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.train.adapter import AdapterWeights, save_adapter
from studio.jobs.train.batches import Batcher
from studio.jobs.train.checkpoint import TrainState, save_checkpoint
from studio.jobs.train.guards import doubts_about_pairs
from studio.jobs.train.loop import mean_figures
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.objectives import FIGURES, Encoded
from studio.jobs.train.objectives.pairs import Pairs
from studio.jobs.train.objectives.preference import log_probability_tokens
from studio.jobs.train.shrink import Shrinking
from studio.jobs.train.step_model import StepModel, evaluating
from studio.runs.checkpoints import complete_checkpoints, step_of
from studio.runs.disk import disk_words, refuses
from studio.runs.failure import ran_out_of_memory
from studio.runs.held_out import RowLosses, keep_losses_before, read_record
from studio.runs.watch import read_history
from studio.runs.worker import Worker

_PAUSE_POLL_SECONDS = 0.2
_PART = 4096
"""Held-out rows that are in memory together, where they lie on disk."""


@dataclass(slots=True)
class Between:
    """The work between steps of one run.

    Attributes:
        worker: Gets the events, and is asked for the user's requests.
        tell: Told what is being done.
        recipe: Says how often to evaluate and save.
        step_model: The model as the loop calls it.
        optimizer: Its state is part of a checkpoint.
        tokenizer: Turns answers into text; saved beside the adapter.
        held_out: Rows that are evaluated; may be empty.
        prompts: Answered before the first step and after the last.
        memory: Reads the memory after evaluating and saving.
        batcher: How held-out rows become batches: as training's do.
        total_steps: The last step of the run.
        autocast: Maker of the arithmetic's context, for the answers.
        shrinking: Repeats in a smaller form what was refused memory.
        sleep: Waits a number of seconds while the run is paused.
        last_eval: The newest held-out loss per token, in nats; None before the first evaluation.
        evaluated_at: The step of it.
        before: Each held-out row's loss before the first step; None where it is not known.
        initial: The adapter that PiSSA subtracted from the base; empty without PiSSA.
        doubted: Topics of what has been said to be wrong with held-out pairs.
        clock: Seconds, for checkpoints by time.
        saved_at: When the last checkpoint was written, or tried, by that clock.
    """

    worker: Worker
    tell: PhaseTeller
    recipe: Recipe
    step_model: StepModel
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    held_out: Sequence[Encoded]
    prompts: Sequence[Prompt]
    memory: MemoryWatch
    batcher: Batcher
    total_steps: int
    autocast: Callable[[], Any]
    shrinking: Shrinking
    sleep: Callable[[float], None] = time.sleep
    last_eval: float | None = None
    evaluated_at: int = -1
    before: RowLosses | None = None
    initial: AdapterWeights = field(default_factory=dict)
    doubted: set[str] = field(default_factory=set)
    clock: Callable[[], float] = time.monotonic
    saved_at: float = field(default_factory=time.monotonic)

    def after_step(self, state: TrainState) -> bool:
        """Evaluate and save where that is due, and serve the user's requests.

        The last step's evaluation and saving are left to the end of the run.

        Args:
            state: Where the training stands after the step.

        Returns:
            Whether the run ends here.
        """
        last = state.step >= self.total_steps
        every = self.recipe.eval.every
        if every and state.step % every == 0 and not last:
            self.evaluate(state.step)
        asked = self.worker.requested("checkpoint-now")
        if (self._checkpoint_due(state.step) and not last) or asked:
            self.checkpoint(state)
        if asked:
            self.worker.served("checkpoint-now")
        self._pause(state)
        return self.stopping or last

    def _checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step, by the number of steps or by the time."""
        train = self.recipe.train
        waited = self.clock() - self.saved_at
        by_time = train.checkpoint_minutes > 0 and waited >= 60 * train.checkpoint_minutes
        return by_time or (train.checkpoint_every > 0 and step % train.checkpoint_every == 0)

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss and emit it. Without held-out rows nothing happens; a stop ends it unfinished."""
        if not self.held_out:
            return
        # Told before the first batch: if that one runs out of memory, the log says what the run was doing.
        self.tell("evaluating", 0.0)
        began = time.perf_counter()
        try:
            seen, figures = self.shrinking.attempt(self._held_out_losses, self.shrinking.evaluations)
        except Cancelled:
            return
        tokens = sum(seen.tokens)
        self.evaluated_at = step
        self.last_eval = math.fsum(seen.sums) / tokens if tokens else math.nan
        gain = self._gain(step, seen)
        self.worker.emit(
            Evaluated,
            step=step,
            loss=self.last_eval,
            loss_tokens=tokens,
            rows=len(self.held_out),
            seconds=time.perf_counter() - began,
            gain=asdict(gain) if gain else None,
            **figures,
        )
        self._doubt(step, figures)
        self.memory.see("eval", step)
        self.tell("training")

    def _held_out_losses(self) -> tuple[RowLosses, dict[str, float]]:
        return held_out_losses(self.step_model, self.held_out, batcher=self.batcher, progress=self._evaluating)

    def _gain(self, step: int, seen: RowLosses) -> Interval | None:
        """Return how far the held-out loss lies above the one before the first step, negative where it fell.

        At step 0 there is nothing to compare with: the rows' losses are kept for later, and None is returned.
        """
        if step:
            # A resumed run reads what its first start kept.
            self.before = self.before or read_record(self.worker.paths).before
            return gain_since(self.before, seen)
        if all(map(math.isfinite, seen.sums)):
            self.before = seen
            try:
                keep_losses_before(self.worker.paths, seen)
            except OSError as error:
                message = f"held-out losses from before training are not kept for a resumed run: {error}"
                self.worker.emit(Warned, topic="disk", message=message)
        return None

    def _doubt(self, step: int, figures: Mapping[str, float]) -> None:
        """Warn once of each thing that is wrong with what held-out pairs show; nothing happens for other rows."""
        if not figures or not step:
            return
        first = next(iter(read_history(self.worker.paths).evals))  # this evaluation is in the log already
        tokens = statistics.fmean(log_probability_tokens(self.step_model.objective, pair) for pair in self.held_out)
        before = {"chosen_logp": figures["chosen_logp"] if first.chosen_logp is None else first.chosen_logp}
        found = doubts_about_pairs(figures, before, pairs=len(self.held_out), tokens=tokens)
        for topic, message in found.items():
            if topic not in self.doubted:
                self.worker.emit(Warned, topic=topic, message=message)
        self.doubted |= found.keys()

    def sample(self, step: int) -> None:
        """Answer the sample prompts greedily and emit the answers; a stop ends it, and drops an unfinished answer."""
        model: nn.Module = self.step_model.model
        for index, prompt in enumerate(self.prompts):
            if self.stopping:
                return
            self.tell("answering", index / len(self.prompts))
            text = self.shrinking.attempt(partial(self._answer, model, prompt), self.shrinking.answers)
            if self.stopping:
                return
            self.worker.emit(Sampled, step=step, index=index, prompt=prompt.text, answer=text, expected=prompt.expected)

    def _answer(self, model: nn.Module, prompt: Prompt) -> str:
        return answer(
            model,
            self.tokenizer,
            prompt,
            new_tokens=self.recipe.eval.sample_tokens,
            autocast=self.autocast,
            cancelled=lambda: self.stopping,
        )

    def checkpoint(self, state: TrainState) -> bool:
        """Save a checkpoint. If the disk is full, only the checkpoint is lost: a warning says so and training goes on.

        Returns:
            Whether it was saved.
        """
        self.tell("saving a checkpoint")
        folder = self.worker.paths.checkpoints
        try:
            path = self.shrinking.attempt(
                lambda: save_checkpoint(
                    folder,
                    self.step_model.model,
                    self.optimizer,
                    state,
                    keep=self.recipe.train.keep_checkpoints,
                    initial=self.initial,
                    held_out_loss=self.last_eval if self.evaluated_at == state.step else None,
                ),
                self.shrinking.once,
            )
        except Exception as error:
            full = self.shrinking.on and ran_out_of_memory(error)
            if not (full or refuses(error) or isinstance(error, (OSError, StudioError))):
                raise
            what = "memory" if full else "disk space"
            self.worker.emit(
                Warned,
                topic="checkpoint",
                message=f"the checkpoint of step {state.step} could not be saved ({disk_words(error)}); training "
                f"goes on. Free {what}; an earlier checkpoint, if there is one, is untouched",
            )
            return False
        finally:
            # A disk that refuses is not tried again at each step either.
            self.saved_at = self.clock()
            self.tell("training")
        size = sum(file.stat().st_size for file in path.iterdir())
        relative = path.relative_to(self.worker.paths.root).as_posix()
        self.worker.emit(Saved, what="checkpoint", path=relative, step=state.step, size_bytes=size)
        self.memory.see("save", state.step)
        return True

    def rescue(self, state: TrainState) -> None:
        """Save the last whole step before an error ends the run, where no checkpoint has it; raises no other error."""
        newest = complete_checkpoints(self.worker.paths.checkpoints)[-1:]
        if state.step and not (newest and step_of(newest[0]) == state.step):
            phase = self.worker.doing.phase
            with suppress(Exception):  # memory that is full, a card that is lost: the first error is the one to tell
                self.checkpoint(state)
            self.tell(phase)  # what failed is told by what the run was doing

    def save_adapter(self, step: int) -> None:
        """Write `adapter/`. While the disk is full the run waits, weights in memory, until there is room or a stop.

        Raises:
            JobFailed: The adapter is broken or does nothing, or the user asked for a stop while the disk refused.
        """
        folder = self.worker.paths.adapter
        self.tell("saving the adapter")
        size = self.worker.patiently(
            "the adapter cannot be saved",
            lambda: self.shrinking.attempt(
                lambda: save_adapter(self.step_model.model, self.tokenizer, folder, self.initial),
                self.shrinking.once,
            ),
        )
        self.worker.emit(Saved, what="adapter", path=folder.name, step=step, size_bytes=size)
        self.memory.see("save", step)

    @property
    def stopping(self) -> bool:
        """Whether the user asked for the run to end."""
        return self.worker.requested("stop")

    def _evaluating(self, fraction: float) -> None:
        self.tell("evaluating", fraction)
        heed(self.worker, "stopped while the held-out rows were measured")

    def _pause(self, state: TrainState) -> None:
        if self.worker.requested("pause") and not self.stopping:
            self.worker.emit(Paused, step=state.step, paused=True)
            while self.worker.requested("pause") and not self.stopping:
                self.sleep(_PAUSE_POLL_SECONDS)
            self.worker.emit(Paused, step=state.step, paused=False)


def held_out_losses(
    step_model: StepModel,
    examples: Sequence[Encoded],
    *,
    batcher: Batcher,
    progress: Callable[[float], None],
) -> tuple[RowLosses, dict[str, float]]:
    """Return the loss of each held-out row and its denominator, in the order of the rows, and the figures of pairs.

    Args:
        step_model: Measures a batch.
        examples: Held-out rows.
        batcher: Training's, so that evaluation never needs more memory than training.
        progress: Told the fraction done.
    """
    sums, divided_by, figures = list[float](), list[int](), list[torch.Tensor]()
    with evaluating(step_model):
        for some in _parts(examples):
            seen = [math.nan] * len(some)
            # The batcher sorts rows by length, and two may be equal: a row's place is found again by its identity.
            places = {id(example): place for place, example in enumerate(some)}
            done = len(sums)
            for rows in batcher.groups(some):
                batch = batcher.batch(rows)
                losses = step_model.metric(batch).tolist()
                if FIGURES in batch:
                    figures.append(batch[FIGURES])
                for example, loss in zip(rows, losses, strict=True):
                    seen[places[id(example)]] = loss
                done += len(rows)
                progress(done / len(examples))
            sums += seen
            divided_by += [batcher.objective.denominator([example]) for example in some]
    return RowLosses(tuple(sums), tuple(divided_by)), mean_figures(figures)


def _parts(examples: Sequence[Encoded]) -> Iterator[Sequence[Encoded]]:
    """Yield all examples in memory; those on disk a part at a time."""
    if isinstance(examples, StoredExamples | Pairs):
        yield from (examples[start : start + _PART] for start in range(0, len(examples), _PART))
    else:
        yield examples


def gain_since(before: RowLosses | None, after: RowLosses) -> Interval | None:
    """Return the change of the loss per token, in nats, with its interval, from the differences of the same rows.

    Args:
        before: The rows' losses before the first step; None where they are not known.
        after: The same rows' losses now.

    Returns:
        The interval, negative where the loss fell; None where a loss is not finite or the rows are not the same.
    """
    if before is None or before.tokens != after.tokens or not all(map(math.isfinite, (*before.sums, *after.sums))):
        return None
    return ratio_interval([late - early for late, early in zip(after.sums, before.sums, strict=True)], after.tokens)


def answer(
    model: nn.Module,
    tokenizer: Any,
    prompt: Prompt,
    *,
    new_tokens: int,
    autocast: Callable[[], Any],
    cancelled: Callable[[], bool],
) -> str:
    """Return the model's greedy continuation of one prompt as text, special tokens left out.

    Args:
        model: A causal model with `generate`.
        tokenizer: Its tokenizer.
        prompt: Token ids up to where the answer starts.
        new_tokens: Most tokens to generate.
        autocast: Maker of the context that sets the arithmetic's number format.
        cancelled: Asked after every token; True ends the answer there.
    """
    stops = stop_ids(tokenizer, getattr(model, "generation_config", None))
    with evaluating(model), autocast():
        made = greedy(model, prompt.input_ids, stops=stops, new_tokens=new_tokens, cancelled=cancelled)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()
