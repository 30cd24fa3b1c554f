"""A dense MLP that takes long rows in tiles, as sizes: whole are its input, its output and their gradients alone.

Source: studio/jobs/train/tiles.py.
"""

from dataclasses import replace

from studio.core.shape import Layer
from studio.core.vram import operators as op
from studio.core.vram.modules import Modules
from studio.core.vram.polynomial import Polynomial, uncovered
from studio.core.vram.tape import Tape, Tensor, marks, run_backward

_WITHOUT_MODULE = frozenset({"opt"})
"""Families whose layers hold the MLP's products themselves, so that no module of theirs could take tiles."""


def dense(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return the output of a layer's dense MLP, in tiles where they are taken."""
    if not (run.traits.tile and takes_tiles(run, layer) and (run.checkpointed or not run.tape.records)):
        return run.mlp(layer, x)
    adapter = run.traits.adapter
    trained = [
        op.whole_weight(run.tape, Polynomial(per_rank=side), 4, run.gradients)
        for linear in layer.mlp
        if linear.name in adapter.targets
        for side in (linear.inputs, linear.outputs)
    ]
    gradients = tuple(map(op.gradient_like, (x, *trained)))
    out = op.result_of((x, *trained), x.elements, x.itemsize, gradients, (x,))
    for mark in _forward(run, layer, x.itemsize):
        run.tape.passing(mark)
    if out.node is not None:
        out.node.turns, out.node.turns_last = tuple((mark,) for mark in _backward(run, layer, x)), True
    run.tape.named(x)
    return out


def takes_tiles(run: Modules, layer: Layer) -> bool:
    """Whether a layer's MLP can be taken in tiles."""
    adapter, names = run.traits.adapter, {linear.name for linear in layer.mlp}
    whole = adapter.dora or not names.isdisjoint(adapter.whole) or run.shape.family in _WITHOUT_MODULE
    return bool(names) and not whole


def _forward(run: Modules, layer: Layer, itemsize: float) -> tuple[Polynomial, ...]:
    """Return the marks of one tile's forward, of which nothing is kept; its input is a view."""
    tape = Tape(records=False)
    piece = tape.given(Polynomial(per_token=run.shape.hidden), itemsize)
    tape.hold(piece)
    made = replace(run, tape=tape, gradients=[], beside=[], lasting=[]).mlp(layer, piece)
    tape.hold(made)
    return uncovered(_at_tile(mark, run.traits.tile) for mark in marks(tape.take(), tape.sizes))


def _backward(run: Modules, layer: Layer, x: Tensor) -> tuple[Polynomial, ...]:
    """Return the marks of one tile that is computed again and goes backward; what comes in is a view."""
    tape = Tape()
    node = tape.node() if x.node is not None else None
    if node is not None:
        node.keeps = []
    piece = tape.given(Polynomial(per_token=run.shape.hidden), x.itemsize, node)
    tape.hold(piece)
    made = replace(run, tape=tape, gradients=[], beside=[], lasting=[]).mlp(layer, piece)
    if made.node is None:
        return ()
    tape.hold(made)
    again = tape.take(made.node)
    incoming = tape.given(made.elements, made.itemsize)
    tape.hold(incoming)
    before, after = run_backward(tape, made.node, incoming)
    events = (*again, *before, *after, *tape.take())
    return uncovered(_at_tile(mark, run.traits.tile) for mark in marks(events, tape.sizes))


def _at_tile(size: Polynomial, tokens: int) -> Polynomial:
    """Return a size for the tokens of a tile, whatever the micro-batch has."""
    return Polynomial(per_rank=size.per_token_rank * tokens + size.per_rank, fixed=size.per_token * tokens + size.fixed)
