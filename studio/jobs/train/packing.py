"""Packed rows: the test that no row sees another, and the choice of the faster way.

Rows are packed only where that test succeeds on the loaded model, and by default only where packing makes a step
faster. What keeps rows apart is in `row_isolation`.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from studio.core.recipe import Packing
from studio.jobs.base.attention import only_for_text
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.device import wait_for
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.train.batches import Batcher
from studio.jobs.train.head import TOLERANCE
from studio.jobs.train.objectives import Encoded, sequences
from studio.jobs.train.objectives.supervised import collate, pack
from studio.jobs.train.randomness import is_random
from studio.jobs.train.row_isolation import attends, call_by_row, call_whole, packed_attentions, stateful_layers
from studio.jobs.train.step_model import StepModel
from studio.runs.failure import leaves_no_other_way, ran_out_of_memory

_PHASE = "choosing packed or padded rows"
_PROBE_TOKENS = 48
_ROUNDS = 2
_LONG_SECONDS = 5.0
_WORTH_IT = 0.95
"""Packing is chosen where a token takes at most this share of its time in padded rows; a smaller gain may be noise."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Relative difference allowed between an adapter tensor's gradients from packed and from padded rows.

They differ by rounding, because the matrix products have other shapes. Measured on a CPU: in fp32 7e-7, in bf16 .009
with two layers and .022 with thirty. Not measured on a card. If a limit is too narrow there, rows are padded, which is
right but may be slower.
"""


def can_pack(step_model: StepModel, rows: Sequence[Example], device: torch.device) -> bool:
    """Switch the model to an attention that keeps packed rows apart; leave the model as it was where none does.

    Each candidate is tested on two rows, with the kernels of training. Packed together they must have the loss that
    they have apart. The second row's loss must stay the same to the bit when the first row's tokens change. The
    adapter's gradients must be those of padded rows. Layers that mix tokens outside of attention and are not known
    (`stateful_layers`) fail this, and so does a kernel whose backward pass is wrong.

    Args:
        step_model: The model as the loop calls it.
        rows: The first two are tested on; with fewer nothing can be packed.
        device: Where the model is.

    Returns:
        Whether rows can be packed.

    Raises:
        RuntimeError: The memory is full or the card has failed, which says nothing about packing.
    """
    causal: Any = step_model.causal
    config = causal.config.get_text_config()
    before = config._attn_implementation
    if len(rows) < 2:
        return False
    names = packed_attentions(before, device) if attends(causal) else (before,)
    call_by_row(causal)
    for name in names:
        try:
            causal.set_attn_implementation(only_for_text(causal.config, name))
            # transformers may keep the old attention without raising, so the config is read back.
            if config._attn_implementation == name and _proven(step_model, rows[0], rows[1], device):
                return True
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
            if leaves_no_other_way(error):
                raise
            # Otherwise this model's forward does not take packed rows, or this torch has no such kernel.
        finally:
            step_model.zero_grad(set_to_none=True)
        causal.set_attn_implementation(only_for_text(causal.config, before))
    call_whole(causal)
    return False


def why_padded(causal: nn.Module) -> str:
    """Return in words why a model's rows are not packed, where `can_pack` says so."""
    if stateful_layers(causal):
        return "its recurrent or convolution layers would carry what they saw in one row into the next"
    return "with this model or attention they would see each other, or there is but one row"


RowsOf = Callable[[Batcher], Sequence[Encoded]]
"""Returns the rows of a typical step for a way of making batches; a step's rows may depend on it."""


def choose(step_model: StepModel, rows_of: RowsOf, padded: Batcher, tight: Batcher, tell: PhaseTeller) -> Batcher:
    """Time padded and packed rows of one step, forward and backward, and return the way that is faster per token.

    Random state is restored afterwards: dropout in training is the same, whether there was a measurement or not.

    Args:
        step_model: The model as the loop calls it, with an attention for packed rows.
        rows_of: The rows to measure with.
        padded: The way without packing.
        tight: The way with packing.
        tell: Told what is being done, and the two speeds.
    """
    tell(_PHASE)
    some = {batcher: rows_of(batcher)[: max(8, 2 * padded.micro_batch)] for batcher in (padded, tight)}
    cuda = [padded.device] if padded.device.type == "cuda" else []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    was_training = step_model.training
    step_model.train()
    try:
        with torch.random.fork_rng(devices=cuda):
            _step_seconds(step_model, some[padded], padded)  # warm-up: kernels are chosen, memory is allocated
            for _ in range(_ROUNDS):
                for batcher, rows in some.items():
                    seconds[batcher is tight].append(_step_seconds(step_model, rows, batcher))
                if seconds[False][-1] + seconds[True][-1] > _LONG_SECONDS:
                    break  # one long measurement is exact enough
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        # Padded batches may be smaller. If they too are too large, the run fails with that in step 1.
        step_model.zero_grad(set_to_none=True)
        tell(_PHASE, 1.0, detail="the memory was full while both were tried: padded, whose batches are smaller")
        return padded
    finally:
        step_model.train(was_training)
    tokens = {batcher: sum(len(row.input_ids) for row in rows) for batcher, rows in some.items()}
    loose, close = min(seconds[False]) / tokens[padded], min(seconds[True]) / tokens[tight]
    better = tight if close <= _WORTH_IT * loose else padded
    word = "packed" if better is tight else "padded"
    speeds = f"packed {1 / close:.3g} tokens/s, padded {1 / loose:.3g}: {word}"
    tell(_PHASE, 1.0, detail=speeds)
    return better


