"""One training run from its recipe to its adapter: read, load, compare the losses, train, save.

Events are emitted in the order in which they stand here.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib.metadata import version
from typing import Any

import torch
import transformers

from studio.core.errors import BadInput, JobFailed
from studio.core.events import Changed, Finished, Identified, Planned, Started, Warned
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.jobs.base.device import card_used, job_device
from studio.jobs.base.failures import Cancelled
from studio.jobs.base.load import base_folder
from studio.jobs.base.precision import Precision, choose_precision, steadier_format, without_own_format
from studio.jobs.base.progress import PhaseTeller, read_fingerprint
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.train.batches import Batcher, StepBatches, rows_of_like_length, step_batches
from studio.jobs.train.between import Between
from studio.jobs.train.checkpoint import TrainState, load_checkpoint
from studio.jobs.train.compiled import compile_step
from studio.jobs.train.head import require_liger
from studio.jobs.train.loop import LoopParts, train
from studio.jobs.train.memory import MemoryWatch, limit_memory
from studio.jobs.train.objectives import Objective
from studio.jobs.train.objectives.of_recipe import objective_of
from studio.jobs.train.objectives.preference import needs_reference
from studio.jobs.train.optimizer import optimizer_of
from studio.jobs.train.packing import batcher_for, why_padded
from studio.jobs.train.randomness import set_seed
from studio.jobs.train.read_rows import Rows, check_fit, read_rows, tell_what_was_lost, tokenizer_of
from studio.jobs.train.reference import with_reference
from studio.jobs.train.shrink import Shrinking, free_memory
from studio.jobs.train.step_model import StepModel
from studio.jobs.train.streamed_proof import prove_streaming
from studio.jobs.train.trainable_model import stream_base, trainable_model
from studio.jobs.train.watch import TrainingWatch, way_back
from studio.probe.calibrate import remember_run
from studio.probe.data import Row
from studio.probe.device import other_card_note
from studio.probe.fingerprint import short_fingerprint
from studio.probe.models import find_base, refuse_untrainable
from studio.probe.resume import (
    RowsFound,
    changed_libraries,
    fields_changed,
    refuse_other_base,
    refuse_other_recipe,
    refuse_other_rows,
)
from studio.runs.checkpoints import Resumption, asked_resumption, set_aside
from studio.runs.extension import read_extensions, steps_of
from studio.runs.identity import Identity, first_date, read_identity, write_identity
from studio.runs.restarts import tell_restart
from studio.runs.worker import Worker

_OTHER_LOSS = {
    "full": "this model's loss is not its head applied to its backbone: the full logits are built, which takes more "
    "memory",
    "chunked": "liger's loss is made for frozen plain heads whose logits are not multiplied: chunked is used instead",
}
_LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")


@dataclass(frozen=True, slots=True)
class Training:
    """A training that is ready to begin: data read, model loaded, loss compared with the model's own.

    Attributes:
        loop: What takes the steps.
        between: What happens between them.
        state: Where the training stands.
        resumed: Whether `state` comes from a checkpoint.
        streamed: The layers whose weights wait in main memory; None without any.
    """

    loop: LoopParts
    between: Between
    state: TrainState
    resumed: bool
    streamed: StreamedLayers | None = None


def train_run(worker: Worker, recipe: Recipe, objective: Objective | None = None) -> None:
    """Train as the recipe says and write `adapter/`; continue after the newest whole checkpoint if there is one.

    Args:
        worker: Of the run: its folder, its events, the user's requests.
        recipe: All settings of the training.
        objective: What is learnt from the rows; None takes the recipe's.

    Raises:
        JobFailed: A guard fired, or something of the user's cannot be used, the card included.
        BadInput: Model or data changed since they were checked, or since the run first began; or every checkpoint is
            damaged and the user has not agreed to start over.
    """
    worker.patient = True  # a full disk makes the run wait: hours of training would be lost otherwise
    shrinking = Shrinking(worker, recipe)
    TrainingWatch(worker)
    while True:
        going_on = asked_resumption(worker.paths)
        try:
            run(prepare(worker, recipe, objective or objective_of(recipe), going_on, shrinking))
        except Cancelled:  # before the first step; once training, a stop ends the loop instead
            worker.emit(Finished, outcome="stopped", step=going_on.step, seconds=0.0)
            return
        except JobFailed as failure:
            raise way_back(failure, worker) from failure
        except Exception as error:
            if not shrinking.loads_again(error):
                raise
        else:
            return
        free_memory()


def prepare(
    worker: Worker, asked: Recipe, objective: Objective, going_on: Resumption, shrinking: Shrinking
) -> Training:
    """Read the data, load the model, compare its losses and emit what will be trained.

    Args:
        worker: Of the run.
        asked: All settings of the training, as the run was asked for.
        objective: What is learnt from the rows.
        going_on: The checkpoint to continue after, if there is one.
        shrinking: Says in which form it runs now.

    Raises:
        JobFailed: Something of the user's cannot be used.
        BadInput: Model, data or recipe are not those that were checked or that the run began with.
        Cancelled: The user asked for an early end.
    """
    checkpoint, first, recipe = going_on.checkpoint, read_identity(worker.paths), shrinking.recipe
    date = first_date(worker.paths) or datetime.now().replace(microsecond=0)
    _begin(worker, asked, going_on, first, date)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    device = _device(worker, recipe)
    precision = _precision(worker, recipe, device)
    memory = MemoryWatch(worker.emit, device)

    tell = PhaseTeller(worker.emit)
    tell("finding the base model")
    base = find_base(recipe.model.base, recipe.model.revision)
    refuse_untrainable(base, recipe.method)
    folder = base_folder(base, tell)
    trained_on = read_fingerprint(worker, folder)
    refuse_other_base(worker.paths, first, folder, trained_on)
    tokenizer = tokenizer_of(worker, recipe, folder, date)
    rows = read_rows(
        worker,
        tell,
        recipe,
        tokenizer,
        objective=objective,
        identify=lambda train, held: _identify(worker, first, trained_on, train, held),
    )
    # Not before recipe, base and rows are known to be the run's own: a refused resume leaves its folder as it was.
    set_aside(going_on)

    tell("loading the base model", detail=recipe.method)
    set_seed(recipe.train.seed)  # before the adapter is attached, whose A matrices are random
    model, initial, held = trainable_model(
        recipe, base, device, precision, worker=worker, tell=tell, checkpoint=checkpoint, trained_on=trained_on
    )
    memory.see("load", 0)
    check_fit(worker, recipe, model, rows, tokenizer)
    streamed = stream_base(recipe, model, device, worker=worker, tell=tell)
    # Without a pad token any id will do: attention mask and labels hide what it fills.
    padded = Batcher(recipe.train.micro_batch, tokenizer.pad_token_id or 0, device, objective=objective)
    step_model = StepModel(model, recipe.train.loss, precision.autocast, objective)
    step_model.prove(padded.batch(rows.train[:1]))
    if step_model.loss_path != recipe.train.loss:
        worker.emit(Warned, topic="loss", message=_OTHER_LOSS[step_model.loss_path])
    optimizer = optimizer_of(
        recipe, model, device, warn=lambda message: worker.emit(Warned, topic="optimizer", message=message)
    )
    scaler = precision.scaler()
    state = None
    if checkpoint:
        state = load_checkpoint(checkpoint, model, optimizer)
        scaler.load_state_dict(state.scaler)
    by_length = rows_of_like_length(asked, first.recipe)
    batcher = batcher_for(
        recipe.train.packing,
        step_model,
        lambda way: step_batches(recipe, rows.train, way, by_length).typical_rows(),
        padded,
        seq_len=recipe.train.seq_len,
        before=state.packed if state else None,
        tell=tell,
    )
    batches = step_batches(recipe, rows.train, batcher, by_length)
    _say_padding(worker, tell, recipe, rows, (batches, batcher, step_model))
    total, extensions = steps_of(worker.paths, recipe, len(rows.train))
    if needs_reference(objective):
        rows = with_reference(worker, tell, step_model, rows, seen=batches.seen_by(total), batcher=batcher)
        batches = step_batches(recipe, rows.train, batcher, by_length)
    planned: dict[str, Any] = {
        "total_steps": total,
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "rows": len(rows.train),
        "held_out_rows": len(rows.held_out),
        "left_out": dict(rows.left_out),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "card": card_used(device),
        "dtype": precision.name,
        "loss_path": step_model.loss_path,
        "batch_tokens": batches.largest_tokens(),
        "four_bit_share": held.four_bit_share,
        "kept_16bit_bytes": held.kept_16bit_bytes,
    }
    worker.emit(Planned, **planned)
    between = Between(
        worker=worker,
        tell=tell,
        recipe=recipe,
        step_model=step_model,
        optimizer=optimizer,
        tokenizer=tokenizer,
        held_out=rows.held_out,
        prompts=rows.prompts,
        memory=memory,
        batcher=shrinking.evaluates_by(batcher),
        total_steps=total,
        autocast=precision.autocast,
        shrinking=shrinking,
        initial=initial,
    )
    loop = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=scaler,
        batches=batches,
        device=device,
        memory=memory,
        emit=worker.emit,
        steadier=steadier_format(precision, device),
        rescue=between.rescue,
        shrinking=shrinking,
        extensions=extensions,
    )
    new = TrainState(step=0, tokens=0, seconds=0.0, scaler={}, packed=batcher.packed_tokens > 0)
    shrinking.begin(batches, between, state or new, Planned(at=time.time(), **planned))
    return Training(loop, between, state or new, resumed=state is not None, streamed=streamed)


def run(training: Training) -> None:
    """Take the steps that are left and save the adapter; evaluate before the first step and after the last.

    Args:
        training: As `prepare` returned it.

    Raises:
        JobFailed: A guard fired, the adapter is broken or does nothing, or streamed layers gave wrong gradients.
    """
    loop, between, state = training.loop, training.between, training.state
    if training.streamed:
        between.tell("proving the streamed layers")
        first = loop.batches.of_step(min(state.step + 1, between.total_steps))[0]
        prove_streaming(loop.step_model, training.streamed, loop.batches.batch(first), loop.device)
    if not training.resumed:
        between.evaluate(0)
        between.sample(0)
    if not between.stopping:
        if between.recipe.train.compile:
            _compile(between, loop, state.step + 1)
        between.tell("training")
        state = train(loop, between.recipe.train, between.total_steps, state, between.after_step)
    _finish(between, state)


def _begin(worker: Worker, recipe: Recipe, going_on: Resumption, first: Identity, date: datetime) -> None:
    """Emit that the run starts, which checkpoints a resume passes over, and what has changed since the first start.

    Raises:
        BadInput: The recipe is not the one that the run began with.
    """
    if going_on.checkpoint and first.base is None:
        raise BadInput(
            "this run's log does not say what it was made from (an older version wrote it, or it is cut): whether base "
            "and data are still the same cannot be known. Start a new run from its recipe.toml."
        )
    rounded, extensions = refuse_other_recipe(worker.paths, first, recipe), read_extensions(worker.paths)
    versions = {name: version(name) for name in _LIBRARIES}
    worker.emit(
        Started,
        job="train",
        method=recipe.method,
        model=recipe.model.base,
        total_steps=extensions[-1].end if extensions else recipe.train.steps or None,
        resumed_from=going_on.step,
        versions=versions,
        recipe=recipe.to_dict(),
        date=date.isoformat(),
    )
    tell_restart(worker.emit)
    if (fields := fields_changed(first.recipe, recipe)) or extensions:
        worker.emit(Changed, recipe=fields, extensions=[asdict(one) for one in extensions])
    worker.served("from-start")
    worker.served("from-checkpoint")
    if going_on.note:
        worker.emit(Warned, topic="checkpoint", message=going_on.note)
    if changed := [*rounded, *changed_libraries(first, versions)]:
        message = f"changed since the run began: {'; '.join(changed)}. It goes on, but not bit by bit as it would have"
        worker.emit(Warned, topic="resume", message=message)


def _identify(
    worker: Worker, first: Identity, base: dict[str, Any], train: Sequence[Row], held_out: Sequence[Row]
) -> None:
    """Emit which base and rows the run is made from; write them down at the first start, compare them at a resume.

    Raises:
        BadInput: The rows are not those that the run began with.
    """
    rows = RowsFound.of(train, held_out)
    refuse_other_rows(worker.paths, first, rows)
    tell_what_was_lost(worker, first)
    if not first.whole:
        write_identity(worker.paths, base, rows.hashes)
    worker.emit(Identified, base=short_fingerprint(base), rows=rows.table())


def _precision(worker: Worker, recipe: Recipe, device: torch.device) -> Precision:
    precision = choose_precision(recipe.model.dtype, device)
    if why := without_own_format(precision, device):
        worker.emit(Warned, topic="dtype", message=why)
    return precision


def _compile(between: Between, loop: LoopParts, step: int) -> None:
    batches = loop.batches
    why = compile_step(between.step_model, batches.batch(batches.of_step(step)[0]), between.tell, loop.device)
    if why:
        message = f"the layers run as written, not compiled: {plain(why, one_line=True, limit=300)}"
        between.worker.emit(Warned, topic="compile", message=message)


def _say_padding(
    worker: Worker,
    tell: PhaseTeller,
    recipe: Recipe,
    rows: Rows,
    made: tuple[StepBatches, Batcher, StepModel],
) -> None:
    batches, batcher, step_model = made
    if recipe.train.packing == "on" and not batcher.packed_tokens:
        worker.emit(Warned, topic="packing", message=f"rows are padded, not packed: {why_padded(step_model.causal)}")
    if batches.by_length and recipe.train.micro_batch > 1:
        plain = StepBatches(rows.train, batcher, rows_per_step=recipe.rows_per_step, seed=recipe.train.seed)
        detail = f"{batches.padding_share():.1%} of the tokens are padding, {plain.padding_share():.1%} without"
        tell("grouping rows by length", detail=detail)


def _finish(between: Between, end: TrainState) -> None:
    """Save a checkpoint and the adapter and emit how the run ended; a run that was stopped early is not evaluated.

    Args:
        between: Of the run.
        end: Where the training stands after its last step.
    """
    worker, early = between.worker, end.step < between.total_steps
    if end.step == 0:  # stopped before the first step: the adapter would change nothing and be refused
        worker.emit(Finished, outcome="stopped", step=0, seconds=0.0)
        return
    between.checkpoint(end)  # of a finished run too: from there it can be extended
    if not early:
        between.evaluate(end.step)
        between.sample(end.step)
    between.save_adapter(end.step)
    if why_not := remember_run(worker.paths, between.recipe, time.time()):
        worker.emit(Warned, topic="calibration", message=f"not kept for later estimates: {why_not}")
    worker.emit(
        Finished,
        outcome="stopped" if early else "done",
        step=end.step,
        seconds=end.seconds,
        result={"adapter": "adapter", "eval_loss": between.last_eval, "tokens": end.tokens},
    )


def _device(worker: Worker, recipe: Recipe) -> torch.device:
    if note := other_card_note(worker.paths):
        worker.emit(Warned, topic="card", message=note)
    device = job_device(recipe.device.device)
    if recipe.train.loss == "liger":
        require_liger(device)
    if note := limit_memory(recipe.device.budget_gib, device):
        worker.emit(Warned, topic="memory", message=note)
    return device
