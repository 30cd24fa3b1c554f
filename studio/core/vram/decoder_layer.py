"""One decoder layer of any family, forward and backward: norms, attention and MLP in the order of the real forward."""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.shape import Layer, ModelShape
from studio.core.vram import gemma
from studio.core.vram import operators as op
from studio.core.vram.attention import attention
from studio.core.vram.experts import feed_forward, routed
from studio.core.vram.mixers import mixed
from studio.core.vram.modules import LayerTraits, Modules
from studio.core.vram.polynomial import Polynomial, uncovered
from studio.core.vram.tape import Events, Tape, Tensor, marks, recomputed, run_backward
from studio.core.vram.tiles import dense


@dataclass(frozen=True, eq=False, slots=True)
class LayerPass:
    """A layer's forward and backward as births and deaths.

    Attributes:
        sizes: Bytes of each tensor, by its number.
        forward: What happens on the way forward.
        backward: What happens on the way back, with the recomputation where the layer is checkpointed.
        source: Number of the input, which is there already.
        result: Number of the output.
        incoming: Number of the output's gradient, which is there when the backward begins.
        outgoing: Number of the input's gradient; -1 where the input wants none.
        lasting: Numbers of the trained weights' gradients, which stay alive after the backward.
        kept: Bytes that stay from the forward until the backward, the output left out: that is the next layer's.
    """

    sizes: tuple[Polynomial, ...]
    forward: Events
    backward: Events
    source: int
    result: int
    incoming: int
    outgoing: int
    lasting: tuple[int, ...]
    kept: Polynomial

    @lru_cache(maxsize=64)  # noqa: B019  passes are cached too
    def forward_marks(self) -> tuple[Polynomial, ...]:
        """Return the marks of the forward, input included; of them those that can be the largest."""
        return uncovered(marks(self.forward, self.sizes, self.sizes[self.source]))

    @lru_cache(maxsize=64)  # noqa: B019  as above
    def backward_marks(self) -> tuple[Polynomial, ...]:
        """Return the marks of the backward, with what was kept and the output's gradient."""
        alive = self.kept.plus(self.sizes[self.incoming])
        # `kept` leaves the output out. Where it dies in this backward, it must be alive before.
        if ~self.result in self.backward:
            alive = alive.plus(self.sizes[self.result])
        return uncovered(marks(self.backward, self.sizes, alive))


@lru_cache(maxsize=64)
def layer_pass(shape: ModelShape, traits: LayerTraits, index: int, again: bool, wants_gradient: bool) -> LayerPass:
    """Run one layer, forward and backward.

    Args:
        shape: The model.
        traits: How a layer is computed.
        index: Which of `shape.groups`: one group for each kind of layer.
        again: Whether only the layer's input is kept, and the layer is computed again in the backward.
        wants_gradient: Whether the layer's input wants a gradient.
    """
    tape, source = Tape(records=not again), list[Tensor]()
    run = traits.modules(tape, shape, checkpointed=again)
    node = tape.node() if wants_gradient else None
    if node is not None:
        node.keeps = source
    x = tape.given(Polynomial(per_token=shape.stream), traits.arithmetic.residual, node)
    if again:
        tape.hold(x)
    result = decoder_layer(run, shape.groups[index].layer, x)
    tape.hold(result)
    forward = tape.take(result.node)
    kept = tape.alive.minus(result.bytes)
    output = x if again else result
    gradient = tape.given(output.elements, output.itemsize)
    if again:
        backward = _computed_again(run, shape.groups[index].layer, x, gradient)
    else:
        assert result.node is not None  # noqa: S101  adapters want gradients
        tape.release(result)
        before, after = run_backward(tape, result.node, gradient)
        backward = (*before, *after)
    outgoing = source[0].number if source else -1
    lasting = tuple(tensor.number for tensor in run.gradients)
    return LayerPass(
        tuple(tape.sizes), forward, backward, x.number, result.number, gradient.number, outgoing, lasting, kept
    )


@lru_cache(maxsize=64)
def first_adapted(shape: ModelShape, traits: LayerTraits) -> int:
    """Return the number of the first layer that has something to train; 0 where layers are alike, or none has."""
    trained = {}
    for number, kind in enumerate(shape.kinds if len(shape.groups) > 1 else ()):
        if kind not in trained:
            tape = Tape()
            x = tape.given(Polynomial(per_token=shape.hidden), traits.arithmetic.residual)
            tape.hold(x)
            out = decoder_layer(traits.modules(tape, shape), shape.groups[kind].layer, x)
            trained[kind] = out.node is not None
        if trained[kind]:
            return number
    return 0


@lru_cache(maxsize=64)
def recomputed_marks(shape: ModelShape, traits: LayerTraits, index: int) -> tuple[Polynomial, ...]:
    """Return the marks of a checkpointed layer's backward where its input wants no gradient."""
    tape = Tape()
    x = tape.given(Polynomial(per_token=shape.stream), traits.arithmetic.residual)
    tape.hold(x)
    gradient = tape.given(x.elements, x.itemsize)
    events = _computed_again(traits.modules(tape, shape, checkpointed=True), shape.groups[index].layer, x, gradient)
    return uncovered(marks(events, tape.sizes, x.bytes.plus(gradient.bytes)))


def _computed_again(run: Modules, layer: Layer, x: Tensor, gradient: Tensor) -> Events:
    """Return the births and deaths of a checkpointed layer's backward, in which its forward runs a second time."""
    tape, whole = run.tape, run.traits.recomputes_whole
    tape.records = True
    tape.hold(gradient)
    out = decoder_layer(run, layer, x)
    assert out.node is not None  # noqa: S101  adapters, or the input, want gradients
    if whole:
        tape.hold(out)
    again, late = tape.take(out.node), range(tape.saved_until, len(tape.sizes))
    if not whole:
        tape.release(gradient)
    backward = run_backward(tape, out.node, gradient)
    run.end()
    if not whole:
        return recomputed(again, (backward[0], (*backward[1], *tape.take())), late)
    tape.release(out)
    tape.release(gradient)
    return (*again, *backward[0], *backward[1], *tape.take())


