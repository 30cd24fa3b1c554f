"""The products of a mixture of experts: rows sorted by expert, times the weights of a few experts at a time.

Every expert that a token chose is dequantised once in the forward pass and once in the backward pass, in groups of
neighbours whose wider stack takes at most `EXPERT_GROUP_BYTES`, or one by one where a single expert takes more. Between
the passes no dequantised weight is kept, only the widened rows before the activation. The memory does not depend on
which experts are chosen, but for the rows of one group.

Launches for a group: three to dequantise each of the two stacks, one grouped product with each, and about ten to
gather, activate, weigh and put back; about twice as many on the way back. Where torch has no grouped product, each
expert has a product of its own. The host has to know how many rows each expert has, so that each pass waits for the
card once. `tests/bench/bench_experts.py` prints launches, bytes and seconds of a layer.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from studio.core.experts import experts_per_group
from studio.jobs.base.experts.forms import ExpertsForm, shape_of
from studio.jobs.base.experts.stacks import weights_of
from studio.jobs.base.experts.visits import Group, Visits, given, routed

_ALIGNED_BYTES = 16
"""What a row of either operand of torch's grouped product must be a multiple of (ATen/native/GroupedMMUtils.h)."""
_GROUPED_FROM = (8, 0)
"""Compute capability from which torch 2.10 has a grouped product (as transformers checks in integrations/moe.py)."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A low-rank pair beside a stack: one product for each expert.

    Attributes:
        into: A, `[experts, rank, in]`, fp32.
        back: B, `[experts, out, rank]`, fp32.
        scaling: What the product is multiplied by.
    """

    into: Tensor
    back: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass needs beside the tensors that have gradients.

    Attributes:
        module: The experts.
        form: How they are built.
        visits: Who visits whom.
        scalings: Of the pairs beside the widening and the narrowing stack; None where there is no pair.
        goes_back: Whether a backward pass may follow.
    """

    module: Any
    form: ExpertsForm
    visits: Visits
    scalings: tuple[float | None, float | None]
    goes_back: bool


@dataclass(frozen=True, slots=True)
class GroupedForward:
    """Takes the place of a module's own forward.

    Attributes:
        module: The experts.
        form: How they are built.
        pairs: Low-rank pairs that are active, by the name of the stack beside which they stand.
    """

    module: nn.Module
    form: ExpertsForm
    pairs: dict[str, Pair] = field(default_factory=dict)

    def __call__(self, x: Tensor, chosen: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        """Return what the experts make of tokens, `[tokens, hidden]`.

        Args:
            x: `[tokens, hidden]`; a copy of them for each expert where the module does not route.
            chosen: `[tokens, per_token]`, numbers of experts; None where the module does not route.
            weights: `[tokens, per_token]`, what each expert's answer is multiplied by.
        """
        return _run(self.module, self.form, self.pairs, x, (chosen, weights))


def take_over(module: nn.Module, form: ExpertsForm) -> GroupedForward:
    """Let a module of experts multiply in groups from now on; return what does it."""
    # torch looks for `forward` on the instance first. transformers' own switch (`experts_implementation`) is one for
    # the whole model, and knows neither experts left in 16 bit nor Llama 4.
    made = module.__dict__.get("forward")
    if not isinstance(made, GroupedForward):
        made = GroupedForward(module, form)
        module.__dict__["forward"] = made
    return made


def _run(
    module: nn.Module,
    form: ExpertsForm,
    pairs: dict[str, Pair],
    x: Tensor,
    routing: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    chosen, weights = routing
    stack = getattr(module, form.up)
    per_group = 0
    if getattr(stack, "quant_state", None) is not None:
        per_group = experts_per_group(*widest(module, form))
    count = shape_of(stack)[0]
    visits = given(x, count, per_group) if chosen is None else routed(chosen, count, per_group)
    beside = [pairs.get(name) for name in form.stacks]
    factors = [t for pair in beside for t in ((pair.into, pair.back) if pair else (None, None))]
    scalings = [pair.scaling if pair else None for pair in beside]
    work = Work(module, form, visits, (scalings[0], scalings[1]), torch.is_grad_enabled())
    made: Tensor = _Experts.apply(x, weights, work, *factors)  # type: ignore[no-untyped-call]
    return made


def widest(module: nn.Module, form: ExpertsForm) -> tuple[int, int]:
    """Return how many experts there are, and the bytes of the wider matrix of one of them, dequantised."""
    stacks = [getattr(module, name) for name in form.stacks]
    count = shape_of(stacks[0])[0]
    state = getattr(stacks[0], "quant_state", None)
    itemsize = (state.dtype if state is not None else stacks[0].dtype).itemsize
    return count, max(shape_of(stack).numel() for stack in stacks) // count * itemsize


class _Experts(torch.autograd.Function):
    """All experts of a layer. Its backward dequantises the weights again, and activates the kept rows again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor | None, work: Work, *factors: Tensor | None) -> Tensor:
        visits, compute = work.visits, _compute_dtype(work)
        wants = work.goes_back and any(ctx.needs_input_grad)
        wide = shape_of(getattr(work.module, work.form.up))[1 if not work.form.transposed else 2]
        kept = x.new_empty((visits.source.numel(), wide), dtype=compute) if wants else None
        shares = None if weights is None else weights.reshape(-1)
        result = visits.blank(x.shape[-1], x)
        with torch.autocast(x.device.type, enabled=False):
            for group in visits.groups:
                rows = x[visits.source[group.rows]].to(compute)
                widened = _Stack(work, 0, group, factors).times(rows)
                del rows
                if kept is not None:
                    kept[group.rows] = widened
                inner = _activated(work, widened)
                del widened
                made = _Stack(work, 1, group, factors).times(inner)
                place = visits.place[group.rows]
                result[place] = (made if shares is None else made * shares[place].unsqueeze(-1)).to(x.dtype)
                del inner, made
            out = visits.summed(result)  # where autocast is on, a sum would be made, and given back, in fp32
        ctx.work = work
        needs_rows = factors[0] is not None  # A of the widening stack has its gradient from them
        ctx.save_for_backward(x if needs_rows else None, weights, kept, *factors)
        ctx.dtype = x.dtype
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        work: Work = ctx.work
        x, weights, kept, *factors = ctx.saved_tensors
        visits, compute = work.visits, kept.dtype
        wants_x, wants_weights = ctx.needs_input_grad[:2]
        dtype = ctx.dtype
        shares = None if weights is None else weights.reshape(-1)
        of_rows = visits.blank(gradient.shape[-1], gradient).to(dtype) if wants_x else None
        of_shares = torch.zeros_like(shares) if shares is not None and wants_weights else None
        of_factors = [torch.zeros_like(f) if f is not None and f.requires_grad else None for f in factors]
        results = visits.place // visits.per_token
        with torch.autocast(gradient.device.type, enabled=False):
            for group in visits.groups:
                place = visits.place[group.rows]
                back = gradient[results[group.rows]].to(compute)
                with torch.enable_grad():
                    widened = kept[group.rows].detach().requires_grad_()
                    activated = _activated(work, widened)
                inner, down = activated.detach(), _Stack(work, 1, group, factors)
                of_inner = down.times_back(back)
                if shares is not None:
                    share = shares[place].unsqueeze(-1)
                    if of_shares is not None:
                        of_shares[place] = ((inner * of_inner).sum(dim=-1) + down.along_bias(back)).to(of_shares.dtype)
                    of_inner, back = (of_inner * share).to(compute), (back * share).to(compute)
                down.add_gradients(of_factors, inner, back)
                del back, inner
                (of_widened,) = torch.autograd.grad(activated, widened, of_inner)
                del of_inner, activated, widened
                up = _Stack(work, 0, group, factors)
                if of_factors[0] is not None or of_factors[1] is not None:
                    up.add_gradients(of_factors, x[visits.source[group.rows]].to(compute), of_widened)
                if of_rows is not None:
                    of_rows[place] = up.times_back(of_widened).to(dtype)
            of_x = None if of_rows is None else visits.summed(of_rows)
        return of_x, None if of_shares is None else of_shares.view_as(weights), None, *of_factors


