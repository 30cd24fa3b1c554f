"""What happens between two steps: evaluation, samples, checkpoints, and what the user asks for through `control/`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from studio.core.errors import StudioError
from studio.core.events import Evaluated, Paused, Sampled, Saved, Warned
from studio.core.recipe import Recipe
from studio.jobs.train.checkpoint import Progress, save_checkpoint
from studio.jobs.train.evaluate import answer, held_out_loss
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.phase import PhaseTeller
from studio.jobs.train.rows import Example, Prompt
from studio.jobs.train.step_model import StepModel
from studio.runs.worker import Worker

_PAUSE_POLL_SECONDS = 0.2


@dataclass(slots=True)
class Between:
    """The work between steps of one run."""

    worker: Worker
    tell: PhaseTeller
    recipe: Recipe
    step_model: StepModel
    optimizer: torch.optim.Optimizer
    tokenizer: Any
    held_out: Sequence[Example]
    prompts: Sequence[Prompt]
    memory: MemoryWatch
    device: torch.device
    pad_id: int
    total_steps: int
    autocast: Callable[[], Any]
    sleep: Callable[[float], None] = time.sleep
    last_eval: float | None = None

    def after_step(self, progress: Progress) -> bool:
        """Evaluate and save where it is due, serve requests; return whether the run ends here."""
        last = progress.step >= self.total_steps
        every = self.recipe.eval.every
        if every and progress.step % every == 0 and not last:
            self.evaluate(progress.step)
        saves = self.recipe.train.checkpoint_every
        if saves and progress.step % saves == 0 and not last:
            self.checkpoint(progress)
        return self._requests(progress) or last

    def evaluate(self, step: int) -> None:
        """Measure the held-out loss and say it; nothing happens without held-out rows."""
        if not self.held_out:
            return
        began = time.perf_counter()
        seen = held_out_loss(
            self.step_model,
            self.held_out,
            micro_batch=self.recipe.train.micro_batch,
            pad_id=self.pad_id,
            device=self.device,
            progress=lambda fraction: self.tell("evaluating", fraction),
        )
        self.last_eval = seen.loss
        self.worker.emit(
            Evaluated,
            step=step,
            loss=seen.loss,
            loss_tokens=seen.loss_tokens,
            rows=len(self.held_out),
            seconds=time.perf_counter() - began,
        )
        self.memory.see("eval", step)
        self.tell("training")

    def sample(self, step: int) -> None:
        """Answer the sample prompts greedily and say the answers."""
        model: nn.Module = self.step_model.model
        for index, prompt in enumerate(self.prompts):
            self.tell("answering", index / len(self.prompts))
            text = answer(
                model, self.tokenizer, prompt, new_tokens=self.recipe.eval.sample_tokens, autocast=self.autocast
            )
            self.worker.emit(Sampled, step=step, index=index, prompt=prompt.text, answer=text, expected=prompt.expected)

    def checkpoint(self, progress: Progress) -> bool:
        """Save a checkpoint. A full disk costs the checkpoint, not the run: it is said, and training goes on.

        Returns:
            Whether it was saved.
        """
        self.tell("saving a checkpoint")
        folder = self.worker.paths.checkpoints
        try:
            path = save_checkpoint(
                folder,
                self.step_model.model,
                self.optimizer,
                progress,
                keep=self.recipe.train.keep_checkpoints,
            )
        except (OSError, StudioError) as error:
            self.worker.emit(
                Warned,
                topic="checkpoint",
                message=f"the checkpoint of step {progress.step} could not be saved ({error}); training goes on. "
                "Free disk space; an earlier checkpoint, if there is one, is untouched",
            )
            return False
        finally:
            self.tell("training")
        size = sum(file.stat().st_size for file in path.iterdir())
        relative = path.relative_to(self.worker.paths.root).as_posix()
        self.worker.emit(Saved, what="checkpoint", path=relative, step=progress.step, size_bytes=size)
        self.memory.see("save", progress.step)
        return True

    def _requests(self, progress: Progress) -> bool:
        if self.worker.requested("checkpoint-now"):
            self.checkpoint(progress)
            self.worker.served("checkpoint-now")
        if self.worker.requested("pause"):
            self.worker.emit(Paused, step=progress.step, paused=True)
            while self.worker.requested("pause") and not self.worker.requested("stop"):
                self.sleep(_PAUSE_POLL_SECONDS)
            self.worker.emit(Paused, step=progress.step, paused=False)
        return self.worker.requested("stop")
