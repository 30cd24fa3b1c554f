"""What a step allocates and frees, in order: the symbolic forward and backward written down event by event.

The tape's high-water marks say how much is alive; which segments the allocator takes depends on the order as well.
"""

from dataclasses import dataclass
from functools import lru_cache

from studio.core.shape import Layer, ModelShape
from studio.core.vram.decoder_layer import decoder_layer
from studio.core.vram.head import LossForm, head_forward
from studio.core.vram.modules import LayerForm, Run, held_apart
from studio.core.vram.polynomial import NOTHING, Polynomial
from studio.core.vram.tape import Node, Tape, Tensor, run_backward

Events = tuple[int, ...]
"""`n` is the birth of tensor n, `~n` its death."""


class Recorder(Tape):
    """Writes every birth and death down.

    Attributes:
        events: All of them so far.
        sizes: Bytes of each tensor, by its number.
        saved_until: How many events there were when an operator last saved something for its backward.
        read_from: How many there were when the backward first read something saved.
    """

    def __init__(self, *, records: bool = True) -> None:
        super().__init__(records=records)
        self.events: list[int] = []
        self.sizes: list[Polynomial] = []
        self.saved_until = self.read_from = 0
        self._numbers: dict[int, int] = {}

    def born(self, size: Polynomial) -> None:
        """Write down a birth. Each tensor has a size object of its own, by which its death is known."""
        self._numbers[id(size)] = len(self.sizes)
        self.events.append(len(self.sizes))
        self.sizes.append(size)

    def died(self, size: Polynomial) -> None:
        """Write down a death."""
        self.events.append(~self._numbers.pop(id(size)))

    def saving(self) -> None:
        """Note that an operator saves tensors."""
        self.saved_until = len(self.events)

    def reads_saved(self) -> None:
        """Note that the backward comes to what the forward saved."""
        self.read_from = len(self.events)

    def number_of(self, tensor: Tensor) -> int:
        """Return the number of the tensor that holds a tensor's bytes."""
        while tensor.base is not None:
            tensor = tensor.base
        return self._numbers[id(tensor.bytes)]

    def take(self) -> list[int]:
        """Return the events since the last call."""
        taken, self.events = self.events, []
        return taken


@dataclass(frozen=True, slots=True)
class Script:
    """The events of a layer, or of head and loss.

    Attributes:
        sizes: Bytes of each tensor, by its number.
        forward: Events on the way forward.
        backward: Events on the way back.
        source: The input, which is there already.
        result: What the forward gives: a layer's output; -1 for none.
        incoming: The gradient of the result; -1 for none.
        outgoing: The gradient of the source; -1 where it wants none.
        lasting: Adapter gradients, and logits that the loop holds: alive after the backward.
    """

    sizes: tuple[Polynomial, ...]
    forward: Events
    backward: Events
    source: int
    result: int
    incoming: int
    outgoing: int
    lasting: tuple[int, ...]


@lru_cache(maxsize=64)
def layer_script(
    shape: ModelShape, form: LayerForm, index: int, grad_checkpointing: bool, wants_gradient: bool
) -> Script:
    """Return the events of one layer.

    Args:
        shape: The model.
        form: How a layer is computed.
        index: Which kind of layer.
        grad_checkpointing: Whether it is computed again in the backward.
        wants_gradient: Whether its input wants a gradient.
    """
    write = _recomputed if grad_checkpointing else _kept_whole
    tape = Recorder()
    return write(Run(tape, shape, form), tape, shape.groups[index].layer, _source(tape, shape, form, wants_gradient))


@lru_cache(maxsize=64)
def head_script(shape: ModelShape, form: LayerForm, loss: LossForm, seq_len: int) -> Script:
    """Return the events of the final norm, the head and the loss.

    Args:
        shape: The model.
        form: How its layers are computed.
        loss: How the loss is made.
        seq_len: Tokens per row, of which a loss may drop the last.
    """
    tape = Recorder()
    x = [_source(tape, shape, form, wants_gradient=True)]
    tape.take()
    value, outputs, kept = head_forward(Run(tape, shape, form), loss, x, shifted=1 - 1 / seq_len)
    forward, lasting = tape.take(), () if outputs is None else (tape.number_of(outputs),)
    backward, outgoing = _backward(tape, value, [Tensor(tape, NOTHING, 4)], wants_gradient=True)
    del kept
    backward += tape.take()
    return Script(tuple(tape.sizes), tuple(forward), tuple(backward), 0, -1, -1, outgoing, lasting)


def _source(tape: Recorder, shape: ModelShape, form: LayerForm, wants_gradient: bool) -> Tensor:
    node = Node(tape.next_sequence(), (), ()) if wants_gradient else None
    return Tensor(tape, Polynomial(per_token=shape.hidden), form.arithmetic.residual, node)


def _recomputed(run: Run, tape: Recorder, layer: Layer, x: Tensor) -> Script:
    """Write down a forward that keeps nothing, and a backward that computes the layer again first."""
    tape.take()
    tape.records, run.held = False, held_apart(run.form)
    result = decoder_layer(run, layer, x)
    forward, source, given = tape.take(), tape.number_of(x), tape.number_of(result)
    tape.records = True
    gradient = [Tensor(tape, x.elements, x.itemsize)]
    incoming = tape.number_of(gradient[0])
    tape.take()
    out = decoder_layer(run, layer, x)
    again = tape.take()
    # torch.utils.checkpoint stops as soon as everything is saved again (early_stop); its older kind computes the whole
    # layer before anything goes backward, and holds output and gradient until the layer is done.
    late = {event for event in again[tape.saved_until :] if event >= 0} if not run.form.reentrant else set[int]()
    held = [out, *gradient] if run.form.reentrant else []
    backward, outgoing = _backward(tape, out, gradient, wants_gradient=x.node is not None)
    start = 0 if run.form.reentrant else tape.read_from
    del out, held
    if run.held is not None:
        run.held.clear()
    events = [*backward[:start], *again, *backward[start:], *tape.take()]
    kept = tuple(event for event in events if (event if event >= 0 else ~event) not in late)
    lasting = tuple(map(tape.number_of, run.gradients))
    return Script(tuple(tape.sizes), tuple(forward), kept, source, given, incoming, outgoing, lasting)


def _kept_whole(run: Run, tape: Recorder, layer: Layer, x: Tensor) -> Script:
    """Write down a forward whose saved tensors stay until the backward."""
    tape.take()
    source, wants_gradient = tape.number_of(x), x.node is not None
    out = decoder_layer(run, layer, x)
    del x
    forward, result = tape.take(), tape.number_of(out)
    gradient = [Tensor(tape, out.elements, out.itemsize)]
    incoming = tape.number_of(gradient[0])
    backward, outgoing = _backward(tape, out, gradient, wants_gradient=wants_gradient)
    # The result is the next layer's source, which lets go of it.
    events = tuple(event for event in backward if event != ~result)
    lasting = tuple(map(tape.number_of, run.gradients))
    return Script(tuple(tape.sizes), tuple(forward), events, source, result, incoming, outgoing, lasting)


def _backward(tape: Recorder, out: Tensor, gradient: list[Tensor], *, wants_gradient: bool) -> tuple[list[int], int]:
    """Return the events of a backward and the number of the source's gradient, which is left alive."""
    tape.take()
    node, out.node = out.node, None
    assert node is not None  # noqa: S101  adapters, or the input, want gradients
    del out
    run_backward(tape, node, gradient)
    events = tape.take()
    # The source's own node comes last, and with it the gradient that came in dies.
    return events, ~events.pop() if wants_gradient else -1