def decoder_layer(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return the layer's output `[batch, seq, hidden]`; its input lives until then."""
    wired = {"parallel": _parallel, "single": _alone}.get(layer.wiring, _sequential)
    out = _streamed(run, layer, x) if layer.streams > 1 else wired(run, layer, x)
    run.tape.named(x)
    return out


def _alone(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return the output of a layer with one block, which is attention, another mixer or an MLP."""
    normed = run.norm(layer, op.cast(x, run.traits.arithmetic.compute) if layer.wide_residual else x)
    block, weights = (_mix if layer.mixer or layer.out else _fed_forward_alone)(run, layer, normed)
    out = op.add(x, block)
    run.tape.named(normed, block, weights)
    return out


def _fed_forward_alone(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, None]:
    return _fed_forward(run, layer, x), None


def _mix(run: Modules, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return what mixes tokens in a layer: attention, another mixer, or the sum of both."""
    if layer.mixer is None and layer.out is None:
        return _beside(run, layer, x), None
    if layer.mixer is None:
        return attention(run, layer, x)
    by_state = mixed(run, layer.mixer, x)
    if layer.out is None:
        return by_state, None
    scaled = op.scale(by_state) if layer.mixer.scales else by_state
    run.tape.named(by_state)
    attended, weights = attention(run, layer, op.scale(x) if layer.mixer.scales else x)
    both = op.add(scaled, op.scale(attended) if layer.mixer.scales else attended)
    run.tape.named(x, scaled, attended)
    return both, weights


def _streamed(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Follow Gemma3nTextDecoderLayer.forward, whose input is several residual streams."""
    tape = run.tape
    predictions = gemma.predicted(run, layer, x)
    active = op.slice_last(predictions, 1 / layer.streams)
    normed = run.norm(layer, active)
    beside = gemma.laurel(run, layer, normed)
    raw, weights = attention(run, layer, normed)
    attended = run.norm(layer, raw)
    tape.named(raw)
    gated = op.add(active, attended)
    both = op.scale(op.add(gated, beside))
    into = run.norm(layer, both)
    fed = dense(run, layer, into)
    back = run.norm(layer, fed)
    activated = op.add(both, back)
    out = gemma.corrected(run, layer, predictions, activated)
    # Every one of them has a name of its own until the layer returns.
    tape.named(normed, beside, attended, gated, into, both, fed, back, activated, predictions, active, weights)
    return out


def _beside(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return x plus the outputs of the linear maps whose part in the layer is not known, taken one by one."""
    for linear in layer.beside:
        made = run.linear(linear, op.gather(x, linear.inputs / run.shape.hidden))
        x = op.add(x, op.gather(made, run.shape.hidden / linear.outputs))
    return x


def _sequential(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Return the output of a layer whose MLP follows its attention, with norms where the family has them."""
    residual = x
    if layer.wiring != "post":
        x = run.norm(layer, x)
    x, weights = _mix(run, layer, x)
    if layer.wiring in ("post", "sandwich"):
        x = run.norm(layer, x)
    residual = _added(run, layer, residual, x)
    x = run.norm(layer, residual) if layer.wiring != "post" else residual
    feeds_both = layer.experts and layer.value_norm
    x = _fed_by_both(run, layer, residual, x) if feeds_both else _fed_forward(run, layer, x)
    if layer.wiring in ("post", "sandwich"):
        x = run.norm(layer, x)
    x = _added(run, layer, residual, x)
    if layer.per_layer:
        x = op.add(x, gemma.own_input(run, layer, x))
    run.tape.named(weights)  # transformers keeps the attention weights under the name `_` until the layer returns
    return x


def _fed_by_both(run: Modules, layer: Layer, residual: Tensor, normed: Tensor) -> Tensor:
    """Return the sum of a dense MLP and of experts, each between norms of its own (Gemma4TextDecoderLayer)."""
    of_all = run.norm(layer, dense(run, layer, normed))
    of_chosen = run.norm(layer, routed(run, layer, run.norm(layer, residual)))
    return op.add(of_all, of_chosen)


def _parallel(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    """Attention and MLP side by side on one normed input, or on two."""
    normed = run.norm(layer, x)
    attended, weights = attention(run, layer, normed)
    if layer.input_norms == 2:
        first, normed = normed, run.norm(layer, x)
        run.tape.named(first)
    attended = _dropped(run, layer, attended)
    both = op.add(_dropped(run, layer, _fed_forward(run, layer, normed)), attended)
    out = op.add(both, x)
    run.tape.named(normed, attended, weights)
    return out


def _added(run: Modules, layer: Layer, residual: Tensor, x: Tensor) -> Tensor:
    """Return `residual + x`, with what some families do to x first."""
    scaled = _dropped(run, layer, x)
    if layer.scaled_residual:
        scaled = op.scale(scaled)
    out = op.add(residual, scaled)
    run.tape.named(x)
    return out


def _dropped(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    return run.dropout(x) if layer.residual_dropout else x


def _fed_forward(run: Modules, layer: Layer, x: Tensor) -> Tensor:
    out = feed_forward(run, layer, x) if layer.mlp or layer.experts else x
    if layer.beside and layer.out is not None and layer.streams == 1:
        out = _beside(run, layer, out)
    run.tape.named(x)
    return out
