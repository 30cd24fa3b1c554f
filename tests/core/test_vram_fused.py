"""Fused kernels against functions of our own that save and overwrite the same tensors, run on a CPU and tracked.

What they compute is nonsense where a kernel would compute in registers: only births and deaths of tensors count.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor as Real
from torch.autograd import Function

from studio.core.errors import BadInput
from studio.core.layer_parts import Linear
from studio.core.measured import height
from studio.core.stock import modules as fused
from studio.core.stock.setup import StockSetup
from studio.core.vram import operators as op
from studio.core.vram.head import head_marks
from studio.core.vram.modules import AdapterTraits
from studio.core.vram.operators import Arithmetic
from studio.core.vram.polynomial import Polynomial, largest
from studio.core.vram.tape import Tape, Tensor, alive_after, marks, run_backward
from studio.jobs.measure.storages import Storages
from tests.core.loops import estimated
from tests.core.published_rows import shapes

ROWS, TOKENS, HIDDEN, INNER, VOCABULARY = 4, 2048, 64, 176, 512
LLAMA = shapes()["Meta-Llama-3-8B"]
TRAITS = fused.StockTraits(
    Arithmetic(2, 2, autocast=True),
    AdapterTraits(frozenset({"q", "gate", "up", "down"}), dropout=True),
    quantised="nf4",
    kernel="flash",
    batched=True,
    fused_kernels="foak",
)


class Norm(Function):
    @staticmethod
    def forward(ctx: Any, x: Real) -> Real:
        ctx.save_for_backward(x, torch.empty(x.shape[0]))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Real) -> Real:
        return gradient.mul_(2)


class Gated(Function):
    @staticmethod
    def forward(ctx: Any, gate: Real, up: Real) -> Real:
        ctx.save_for_backward(gate, up)
        return gate * up

    @staticmethod
    def backward(ctx: Any, gradient: Real) -> tuple[Real, Real]:
        gate, up = ctx.saved_tensors
        return gate.mul_(gradient), up.mul_(gradient)


def product(x: Real, weight: Real) -> tuple[Real, Real]:
    """Return `x @ W + dropped @ A @ B`, added in place, with a weight that is dequantised for it, and what was kept."""
    whole = weight.clone()
    out = x @ whole.T
    del whole
    dropped = x.clone()
    out += torch.empty_like(out)
    return out, dropped


class Projections(Function):
    @staticmethod
    def forward(ctx: Any, x: Real, weight: Real) -> tuple[Real, Real, Real]:
        pairs = [product(x, weight) for _ in range(3)]
        ctx.save_for_backward(x, *(kept for _, kept in pairs))
        ctx.weight = weight
        return pairs[0][0], pairs[1][0], pairs[2][0]

    @staticmethod
    def backward(ctx: Any, *gradients: Real) -> tuple[Real, None]:
        x, *kept = ctx.saved_tensors
        for number, (gradient, dropped) in enumerate(zip(gradients, kept, strict=True)):
            if number:
                x += gradient @ ctx.weight
            else:
                torch.matmul(gradient, ctx.weight, out=x)
            x += (dropped != 0) * (gradient @ ctx.weight)
        return x, None


def tracked(work: Callable[[Real], Real], width: int = HIDDEN) -> int:
    """Return the peak of tensors of a forward and its backward, beside input `[tokens, width]` and first gradient."""
    x = torch.zeros(TOKENS, width, dtype=torch.bfloat16).requires_grad_(True)
    gc.collect()
    storages = Storages()
    storages.stage("all")
    with storages:
        out = work(x)
        gradient = torch.empty_like(out)
        node, out = out.grad_fn, None
        torch.autograd.backward(torch.autograd.graph.GradientEdge(node, 0), gradient)
    return height(storages.log.peaks()["all"])


def counted(work: Callable[[fused.StockModules, Tensor], Tensor]) -> float:
    """Return the same of symbolic tensors."""
    tape = Tape()
    x = tape.given(Polynomial(per_token=HIDDEN), 2, tape.node())
    tape.hold(x)
    out = work(TRAITS.modules(tape, LLAMA), x)
    assert out.node is not None
    tape.hold(out)
    forward = tape.take(out.node)
    gradient = tape.given(out.elements, out.itemsize)
    tape.hold(gradient)  # as the caller of torch's backward does
    tape.release(out)
    before, after = run_backward(tape, out.node, gradient)
    ahead = marks(forward, tape.sizes, x.bytes)
    alive = alive_after(forward, tape.sizes, x.bytes).plus(gradient.bytes)
    back = marks((*before, *after), tape.sizes, alive)
    return largest([*ahead, *back], TOKENS, 0, 0) - 2 * TOKENS * HIDDEN


class Output(Function):
    @staticmethod
    def forward(ctx: Any, x: Real, weight: Real) -> Real:
        out, kept = product(x, weight)
        ctx.save_for_backward(x, kept)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Real) -> tuple[Real, None]:
        _, kept = ctx.saved_tensors
        result = gradient @ ctx.weight
        result += (kept != 0) * (gradient @ ctx.weight)
        return result, None


class Mlp(Function):
    @staticmethod
    def forward(ctx: Any, x: Real, into: Real, back: Real) -> Real:
        gate, seen_gate = product(x, into)
        up, seen_up = product(x, into)
        out, seen_inner = product(gate * up, back)
        ctx.save_for_backward(x, gate, up, seen_gate, seen_up, seen_inner)
        ctx.maps = into, back
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Real) -> tuple[Real, None, None]:
        x, gate, up, seen_gate, seen_up, seen_inner = ctx.saved_tensors
        into, back = ctx.maps
        mask = seen_inner != 0
        inner = gradient @ back
        inner += gradient @ back
        del mask
        gate.mul_(inner)
        up.mul_(inner)
        torch.matmul(up, into, out=x)
        for side, seen in ((up, seen_up), (gate, seen_gate)):
            x += (seen != 0) * (side @ into)
        return x, None, None


SQUARE, WIDE = torch.zeros(HIDDEN, HIDDEN, dtype=torch.bfloat16), torch.zeros(INNER, HIDDEN, dtype=torch.bfloat16)
Q = Linear("q", HIDDEN, HIDDEN)
MAPS = Linear("gate", HIDDEN, INNER), Linear("up", HIDDEN, INNER), Linear("down", INNER, HIDDEN)


def real_projections(x: Real) -> Real:
    query, key, value = Projections.apply(Norm.apply(x), SQUARE)
    return Gated.apply(query + value, key)


def projections(run: fused.StockModules, x: Tensor) -> Tensor:
    query, key, value = fused.adapted_linears(run, (Q, Q, Q), fused.rms_norm(x, 1, over_gradient=True))
    return fused.gated_product(op.add(query, value), key)


def real_output(x: Real) -> Real:
    return Norm.apply(Output.apply(Norm.apply(x), SQUARE))


def output(run: fused.StockModules, x: Tensor) -> Tensor:
    (out,) = fused.adapted_linears(run, (Q,), fused.rms_norm(x, 1, over_gradient=True))
    return fused.rms_norm(out, 1, over_gradient=True)


def real_mlp(x: Real) -> Real:
    return Norm.apply(Mlp.apply(Norm.apply(x), WIDE, WIDE.T.contiguous()))


def mlp(run: fused.StockModules, x: Tensor) -> Tensor:
    return fused.rms_norm(fused.adapted_mlp(run, MAPS, fused.rms_norm(x, 1, over_gradient=True)), 1, over_gradient=True)


@pytest.mark.parametrize(
    ("real", "symbolic"), [(real_projections, projections), (real_output, output), (real_mlp, mlp)]
)
def test_a_fused_function_holds_what_the_real_one_holds(real: Any, symbolic: Any) -> None:
    assert counted(symbolic) == pytest.approx(tracked(real), rel=0.02)


class Overwriting(Function):
    @staticmethod
    def forward(ctx: Any, logits: Real) -> Real:
        ctx.save_for_backward(logits)
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, _gradient: Real) -> Real:
        (logits,) = ctx.saved_tensors
        return logits.mul_(2)


HEAD = torch.zeros(HIDDEN, VOCABULARY, dtype=torch.bfloat16)


def real_loss(hidden: Real) -> Real:
    hidden = Norm.apply(hidden)
    logits = hidden @ HEAD
    wide = logits.float()
    return Overwriting.apply(wide.view(ROWS, -1, VOCABULARY)[:, :-1].contiguous())


def test_a_loss_that_overwrites_its_logits() -> None:
    """16-bit logits that the model's forward holds, fp32 ones, and a copy that drops a token and becomes a gradient."""
    shape = replace(LLAMA, hidden=HIDDEN, vocabulary=VOCABULARY)
    found = head_marks(shape, TRAITS, fused.TransformersLoss(shift_copied=True, overwrites=True))
    peak = largest((*found.forward, *found.backward), TOKENS, 0, 0)
    per_logit = peak / TOKENS / VOCABULARY
    assert tracked(real_loss) + 2 * HIDDEN * TOKENS == pytest.approx(peak, rel=0.01)
    assert 10 < per_logit < 10.6


def test_liger_keeps_less_than_the_model_s_own_operators() -> None:
    """An RMS norm keeps its input and not two fp32 copies; gate and up are overwritten by their gradients."""
    setup = StockSetup(seq_len=2048, method="lora", loss="liger", recompute="none")
    own, liger = (estimated(LLAMA, replace(setup, fused_kernels=name)).components for name in ("none", "liger"))
    assert 0.6 * own.activations < liger.activations < 0.8 * own.activations


@pytest.mark.parametrize(
    ("model", "kernels", "loss", "found"),
    [
        ("falcon-7b", "liger", "liger", "liger has no kernels for falcon"),
        ("gemma-2b", "foak", "full", "foak has no kernels for gemma"),
        ("PowerLM-3b", "liger", "liger", "--loss full"),
    ],
)
def test_kernels_that_do_not_exist(model: str, kernels: Any, loss: Any, found: str) -> None:
    with pytest.raises(BadInput, match=found):
        estimated(shapes()[model], StockSetup(fused_kernels=kernels, loss=loss))
