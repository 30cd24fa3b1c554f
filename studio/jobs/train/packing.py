"""Packed rows: the attention that keeps them apart, the test that it does, and the choice of the faster way.

Rows are packed only where a test on the loaded model shows that no row sees another, and by default only where that
makes a step faster. Two attention functions are registered in transformers under names of their own. `ROW_ATTENTION`
calls torch's fused attention once per row and runs everywhere; `VARLEN_ATTENTION` calls torch's flash kernel once for
all rows, where the card has one. Neither allocates anything of size tokens x tokens, as a block-diagonal mask would,
which also rules out the flash kernels. Batches that are not packed go to transformers' own function with transformers'
own mask.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from studio.core.recipe import Packing
from studio.jobs.base import sinks
from studio.jobs.base.attention import only_for_text
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.device import wait_for
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.base.sinks import SINK_ATTENTION, packed_sink_attention, sink_attention, sink_mask, window_mask
from studio.jobs.train.batches import Batcher
from studio.jobs.train.head import TOLERANCE
from studio.jobs.train.objectives import Encoded
from studio.jobs.train.objectives.supervised import collate, pack
from studio.jobs.train.step_model import StepModel, evaluating
from studio.runs.failure import leaves_no_other_way, ran_out_of_memory

ROW_ATTENTION, VARLEN_ATTENTION = "studio_rows", "studio_varlen"
"""Their names among transformers' attention implementations."""

