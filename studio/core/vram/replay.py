"""Reserved bytes by replay: a model is loaded and trained for two steps in the allocator's bookkeeping.

Takes 20 to 27 ms for a model of 8 B parameters, half a microsecond a birth or death: for a plan, not for a slider. What
the rows of three public archives reserved stands beside it in the table of `python -m tests.bench.bench_estimate`.
"""

from functools import lru_cache
from typing import NamedTuple

from studio.core.shape import ModelShape
from studio.core.vram.activations import chunk_bytes, mask_count
from studio.core.vram.allocator import Block, CachingAllocator
from studio.core.vram.loading import load
from studio.core.vram.micro_batch import caches_copies, input_wants_gradient, layer_form, loss_form, micro_batch
from studio.core.vram.modules import Kernel
from studio.core.vram.script import Events, Script, head_script, layer_script
from studio.core.vram.setup import Setup
from studio.core.vram.static import resident_state

_STEPS = 2
"""The optimizer's state comes at the end of the first; later steps are like the second."""


class Peak(NamedTuple):
    """Highest bytes of live blocks and of segments."""

    allocated: int
    reserved: int


@lru_cache(maxsize=64)
def replayed(
    shape: ModelShape,
    setup: Setup,
    kernel: Kernel,
    *,
    workspace: int,
    capacity: int | None = None,
    readers: int = 1,
) -> Peak:
    """Return what training holds and what it takes from the driver at most.

    Args:
        shape: The model.
        setup: How it is trained; without modules trained whole, and with checkpoints on the device.
        kernel: Which attention runs.
        workspace: Bytes of the cuBLAS workspaces of both threads.
        capacity: Bytes that the driver can give; None for no end of them.
        readers: Threads that read ahead while weights are quantised.
    """
    allocator = CachingAllocator(capacity)
    trained = load(allocator, shape, setup, readers)
    training = _Training(allocator, shape, setup, kernel, trained=trained, workspace=workspace // 2)
    for _ in range(_STEPS):
        training.step()
    return Peak(allocator.most_allocated, allocator.most_reserved)


class _Part:
    """A script with its sizes in bytes."""

    def __init__(self, allocator: CachingAllocator, script: Script, sizes: list[int]) -> None:
        self.script = script
        self._allocator = allocator
        self._sizes = sizes

    def play(self, events: Events, blocks: dict[int, Block], spared: Block | None = None) -> None:
        """Let tensors be born and die; what is alive afterwards is in `blocks`, by number.

        Args:
            events: What happens.
            blocks: What is alive before.
            spared: What somebody else holds, whatever happens here.
        """
        allocate, release, sizes = self._allocator.allocate, self._allocator.release, self._sizes
        for event in events:
            if event < 0:
                if sizes[~event] and (block := blocks.pop(~event)) is not spared:
                    release(block)
            elif sizes[event]:
                blocks[event] = allocate(sizes[event])


class _Training:
    """Steps of one set-up, in the order in which the stock loop takes them."""

    def __init__(
        self,
        allocator: CachingAllocator,
        shape: ModelShape,
        setup: Setup,
        kernel: Kernel,
        *,
        trained: list[int],
        workspace: int,
    ) -> None:
        form = layer_form(shape, setup.kind, kernel)
        rank = max((setup.rank, *(rank for _, rank in setup.rank_pattern)))
        numbers = setup.tokens, setup.squares, rank
        self._allocator = allocator
        self._setup = setup
        self._trained = trained
        self._workspace = workspace
        self._input = setup.tokens * shape.hidden * setup.embedding_itemsize
        mask_itemsize = micro_batch(shape, setup.kind, kernel).mask_itemsize
        rotary, mask = setup.seq_len * shape.head_dim, setup.squares * mask_count(shape, setup, kernel)
        self._shared = [8 * setup.tokens] * 3 + [setup.residual_itemsize * rotary] * 2  # ids, labels, mask; cos, sin
        self._mask = [mask_itemsize * mask] if mask else []
        parts: dict[Script, _Part] = {}

        def part(script: Script) -> _Part:
            if script not in parts:
                parts[script] = _Part(allocator, script, [int(size.at(*numbers)) for size in script.sizes])
            return parts[script]

        kinds = [kind for kind, group in enumerate(shape.groups) for _ in range(group.count)]
        wants, checkpointing = input_wants_gradient(setup), setup.grad_checkpointing
        self._layers = [
            part(layer_script(shape, form, kind, checkpointing, wants or place > 0)) for place, kind in enumerate(kinds)
        ]
        self._head = part(head_script(shape, form, loss_form(setup.kind), setup.seq_len))
        self._chunk = chunk_bytes(shape, setup)
        self._begun: list[Block] = []
        self._state: list[Block] = []

    def step(self) -> None:
        """Take one optimizer step: gradients go when it is done, and what the loop holds with them."""
        gradients: list[Block] = []
        held: list[Block] = []
        for number in range(min(2, self._setup.accumulation)):
            self._release(held)
            held = [self._allocator.allocate(size) for size in self._shared]
            made, logits = self._micro_batch(adds=number > 0)
            held += logits
            gradients += made
        self._optimize()
        self._release(held)
        self._release(gradients)

    def _micro_batch(self, *, adds: bool) -> tuple[list[Block], list[Block]]:
        """Run forward and backward; return the gradients, and the logits where the loop holds them.

        Args:
            adds: Whether gradients are added in place to those that there are already.
        """
        allocate = self._allocator.allocate
        self._begin(1)
        copies = self._trained if caches_copies(self._setup) else []
        cached = [allocate(self._setup.compute_itemsize * elements) for elements in copies]
        x = embedded = allocate(self._input)
        mask, alive = [allocate(size) for size in self._mask], []
        for part in self._layers:
            blocks = {part.script.source: x}
            part.play(part.script.forward, blocks, spared=embedded)
            x = blocks.pop(part.script.result)
            alive.append(blocks)
        head, blocks = self._head, {self._head.script.source: x}
        events, source = head.script.forward, ~head.script.source
        normed = events.index(source) if source in events else 0
        head.play(events[:normed], blocks)
        if not self._setup.grad_checkpointing:
            # The model holds its input and the mask until its last norm is done; checkpoints hold both longer, and so
            # does a first layer without a norm in front (Olmo 2 and 3), whose adapters save the input itself.
            saved = alive[0].get(self._layers[0].script.source) is embedded
            self._release(mask if saved else [*mask, embedded])
            mask = []
        head.play(events[normed:], blocks)
        if self._chunk:
            self._release([allocate(self._chunk)])
        self._release(cached)
        self._begin(2)
        head.play(head.script.backward, blocks)
        gradient: Block | None = blocks.pop(head.script.outgoing)
        logits, gradients = list(blocks.values()), []
        for part, blocks in zip(reversed(self._layers), reversed(alive), strict=True):
            script = part.script
            assert gradient is not None  # noqa: S101  only the first layer's input may want none
            blocks[script.incoming] = gradient
            part.play(script.backward, blocks)
            gradient = blocks.pop(script.outgoing, None)
            if not adds:
                gradients += [blocks.pop(number) for number in script.lasting]
            self._release(list(blocks.values()))  # a checkpoint, and gradients that were added to others
        self._release([*mask, *([gradient] if gradient else [])])
        return gradients, logits

    def _begin(self, threads: int) -> None:
        """Let cuBLAS take the workspaces of as many threads, once."""
        while self._workspace and len(self._begun) < threads:
            self._begun.append(self._allocator.allocate(self._workspace))

    def _optimize(self) -> None:
        optimizer = self._setup.optimizer
        if not self._state:
            sizes = [size for elements in self._trained for size in resident_state(elements, optimizer)]
            self._state = [self._allocator.allocate(size) for size in sizes]
        if optimizer == "adamw_torch" and self._setup.engine == "hf":
            # Torch's foreach AdamW takes all square roots at once.
            self._release([self._allocator.allocate(4 * elements) for elements in self._trained])

    def _release(self, blocks: list[Block]) -> None:
        for block in blocks:
            self._allocator.release(block)