def _compute_dtype(work: Work) -> torch.dtype:
    stack = getattr(work.module, work.form.up)
    state = getattr(stack, "quant_state", None)
    dtype: torch.dtype = stack.dtype if state is None else state.dtype
    return dtype


def _activated(work: Work, widened: Tensor) -> Tensor:
    made: Tensor = work.module._apply_gate(widened) if work.form.routes and work.form.gated else _plain(work, widened)
    return made


def _plain(work: Work, widened: Tensor) -> Tensor:
    """Return what experts make of widened rows that have no `_apply_gate`."""
    act = work.module.act_fn
    if not work.form.gated:
        made: Tensor = act(widened)
        return made
    gate, up = widened.chunk(2, dim=-1)
    joined: Tensor = up * act(gate)
    return joined


class _Stack:
    """One stack's part in the pass over a group: its weights are dequantised for one product and dropped again."""

    def __init__(self, work: Work, which: int, group: Group, factors: Any) -> None:
        self._name, self._which = work.form.stacks[which], which
        self._module, self._form, self._group = work.module, work.form, group
        self._into, self._back = factors[2 * which : 2 * which + 2]
        self._scaling = work.scalings[which] or 0.0

    def times(self, rows: Tensor) -> Tensor:
        """Return `[rows, out]`: the product with the weights, biases and the adapter's share added."""
        weights = self._weights()
        made = grouped(rows, weights if self._form.transposed else weights.transpose(-2, -1), self._group)
        del weights
        if self._form.biased:
            made += self._biases(rows)
        if self._into is not None:
            narrow = grouped(rows, self._part(self._into, rows).transpose(-2, -1), self._group) * self._scaling
            made += grouped(narrow, self._part(self._back, rows).transpose(-2, -1), self._group)
        return made

    def times_back(self, rows: Tensor) -> Tensor:
        """Return `[rows, in]`: the gradient of the input for a gradient of the output."""
        weights = self._weights()
        made = grouped(rows, weights.transpose(-2, -1) if self._form.transposed else weights, self._group)
        del weights
        if self._into is not None:
            narrow = grouped(rows, self._part(self._back, rows), self._group) * self._scaling
            made += grouped(narrow, self._part(self._into, rows), self._group)
        return made

    def along_bias(self, rows: Tensor) -> Tensor | float:
        """Return for each row the product with its expert's bias: what the weight of an answer gets of it."""
        return (self._biases(rows) * rows).sum(dim=-1) if self._form.biased else 0.0

    def add_gradients(self, factors: list[Tensor | None], rows: Tensor, gradient: Tensor) -> None:
        """Put the adapter's gradients for a group into those for all experts.

        Args:
            factors: Gradients of both stacks' pairs.
            rows: The stack's input, `[rows, in]`.
            gradient: Its output's gradient, `[rows, out]`.
        """
        of_into, of_back = factors[2 * self._which : 2 * self._which + 2]
        if self._into is None or of_into is None or of_back is None:
            return
        group = slice(self._group.first, self._group.stop)
        narrow = grouped(rows, self._part(self._into, rows).transpose(-2, -1), self._group)
        of_narrow = grouped(gradient, self._part(self._back, rows), self._group)
        of_into[group] = outer(of_narrow, rows, self._group).to(of_into.dtype) * self._scaling
        of_back[group] = outer(gradient, narrow, self._group).to(of_back.dtype) * self._scaling

    def _weights(self) -> Tensor:
        return weights_of(getattr(self._module, self._name), self._group.first, self._group.stop)

    def _biases(self, rows: Tensor) -> Tensor:
        biases = getattr(self._module, f"{self._name}_bias")[self._group.first : self._group.stop]
        counts = [stop - start for start, stop in pairwise((0, *self._group.ends))]
        repeats = torch.tensor(counts, device=rows.device)
        made: Tensor = biases.to(rows.dtype).repeat_interleave(repeats, dim=0, output_size=rows.shape[0])
        return made

    def _part(self, factor: Tensor, rows: Tensor) -> Tensor:
        return factor[self._group.first : self._group.stop].to(rows.dtype).contiguous()


