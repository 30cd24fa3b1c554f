"""A symbolic autograd: which tensors of a training step are alive at the same time, without tensors.

PyTorch frees a tensor when its last reference goes: a Python local, a node of the backward graph that saved it, or a
gradient on its way. Here a `Tensor` is only a size, and it is freed in the same way, by Python's own reference counts,
so that a layer's forward written with these tensors in the order of the real module holds and lets go of the same
bytes. The backward pass runs the nodes as PyTorch's engine does: latest first, saved tensors released after each node,
gradients added up in place where nobody else holds them (torch/csrc/autograd/engine.cpp, input_buffer.cpp).

Knows nothing of models or of devices. Relies on CPython's immediate reference counting.
"""

import heapq
import sys
from dataclasses import dataclass, field

from studio.core.vram.polynomial import NOTHING, Polynomial

_ONLY_HERE = 2
"""`sys.getrefcount` of a tensor that one list holds: that list and the call's own argument."""


class Tape:
    """Counts the bytes alive and remembers every high-water mark.

    Attributes:
        records: Whether a backward graph is made. A checkpointed forward keeps none: its saved tensors are dropped at
            once.
        live: Bytes alive now.
        marks_at_last_saving: How many marks there were when an operator last saved something for its backward.
    """

    def __init__(self, *, records: bool = True) -> None:
        self.records = records
        self.live: Polynomial = NOTHING
        self.marks_at_last_saving = 0
        self._marks: list[Polynomial] = []
        self._rising = False
        self._sequence = 0

    @property
    def marks(self) -> list[Polynomial]:
        """What was alive at each high-water mark, that is before something died, and now."""
        if self._rising:
            self._rising = False
            self._marks.append(self.live)
        return self._marks

    def born(self, size: Polynomial) -> None:
        """Count bytes that came alive."""
        self.live = self.live.plus(size)
        self._rising = True

    def died(self, size: Polynomial) -> None:
        """Uncount bytes whose last reference went."""
        if self._rising:
            self._rising = False
            self._marks.append(self.live)
        self.live = self.live.minus(size)

    def passing(self, *sizes: Polynomial) -> None:
        """Count tensors that an operator makes one after another and lets go of before it returns."""
        made = [Tensor(self, size, 1) for size in sizes]
        del made

    def reads_saved(self) -> None:
        """Note that the backward comes to what the forward saved: a checkpointed layer is computed again now."""

    def saving(self) -> None:
        """Note that an operator saves tensors: inputs before it runs, so that its own output is not there yet."""
        self.marks_at_last_saving = len(self.marks)

    def start_marks(self) -> None:
        """Forget all marks; what is alive now is the first of the next."""
        self._marks, self._rising = [self.live], False

    def next_sequence(self) -> int:
        """Return the number of the next node: the engine runs the highest first."""
        self._sequence += 1
        return self._sequence


class Tensor:
    """A size with a lifetime.

    Attributes:
        elements: How many elements.
        itemsize: Bytes of one element.
        node: What made it in the backward graph; None where no gradient is wanted.
        base: The tensor that this one is a view of: it keeps that one alive and has no bytes of its own.
        bytes: Its size in bytes.
        tape: Where it is counted.
    """

    __slots__ = ("base", "bytes", "elements", "itemsize", "node", "tape")

    def __init__(
        self,
        tape: Tape,
        elements: Polynomial,
        itemsize: float,
        node: "Node | None" = None,
        base: "Tensor | None" = None,
    ) -> None:
        self.tape = tape
        self.elements = elements
        self.itemsize = itemsize
        self.node = node
        self.base = base
        self.bytes = elements.times(itemsize)
        if base is None:
            tape.born(self.bytes)

    def __del__(self) -> None:
        if self.base is None:
            self.tape.died(self.bytes)


