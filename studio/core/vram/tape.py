"""A symbolic autograd: which tensors of a training step are alive at the same time, without tensors.

A layer's forward is written with these tensors in the order of the real module, and a `Tape` records it. PyTorch frees
a tensor when its last reference goes: a Python name, a node of the backward graph that saved it, or a gradient on its
way. Here a tensor dies after its last use, once nobody holds it; where a name of the real code outlives the last use,
the forward says so (`Tape.named`). The backward pass runs the nodes as PyTorch's engine does: latest first, saved
tensors released after each node, gradients added up in place where nobody else holds them
(torch/csrc/autograd/engine.cpp, input_buffer.cpp).

What comes out is one list of births and deaths in order. High-water marks follow from it (`marks`), and so does what an
allocator would do with them. Knows nothing of models or of devices.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from studio.core.vram.polynomial import NOTHING, Polynomial, total

Events = tuple[int, ...]
"""Births and deaths in order: `n` is the birth of the tensor with number n, `~n` its death."""


class Tape:
    """Records what is born, what uses it last and who holds it.

    Attributes:
        records: Whether a backward graph is made. A checkpointed forward keeps none: its saved tensors are dropped at
            once.
        sizes: Bytes of each tensor, by its number: numbers count births.
        born: Tensors since the last call of `take`.
        waits: How many gradients each node below the root of that call waits for (the engine's dependency count).
        saved_until: How many tensors there were when an operator last saved something for its backward.
    """

    def __init__(self, *, records: bool = True) -> None:
        self.records = records
        self.sizes: list[Polynomial] = []
        self.saved_until = 0
        self.born: list[Tensor] = []
        self.waits: dict[Node, int] = {}
        self._alive: list[Tensor] = []
        self._nodes: list[Node] = []
        self._sequence = 0

    @property
    def alive(self) -> Polynomial:
        """Bytes alive after the last call of `take`."""
        return total(self.sizes[tensor.number] for tensor in self._alive)

    def given(self, elements: Polynomial, itemsize: float, node: "Node | None" = None) -> "Tensor":
        """Return a tensor that is there already: its birth is no event, its death is one."""
        tensor = Tensor(self, elements, itemsize, node)
        self._alive.append(self.born.pop())
        return tensor

    def named(self, *tensors: "Tensor | None") -> None:
        """Let tensors live until now: the real code still has a name for them, used or not."""
        now = len(self.sizes)
        for tensor in tensors:
            if tensor is not None:
                (tensor.base or tensor).last_use = now

    def hold(self, tensor: "Tensor") -> None:
        """Let a tensor live until it is released as often as it was held."""
        (tensor.base or tensor).holders += 1

    def release(self, *tensors: "Tensor") -> None:
        """End one hold of each; where it was the last, the tensor dies now."""
        now = len(self.sizes)
        for tensor in tensors:
            held = tensor.base or tensor
            held.holders -= 1
            held.last_use = now

    def is_shared(self, tensor: "Tensor") -> bool:
        """Whether more than one holds a tensor."""
        return (tensor.base or tensor).holders > 1

    def passing(self, *sizes: Polynomial) -> None:
        """Count tensors that an operator makes one after another and lets go of before it returns."""
        self.named(*[Tensor(self, size, 1) for size in sizes])

    def saving(self) -> None:
        """Note that an operator saves its inputs. It does so before it runs, so its own output is not born yet."""
        self.saved_until = len(self.sizes)

    def node(
        self,
        edges: "tuple[Node | None, ...]" = (),
        gradients: "tuple[tuple[Polynomial, float] | int | None, ...]" = (),
        saved: "tuple[Tensor, ...]" = (),
        works: tuple[Polynomial, ...] = (),
    ) -> "Node":
        """Return a new node of the backward graph, which holds what it saved."""
        self._sequence += 1
        made = Node(self._sequence, edges, gradients, list(saved), works, unpacks=bool(saved))
        self._nodes.append(made)
        if saved:
            self.saving()
            for tensor in saved:
                (tensor.base or tensor).holders += 1
        return made

    def saves(self, node: "Node", *tensors: "Tensor") -> None:
        """Let a node save more."""
        for tensor in tensors:
            node.saved.append(tensor)
            self.hold(tensor)

    def take(self, root: "Node | None" = None) -> Events:
        """Return births and deaths since the last call; what nobody holds is dead by now.

        Args:
            root: What the graph goes backward from: nodes that do not lead there are gone with their results.
        """
        if root is not None:
            self._drop_dead_ends(root)
        born, end = self.born, len(self.sizes)
        first = end - len(born)
        deaths: dict[int, list[int]] = {}
        alive: list[Tensor] = []
        for tensor in (*self._alive, *born):
            if tensor.holders:
                alive.append(tensor)
            elif tensor.last_use in deaths:
                deaths[tensor.last_use].append(~tensor.number)
            else:
                deaths[tensor.last_use] = [~tensor.number]
        # A tensor whose last use was before these events dies as they begin.
        events = [death for when in [when for when in deaths if when < first] for death in deaths.pop(when)]
        for number in range(first, end):
            if number in deaths:
                events += deaths[number]
            events.append(number)
        events += deaths.get(end, ())
        self.born, self._alive = [], alive
        return tuple(events)

    def _drop_dead_ends(self, root: "Node") -> None:
        """Release what nodes saved that the backward never reaches; it lives as long as their results did."""
        nodes, self._nodes = self._nodes, []
        self.waits = reached = _waits(root)
        if len(nodes) == len(reached) + 1:
            return
        until: dict[Node, int] = {}
        last_uses = {tensor.number: tensor.last_use for tensor in (*self._alive, *self.born)}
        for node in reversed(nodes):
            if node is root or node in reached:
                continue
            end = max(until.get(node, 0), last_uses.get(node.result, 0))
            for tensor in node.saved:
                held = tensor.base or tensor
                held.holders -= 1
                held.last_use = max(held.last_use, end)
            for before in (*node.edges, *(tensor.node for tensor in node.saved)):
                if before is not None:
                    until[before] = max(until.get(before, 0), end)


class Tensor:
    """A size with a lifetime.

    Attributes:
        tape: Where it is counted.
        elements: How many elements.
        itemsize: Bytes of one element.
        node: What made it in the backward graph; None where no gradient is wanted.
        base: The tensor that it is a view of: it keeps that one alive and has no bytes of its own.
        bytes: Its size in bytes.
        number: The number of the tensor whose bytes these are: for a view that of its base.
        last_use: How many tensors there were when it, or a view of it, was used last.
        holders: How many hold it, or a view of it.
    """

    __slots__ = ("base", "bytes", "elements", "holders", "itemsize", "last_use", "node", "number", "tape")
    number: int

    def __init__(
        self,
        tape: Tape,
        elements: Polynomial,
        itemsize: float,
        node: "Node | None" = None,
        base: "Tensor | None" = None,
    ) -> None:
        """Count a new tensor, or a view of one."""
        self.tape = tape
        self.elements = elements
        self.itemsize = itemsize
        self.node = node
        self.bytes = size = elements.times(itemsize)
        if base is None:
            # A tensor that is never used dies right after its birth. The code of `named` is repeated here for speed: a
            # new set-up makes half a thousand tensors.
            self.base: Tensor | None = None
            self.holders = 0
            self.number = len(tape.sizes)
            self.last_use = self.number + 1
            tape.sizes.append(size)
            tape.born.append(self)
        else:
            self.base = base.base or base
            self.number = base.number
        if node is not None:
            node.result = self.number


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
        turns: Bytes of more of them that it makes before the gradients, one set after another.
        turns_last: Whether it makes those after the gradients.
        apart: Whether the gradients of several outputs wait side by side (split) and are not added up.
        unpacks: Whether its backward reads anything that the forward saved, even if only a number.
        trained: Elements of the trained fp32 weights whose gradients this node makes, and who keeps those gradients.
        keeps: Who keeps the gradient that arrives here, where the node is an input or a trained weight itself.
        result: The number of what it made.
    """

    sequence: int
    edges: "tuple[Node | None, ...]"
    gradients: tuple[tuple[Polynomial, float] | int | None, ...]
    saved: list[Tensor] = field(default_factory=list)
    works: tuple[Polynomial, ...] = ()
    works_last: bool = False
    turns: tuple[tuple[Polynomial, ...], ...] = ()
    turns_last: bool = False
    apart: bool = False
    unpacks: bool = False
    trained: "tuple[tuple[Polynomial, ...], list[Tensor]] | None" = None
    keeps: list[Tensor] | None = None
    result: int = -1


def run_backward(tape: Tape, root: Node, gradient: Tensor) -> tuple[Events, Events]:
    """Run the graph below a node; every saved tensor of the graph is released.

    Args:
        tape: Where it was recorded, up to a call of `take` from the same root.
        root: What made the output.
        gradient: The output's gradient, which goes as soon as it is used unless somebody holds it.

    Returns:
        What happens before the first node that reads something saved, and from there on: a checkpointed layer is
        computed again between them.
    """
    before: Events | None = None
    tape.hold(gradient)
    waiting = {root: [gradient]}
    order = [(-root.sequence, root)]
    waits, tape.waits = tape.waits, {}
    while order:
        current = heapq.heappop(order)[1]
        if current.unpacks and before is None:
            before = tape.take()
        for edge, outgoing in _apply(tape, current, waiting.pop(current)):
            _deliver(tape, waiting, edge, outgoing)
            waits[edge] -= 1
            if waits[edge] == 0:
                heapq.heappush(order, (-edge.sequence, edge))
    after = tape.take()
    return (after, ()) if before is None else (before, after)


def _waits(root: Node) -> dict[Node, int]:
    """Count how many gradients each node below a root waits for."""
    counts: dict[Node, int] = {}
    stack = [root]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            if edge in counts:
                counts[edge] += 1
            else:
                counts[edge] = 1
                stack.append(edge)
    return counts


def _apply(tape: Tape, node: Node, incoming: list[Tensor]) -> list[tuple[Node, Tensor]]:
    """Make the gradients of a node's inputs; what came in and what was saved live until all of them exist."""
    works = [] if node.works_last else [Tensor(tape, size, 1) for size in node.works]
    for sizes in () if node.turns_last else node.turns:
        tape.passing(*sizes)
    if node.trained is not None:
        weights, kept = node.trained
        for elements in weights:
            kept.append(Tensor(tape, elements, 4))
            tape.hold(kept[-1])
    if node.keeps is not None:
        node.keeps.append(incoming[0])
        tape.hold(incoming[0])
    made = []
    for edge, size in zip(node.edges, node.gradients, strict=True):
        if edge is not None:
            if size is None:
                outgoing = incoming[0]
            else:
                outgoing = node.saved[size] if isinstance(size, int) else Tensor(tape, *size)
            (outgoing.base or outgoing).holders += 1
            made.append((edge, outgoing))
    if node.works_last:
        tape.passing(*node.works)
    for sizes in node.turns if node.turns_last else ():
        tape.passing(*sizes)
    if works:
        tape.named(*works)
    tape.release(*incoming, *node.saved)
    node.saved.clear()
    return made


def _deliver(tape: Tape, waiting: dict[Node, list[Tensor]], edge: Node, outgoing: Tensor) -> None:
    """Let a gradient wait for its node, or add it to the one that waits there already."""
    held = waiting.setdefault(edge, [])
    if not held or edge.apart:
        held.append(outgoing)
        return
    if tape.is_shared(held[0]):
        # Somebody else still holds the gradient that waits here, so the engine must not add into it.
        added = Tensor(tape, held[0].elements, held[0].itemsize)
        tape.hold(added)
        tape.release(held[0])
        held[0] = added
    tape.release(outgoing)


def recomputed(again: Events, backward: tuple[Events, Events], late: range) -> Events:
    """Return what happens where a checkpoint computes again on the way back.

    It does so when the backward first reads something saved, and stops as soon as everything is saved again
    (torch.utils.checkpoint, early_stop): what would be born later is not.

    Args:
        again: What computing again does, were it not stopped.
        backward: What the backward does before it reads something saved, and from there on.
        late: Numbers of the tensors that are born after something was saved last.
    """
    low, high = late.start, late.stop
    rest = [event for event in (*again, *backward[1]) if not low <= (event if event >= 0 else ~event) < high]
    return (*backward[0], *rest)


def alive_after(events: Events, sizes: Sequence[Polynomial], alive: Polynomial) -> Polynomial:
    """Return what is alive after births and deaths, from what is alive before."""
    for event in events:
        alive = alive.plus(sizes[event]) if event >= 0 else alive.minus(sizes[~event])
    return alive


def marks(events: Events, sizes: Sequence[Polynomial], alive: Polynomial = NOTHING) -> list[Polynomial]:
    """Return what is alive at each high-water mark, that is before something dies, and at the end.

    Args:
        events: Births and deaths in order.
        sizes: Bytes of each tensor, by its number.
        alive: What is alive before.
    """
    found, rising = [], True
    a, b, c, d, e = alive  # summed up by hand: there are a thousand events in a new set-up
    for event in events:
        if event >= 0:
            rising = True
            f, g, h, i, j = sizes[event]
            a, b, c, d, e = a + f, b + g, c + h, d + i, e + j
        else:
            if rising:
                found.append(Polynomial(a, b, c, d, e))
                rising = False
            f, g, h, i, j = sizes[~event]
            a, b, c, d, e = a - f, b - g, c - h, d - i, e - j
    if rising:
        found.append(Polynomial(a, b, c, d, e))
    return found
