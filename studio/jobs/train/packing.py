"""Packed rows: the attention that keeps them apart, the proof that it does, and whether packing is faster.

Rows are packed only where it is seen that no row sees another, and by default only where a step is faster for it. The
attention makes nothing of the size tokens x tokens. It is registered in transformers under names of its own:
`ROW_ATTENTION` calls torch's fused attention once per row and runs everywhere; `VARLEN_ATTENTION` calls torch's flash
kernel once for all rows, where the card has one. A block-diagonal mask would do the same, but costs tokens x tokens of
memory and time and loses the flash kernels. Batches that are not packed go to transformers' own function with
transformers' own mask.
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
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.train.batches import Batcher
from studio.jobs.train.head import TOLERANCE
from studio.jobs.train.objectives import Encoded
from studio.jobs.train.objectives.supervised import collate, pack
from studio.jobs.train.step_model import StepModel, evaluating
from studio.runs.failure import leaves_no_other_way, ran_out_of_memory

ROW_ATTENTION, VARLEN_ATTENTION = "studio_rows", "studio_varlen"
"""Their names among transformers' attention implementations."""

_VARLEN_CAPABILITY = (8, 0)
"""Compute capability of torch's flash kernel (aten/src/ATen/native/transformers/cuda/flash_attn)."""

_PHASE = "choosing packed or padded rows"
_PROBE_TOKENS = 48
_ROUNDS = 2
_LONG_SECONDS = 5.0
_WORTH_IT = 0.95
"""Packing is taken when a step takes at most this share of the padded one's time: less is within the noise."""

GRADIENT_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Relative difference allowed between an adapter tensor's gradients packed and padded: rounding, since products have
other shapes. Seen on a CPU: in fp32 7e-7, in bf16 .009 with two layers and .022 with thirty. Not measured on a card; a
limit that is too narrow there costs packing, and nothing else."""


def can_pack(step_model: StepModel, rows: Sequence[Example], device: torch.device) -> bool:
    """Switch the model to an attention that keeps packed rows apart, proven on two rows; leave it where there is none.

    Proven is: two packed rows have the loss that they have apart, another first row leaves the second one's loss as it
    was to the bit, and the adapter's gradients are those of padded rows. Layers that mix tokens outside of attention
    (convolutions, recurrences) fail it, and so does a kernel whose backward is wrong.

    Raises:
        RuntimeError: The memory is full or the card has failed: that says nothing about packing.
    """
    causal: Any = step_model.causal
    before = causal.config._attn_implementation
    if len(rows) < 2:
        return False
    for name in packed_attentions(before, device):
        try:
            causal.set_attn_implementation(name)
            if causal.config._attn_implementation == name and _proven(step_model, rows[0], rows[1], device):
                return True
        except (RuntimeError, TypeError, ValueError, KeyError, AttributeError, ImportError) as error:
            if leaves_no_other_way(error):
                raise
            # Otherwise this model's forward does not take packed rows, or this torch has no such kernel.
        finally:
            step_model.zero_grad(set_to_none=True)
        causal.set_attn_implementation(before)
    return False


RowsOf = Callable[[Batcher], Sequence[Encoded]]
"""The rows of a typical step where rows become batches in this way."""


def choose(step_model: StepModel, rows_of: RowsOf, padded: Batcher, tight: Batcher, tell: PhaseTeller) -> Batcher:
    """Time both ways on the rows of one step, forward and backward, and return the faster; random state is kept."""
    tell(_PHASE)
    some = {batcher: rows_of(batcher)[: max(8, 2 * padded.micro_batch)] for batcher in (padded, tight)}
    cuda = [padded.device] if padded.device.type == "cuda" else []
    seconds: dict[bool, list[float]] = {False: [], True: []}
    was_training = step_model.training
    step_model.train()
    try:
        with torch.random.fork_rng(devices=cuda):
            _step_seconds(step_model, some[padded], padded)  # a warm-up: kernels are chosen, memory is taken
            for _ in range(_ROUNDS):
                for batcher, rows in some.items():
                    seconds[batcher is tight].append(_step_seconds(step_model, rows, batcher))
                if seconds[False][-1] + seconds[True][-1] > _LONG_SECONDS:
                    break  # long measurements need no second one
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        # Padded batches of short rows are smaller; where they are too large as well, step 1 says so.
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
    """Return how rows become batches.

    Args:
        wanted: The recipe's word.
        step_model: The model as the loop calls it; its attention is switched where rows are packed.
        rows_of: The rows to measure with; the two ways may have different ones.
        padded: The way without packing.
        seq_len: The recipe's; a packed batch holds at most `micro_batch * seq_len` tokens, as the estimate counts.
        before: What a resumed run did; None at a first start.
        tell: Told what is being done.
    """
    if wanted == "off" or before is False or not padded.objective.packs:
        return padded
    tell(_PHASE)
    rows = cast(Sequence[Example], rows_of(padded))  # those of every objective that packs
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    step_model.zero_grad(set_to_none=True)
    return seconds


def _proven(step_model: StepModel, one: Example, other: Example, device: torch.device) -> bool:
    first, second = (_short(row) for row in (one, other))
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
    # No tolerance: of equal shapes each token's arithmetic is the same to the bit, and a leak may be small.
    return abs(together - apart) <= allowed and with_changed == with_one


def _same_gradients(step_model: StepModel, rows: Sequence[Example], device: torch.device) -> bool:
    """Whether rows padded beside each other give every trained tensor the gradient that one packed batch gives it.

    The difference is made in the gradients' own place, so that no more memory is taken than a step takes.
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
    # A tensor whose gradient is next to nothing is all rounding: the typical one is its measure.
    typical = sizes.square().mean().sqrt()
    return bool((differences <= allowed * torch.maximum(sizes, typical)).all()) and bool(typical > 0)