def batcher_for(
    wanted: Packing,
    step_model: StepModel,
    rows_of: RowsOf,
    padded: Batcher,
    *,
    seq_len: int,
    before: bool | None,
    tell: PhaseTeller,
) -> Batcher:
    """Return how rows become batches: packed where that is wanted and possible and, with `auto`, faster; else padded.

    Args:
        wanted: The recipe's word: `auto`, `on` or `off`.
        step_model: The model as the loop calls it; its attention is switched where rows are packed.
        rows_of: The rows to measure with; the two ways may have different ones.
        padded: The way without packing.
        seq_len: The recipe's; a packed batch holds at most `micro_batch * seq_len` tokens, of pairs twice as
            many, as the estimate counts.
        before: Whether a resumed run packed; it goes on in the same way. None at a first start.
        tell: Told what is being done.

    Raises:
        RuntimeError: The card has failed, or the memory is full in the test of packing.
    """
    if wanted == "off" or before is False or not padded.objective.packs:
        return padded
    tell(_PHASE)
    rows = rows_of(padded)
    # An objective that packs has `Example`s, see Objective.packs.
    sides = cast(Sequence[Example], [side for row in rows[:2] for side in sequences(row)])
    with step_model.supervised():
        packs = can_pack(step_model, sides, padded.device)
    if not packs:
        tell(_PHASE, 1.0, detail=f"padded: {why_padded(step_model.causal)}")
        return padded
    tight = replace(padded, packed_tokens=padded.micro_batch * len(sequences(rows[0])) * seq_len)
    if wanted == "auto" and before is None:
        return choose(step_model, rows_of, padded, tight, tell)
    return tight


def _step_seconds(step_model: StepModel, rows: Sequence[Encoded], batcher: Batcher) -> float:
    device = batcher.device
    began = time.perf_counter()
    for group in batcher.groups(rows):
        step_model(batcher.batch(group)).backward()
    wait_for(device)
    seconds = time.perf_counter() - began
    step_model.zero_grad(set_to_none=True)
    return seconds


def _proven(step_model: StepModel, one: Example, other: Example, device: torch.device) -> bool:
    first, second = (_short(row) for row in (one, other))
    # Two versions of the first row without labels: all loss then comes from the second row, which must not notice that
    # the tokens before it are in another order.
    silent = Example(first.input_ids, np.full_like(first.labels, IGNORED))
    changed = Example(first.input_ids[::-1].copy(), silent.labels)
    return _isolated(step_model, (first, second, silent, changed), device) and _same_gradients(
        step_model, (first, second), device
    )


def _isolated(step_model: StepModel, rows: tuple[Example, Example, Example, Example], device: torch.device) -> bool:
    first, second, silent, changed = rows
    with _as_in_training(step_model), torch.no_grad():
        apart = sum(float(step_model(collate([row], 0, device))) for row in (first, second))
        together, with_one, with_changed = (
            float(step_model(pack(pair, device))) for pair in ([first, second], [silent, second], [changed, second])
        )
    dtype = next(step_model.causal.parameters()).dtype
    allowed = TOLERANCE.get(dtype, TOLERANCE[torch.float32]) * max(abs(apart), 1e-6)
    # Sums of different shapes round differently and get a tolerance. The last two have the same shapes, so the second
    # row's arithmetic is the same to the bit; no tolerance there, because a leak between rows may be small.
    return abs(together - apart) <= allowed and with_changed == with_one


def _same_gradients(step_model: StepModel, rows: Sequence[Example], device: torch.device) -> bool:
    """Return whether padded rows give every trained tensor the gradient that the same rows give it when packed.

    The packed loss goes backward with a minus sign, so that autograd itself subtracts the gradients in place. That
    needs no more memory than a training step.
    """
    trained = [parameter for parameter in step_model.parameters() if parameter.requires_grad]
    step_model.zero_grad(set_to_none=True)
    with _as_in_training(step_model):
        step_model(collate(rows, 0, device)).backward()
        sizes = torch.stack([_norm(parameter.grad, device) for parameter in trained])
        (-step_model(pack(rows, device))).backward()
    differences = torch.stack([_norm(parameter.grad, device) for parameter in trained])
    step_model.zero_grad(set_to_none=True)
    dtype = next(step_model.causal.parameters()).dtype
    allowed = GRADIENT_TOLERANCE.get(dtype, GRADIENT_TOLERANCE[torch.float32])
    # A tensor whose gradient is almost zero consists of rounding: its difference is compared with the typical gradient.
    typical = sizes.square().mean().sqrt()
    return bool((differences <= allowed * torch.maximum(sizes, typical)).all()) and bool(typical > 0)


def _norm(gradient: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), device=device) if gradient is None else gradient.norm().float()


@contextmanager
def _as_in_training(step_model: StepModel) -> Iterator[None]:
    """Switch off whatever is random, such as dropout, but leave everything else in training mode.

    In that mode transformers checkpoints layers, and Mamba layers take another kernel than in evaluation.
    """
    training = {module: module.training for module in step_model.modules()}
    step_model.train()
    for module in training:
        # A layer with a dropout probability, its own or of a child whose it may read, goes into evaluation mode itself.
        module.training = module.training and not is_random(module)
    step_model.training = False  # for whoever watches it: what runs meanwhile is no step of the training
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _short(row: Example) -> Example:
    ids = cast(Any, row.input_ids[:_PROBE_TOKENS])
    return Example(ids, ids)