def grouped(rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Return `[rows, out]`: the rows of each expert times its matrix.

    Args:
        rows: `[rows, in]`, sorted by expert.
        weights: `[experts, in, out]`.
        group: Says where each expert's rows end.
    """
    if has_grouped_product(rows, weights):
        return functional.grouped_mm(rows, weights, offs=_ends(group, rows))
    made = rows.new_empty((rows.shape[0], weights.shape[-1]))
    for expert, (start, stop) in enumerate(pairwise((0, *group.ends))):
        if start < stop:
            torch.mm(rows[start:stop], weights[expert], out=made[start:stop])
    return made


def outer(left: Tensor, right: Tensor, group: Group) -> Tensor:
    """Return `[experts, left, right]`: for each expert, the sum of its rows' outer products."""
    if has_grouped_product(left, right):
        return functional.grouped_mm(left.transpose(0, 1), right, offs=_ends(group, left))
    made = left.new_zeros((len(group.ends), left.shape[-1], right.shape[-1]))
    for expert, (start, stop) in enumerate(pairwise((0, *group.ends))):
        if start < stop:
            torch.mm(left[start:stop].transpose(0, 1), right[start:stop], out=made[expert])
    return made


def has_grouped_product(left: Tensor, right: Tensor) -> bool:
    """Whether torch multiplies all experts of a group in one launch: on new cards, and with aligned rows."""
    sizes = (left.shape[-1], *right.shape[-2:])
    if any(size * left.element_size() % _ALIGNED_BYTES for size in sizes[: None if right.dim() == 3 else 1]):
        return False
    if right.dim() == 2 and right.shape[-1] * right.element_size() % _ALIGNED_BYTES:
        return False
    return left.device.type != "cuda" or torch.cuda.get_device_capability(left.device) >= _GROUPED_FROM


def _ends(group: Group, rows: Tensor) -> Tensor:
    return torch.tensor(group.ends, dtype=torch.int32, device=rows.device)