def _norm(gradient: Tensor | None, device: torch.device) -> Tensor:
    return torch.zeros((), device=device) if gradient is None else gradient.norm().float()


@contextmanager
def _backward_as_in_training(step_model: StepModel) -> Iterator[None]:
    """Leave out dropout, which would be other noise in every pass, but keep what is computed again in the backward."""
    training = {module: module.training for module in step_model.modules()}
    step_model.eval()
    for module in training:
        # Only the checkpointed layer itself, not what is inside of it; where it drops by its own hand, not even that.
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
    """Return which implementations may keep packed rows apart on a device, the fastest first.

    Args:
        implementation: What the model was loaded with; flash-attn itself takes packed rows.
        device: Where it runs.
    """
    if implementation == "flash_attention_2":
        return (implementation,)
    if implementation != "sdpa":
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
        attention_mask: transformers' mask of a padded batch.
        row_lengths: Tokens of each packed row, in order, on the host; None where the batch is not packed.
        sliding_window: How far back a token sees, itself included; None for all of its row.
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
    """Return what `row_attention` returns; of packed rows by one kernel. Dropout of scores is left to `row_attention`.

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
    import torch.nn.attention.varlen as torch_varlen  # noqa: PLC0415  seconds, and only a card has it

    varlen_attn: Any = torch_varlen.varlen_attn
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    heads, tokens = query.shape[1], query.shape[2]
    rows = (tensor.to(dtype).transpose(1, 2).reshape(tokens, -1, tensor.shape[-1]) for tensor in (query, key, value))
    starts, longest = options["cu_seq_lens_q"], options["max_length_q"]
    output: Tensor = varlen_attn(
        *rows,
        starts,
        starts,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=heads != key.shape[1],
    )
    return output[None], None


def _attend(  # noqa: PLR0917  the order of transformers' function
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, options: Any
) -> tuple[Tensor, None]:
    if mask is None and window is not None and key.shape[2] > window:
        mask = _window_mask(query.shape[2], key.shape[2], window, query.device)
    output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, **options)
    return output


def _window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return who sees whom, `[1, 1, queries, keys]`: the last `window` tokens up to oneself."""
    behind = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


def _mask(*, attention_mask: Tensor | None = None, **named: Any) -> Tensor | None:
    """Make transformers' mask where there is padding; otherwise the functions here know all by themselves."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **named)


for _name, _function in ((ROW_ATTENTION, row_attention), (VARLEN_ATTENTION, varlen_attention)):
    # A compiled layer calls them as they are: the number of rows and their lengths are new in every batch.
    AttentionInterface.register(_name, torch.compiler.disable(_function))  # type: ignore[no-untyped-call]
    AttentionMaskInterface.register(_name, _mask)