_VARLEN_CAPABILITY = (8, 0)
"""Lowest compute capability of torch's flash kernel (aten/src/ATen/native/transformers/cuda/flash_attn)."""

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

    Each candidate is tested on two rows. Packed together they must have the loss that they have apart. The second row's
    loss must stay the same to the bit when the first row's tokens change. The adapter's gradients must be those of
    padded rows. Layers that mix tokens outside of attention (convolutions, recurrences) fail this, and so does a kernel
    whose backward pass is wrong.

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
    for name in packed_attentions(before, device):
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
    return False


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
        seq_len: The recipe's; a packed batch holds at most `micro_batch * seq_len` tokens, as the estimate counts.
        before: Whether a resumed run packed; it goes on in the same way. None at a first start.
        tell: Told what is being done.

    Raises:
        RuntimeError: The card has failed, or the memory is full in the test of packing.
    """
    if wanted == "off" or before is False or not padded.objective.packs:
        return padded
    tell(_PHASE)
    rows = cast(Sequence[Example], rows_of(padded))  # an objective that packs has `Example`s, see Objective.packs
    if not can_pack(step_model, rows, padded.device):
        return padded
    tight = replace(padded, packed_tokens=padded.micro_batch * seq_len)
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
    with evaluating(step_model):
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
    with _backward_as_in_training(step_model):
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
def _backward_as_in_training(step_model: StepModel) -> Iterator[None]:
    """Switch dropout off, whose noise differs in every pass, but keep gradient checkpointing as in training.

    transformers checkpoints a layer only while that layer is in training mode.
    """
    training = {module: module.training for module in step_model.modules()}
    step_model.eval()
    for module in training:
        # The checkpointed layer itself is in training mode, the modules inside it are not. A layer that has a dropout
        # probability of its own stays in evaluation mode.
        drops = any("drop" in name and isinstance(value, float) and value for name, value in vars(module).items())
        module.training = bool(getattr(module, "gradient_checkpointing", False)) and not drops
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def _short(row: Example) -> Example:
    ids = cast(Any, row.input_ids[:_PROBE_TOKENS])
    return Example(ids, ids)


def packed_attentions(implementation: str, device: torch.device) -> tuple[str, ...]:
    """Return the attention implementations that may keep packed rows apart on a device, fastest first.

    Args:
        implementation: The one that the model was loaded with. flash-attn takes packed rows itself; `eager` and others
            have no counterpart here.
        device: Where the model runs.
    """
    if implementation == "flash_attention_2":
        return (implementation,)
    if implementation not in ("sdpa", SINK_ATTENTION):
        return ()
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= _VARLEN_CAPABILITY
    return (VARLEN_ATTENTION, ROW_ATTENTION) if able else (ROW_ATTENTION,)


def row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return the attention's output `[batch, seq, heads, head_dim]`, and None for its weights.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`.
        key: `[batch, key-value heads, seq, head_dim]`.
        value: Like `key`.
        attention_mask: transformers' mask of a padded batch; None where there is nothing to mask but the future.
        row_lengths: Tokens of each packed row, in order, on the host; None where the batch is not packed.
        sliding_window: How many tokens back a token sees, itself included; None for all of its row.
        **options: What transformers' own function takes: scaling, dropout.
    """
    if row_lengths is None:
        return _attend(module, query, key, value, attention_mask, sliding_window, options)
    lengths = row_lengths.tolist()
    rows = zip(*(torch.split(tensor, lengths, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [_attend(module, q, k, v, None, sliding_window, options)[0] for q, k, v in rows]
    return torch.cat(outputs, dim=1), None


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    row_lengths: Tensor | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what `row_attention` returns, but compute all packed rows with one kernel.

    The kernel has no dropout of attention scores, so with dropout `row_attention` is called.

    Args:
        module: The attention layer.
        query: `[batch, heads, seq, head_dim]`, batch 1 where rows are packed.
        key: `[batch, key-value heads, seq, head_dim]`.
        value: Like `key`.
        attention_mask: transformers' mask of a padded batch.
        row_lengths: As for `row_attention`.
        sliding_window: As for `row_attention`.
        **options: Those of `row_attention`, and `cu_seq_lens_q` and `max_length_q` of packed rows.
    """
    if row_lengths is None or options.get("dropout"):
        named: dict[str, Any] = {"row_lengths": row_lengths, "sliding_window": sliding_window}
        return row_attention(module, query, key, value, attention_mask, **named, **options)
    kind = query.device.type
    # Autocast does not know this function, so its inputs are cast here; the flash kernel takes 16 bits only.
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    grouped, tokens = query.shape[1] != key.shape[1], query.shape[2]
    # The kernel's layout: [tokens, heads, head_dim] without a batch; `starts` are the rows' first places and the end.
    query, key, value = (x.to(dtype).transpose(1, 2).reshape(tokens, -1, x.shape[-1]) for x in (query, key, value))
    starts, longest, scale = options["cu_seq_lens_q"], options["max_length_q"], options.get("scaling")
    if (own := options.get("s_aux")) is not None:
        named = {"starts": starts, "longest": longest, "scale": scale, "window": sliding_window}
        return packed_sink_attention(query, key, value, own, **named)[None], None
    import torch.nn.attention.varlen as torch_varlen  # noqa: PLC0415  seconds, and only a card has it

    varlen_attn: Any = torch_varlen.varlen_attn
    output: Tensor = varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=scale,
        # (left, right) of the token itself: -1 is without limit, and a right of 0 makes it causal.
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=grouped,
    )
    return output[None], None


def _attend(  # noqa: PLR0917  the order of transformers' function
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, options: Any
) -> tuple[Tensor, None]:
    if options.get("s_aux") is not None:
        return sink_attention(module, query, key, value, mask, sliding_window=window, **options)
    if mask is None and window is not None and key.shape[2] > window:
        mask = window_mask(query.shape[2], key.shape[2], window, query.device)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output


def _mask(*, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    """Return transformers' mask for a padded batch, and None for a packed one, whose rows the functions here know."""
    if attention_mask is None:
        return None
    made = sink_mask if named["config"].model_type in sinks.FAMILIES else sdpa_mask
    return made(attention_mask=attention_mask, **named)


for _name, _function in ((ROW_ATTENTION, row_attention), (VARLEN_ATTENTION, varlen_attention)):
    # Never compiled, even inside a compiled layer: the number of rows and their lengths are new in every batch.
    AttentionInterface.register(_name, torch.compiler.disable(_function))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(_name, _mask)