@dataclass(eq=False, slots=True)
class Node:
    """One operator of the backward graph.

    Attributes:
        sequence: Order of creation.
        edges: Where the gradients of the inputs go; None for an input without a gradient.
        gradients: Per edge the elements and bytes per element of the new gradient; None passes the incoming one on, a
            number says which saved tensor the kernel writes it into.
        saved: Tensors kept alive until this node has run.
        works: Bytes of the tensors that its backward makes beside its gradients and lets go of when those exist.
        works_last: Whether it makes them after the gradients.
        apart: Whether the gradients of several outputs wait side by side (split) and are not added up.
        unpacks: Whether its backward reads anything that the forward saved, be it only a number.
        trained: Elements of a trained fp32 weight whose gradient this node makes, and who keeps that gradient.
        keeps: Who keeps the gradient that arrives here, where the node is a trained weight itself.
    """

    sequence: int
    edges: "tuple[Node | None, ...]"
    gradients: tuple[tuple[Polynomial, float] | int | None, ...]
    saved: list[Tensor] = field(default_factory=list)
    works: tuple[Polynomial, ...] = ()
    works_last: bool = False
    apart: bool = False
    unpacks: bool = False
    trained: "tuple[Polynomial, list[Tensor]] | None" = None
    keeps: list[Tensor] | None = None


def run_backward(tape: Tape, node: Node, gradient: list[Tensor]) -> Polynomial:
    """Run the graph below `node`, marking what is alive on the way; every saved tensor of the graph is released.

    Args:
        tape: Where bytes are counted.
        node: What made the output.
        gradient: The output's gradient in a list, which is emptied so that nobody else holds it.

    Returns:
        Bytes of gradients made before the first node that reads something saved: a checkpointed layer is recomputed on
        top of them.
    """
    start, before_reading = tape.live, None
    waiting = {node: [gradient.pop()]}
    order = [(-node.sequence, node)]
    needed = _uses(node)
    while order:
        current = heapq.heappop(order)[1]
        if current.unpacks and before_reading is None:
            before_reading = tape.live.minus(start)
            tape.reads_saved()
        made = _apply(tape, current, waiting.pop(current))
        current.saved.clear()
        while made:
            edge, outgoing = made.pop(0)
            _deliver(tape, waiting, edge, outgoing)
            del outgoing
            needed[edge] -= 1
            if needed[edge] == 0:
                heapq.heappush(order, (-edge.sequence, edge))
    return before_reading or NOTHING


def _uses(root: Node) -> dict[Node, int]:
    """Count how many gradients each node waits for (the engine's dependency count)."""
    counts: dict[Node, int] = {}
    stack, seen = [root], {root}
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            counts[edge] = counts.get(edge, 0) + 1
            if edge not in seen:
                seen.add(edge)
                stack.append(edge)
    return counts


def _apply(tape: Tape, node: Node, incoming: list[Tensor]) -> list[tuple[Node, Tensor]]:
    """Make the gradients of a node's inputs; what came in lives until all of them exist."""
    works = [] if node.works_last else [Tensor(tape, size, 1) for size in node.works]
    if node.trained is not None:
        elements, kept = node.trained
        kept.append(Tensor(tape, elements, 4))
    if node.keeps is not None:
        node.keeps.append(incoming[0])
    made = [
        (edge, incoming[0] if size is None else node.saved[size] if isinstance(size, int) else Tensor(tape, *size))
        for edge, size in zip(node.edges, node.gradients, strict=True)
        if edge is not None
    ]
    if node.works_last:
        tape.passing(*node.works)
    del works
    return made


def _deliver(tape: Tape, waiting: dict[Node, list[Tensor]], edge: Node, outgoing: Tensor) -> None:
    held = waiting.setdefault(edge, [])
    if not held or edge.apart:
        held.append(outgoing)
    elif sys.getrefcount(held[0]) > _ONLY_HERE:
        # Somebody else still needs the tensor that waits here: the engine adds out of place.
        held[0] = Tensor(tape, held[0].elements, held[0].itemsize)
