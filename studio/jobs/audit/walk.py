"""Walks several variants of a model through its blocks together: one block in memory, all hidden states kept."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from studio.core.errors import JobFailed
from studio.jobs.audit.blocks import (
    Call,
    Parts,
    Rounding,
    behind_the_blocks,
    filled,
    first_of,
    noted_calls,
    renumbered,
    settled,
)
from studio.jobs.audit.forms import UNROUNDED, Form
from studio.jobs.audit.scores import Head, TokenScores, score
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.weights.units import Read

TOKENS_AT_ONCE = 512
"""Most padded tokens of a batch: few enough for small activations, and enough to be worth casting a weight for."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows, padded on the right. No mask is needed: in a decoder no token sees the padding after it.

    Attributes:
        rows: Their indices among all rows.
        ids: Token ids `[rows, seq]`.
        real: Which tokens are not padding, `[rows, seq]`.
        wanted: Which tokens are followed by one with a label, `[rows, seq]`.
    """

    rows: tuple[int, ...]
    ids: Tensor
    real: Tensor
    wanted: Tensor

    @property
    def tokens_of_rows(self) -> tuple[int, ...]:
        """How many wanted tokens each row has."""
        return tuple(int(count) for count in self.wanted.sum(-1))


def batches_of(examples: Sequence[Example], *, by_row: bool = False, most: int = TOKENS_AT_ONCE) -> list[Batch]:
    """Return the rows in batches of at most `most` padded tokens, longest rows first; with `by_row` one row in each."""
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    made: list[list[int]] = []
    for place in order:
        longest = len(examples[made[-1][0]].input_ids) if made else 0
        if by_row or not made or longest * (len(made[-1]) + 1) > most:
            made.append([])
        made[-1].append(place)
    return [_batch(examples, places) for places in made]


def _batch(examples: Sequence[Example], places: Sequence[int]) -> Batch:
    width = max(len(examples[place].input_ids) for place in places)
    ids = torch.zeros(len(places), width, dtype=torch.long)
    labels = torch.full((len(places), width), IGNORED)
    real = torch.zeros(len(places), width, dtype=torch.bool)
    for row, place in enumerate(places):
        example = examples[place]
        size = len(example.input_ids)
        ids[row, :size] = torch.from_numpy(example.input_ids).long()
        labels[row, : size - 1] = torch.from_numpy(example.labels[1:]).long()
        real[row, :size] = True
    return Batch(tuple(places), ids, real, labels != IGNORED)


Picked = Callable[[Sequence[int]], Tensor]
"""Returns the rows `[tokens, hidden]` of an embedding for some tokens."""


@dataclass(frozen=True, slots=True)
class Variant:
    """A model to be measured: the weights of each parameter, and the form in which each linear layer holds them.

    Attributes:
        name: Its name in reports.
        read: Returns a parameter by its name.
        embed: Returns rows of its embedding.
        head: Its head.
        form_of: Returns the form of a linear layer by its name.
        by_row: Whether it must get one row at a time.
    """

    name: str
    read: Read
    embed: Picked
    head: Head
    form_of: Callable[[str], Form] = lambda name: UNROUNDED
    by_row: bool = False


@dataclass(slots=True)
class BlockSeen:
    """What quantisation did in one block.

    Attributes:
        name: The block's name.
        roundings: By variant, the rounding of each linear layer.
        drift: By variant, how far its hidden states are from the reference's after the block: root mean square over
            tokens of the relative difference.
        own: The same if the variant gets the reference's hidden states as input: the effect of this block alone.
    """

    name: str
    roundings: dict[str, dict[str, Rounding]] = field(default_factory=dict)
    drift: dict[str, float] = field(default_factory=dict)
    own: float | None = None


@dataclass(slots=True)
class Carried:
    """Where a walk stands.

    Attributes:
        hidden: By variant, the hidden states `[rows, seq, hidden]` of each batch.
        seen: The blocks that are done.
    """

    hidden: dict[str, list[Tensor]] = field(default_factory=dict)
    seen: list[BlockSeen] = field(default_factory=list)


class Walk:
    """A walk of some variants over some rows."""

    def __init__(
        self,
        parts: Parts,
        variants: Sequence[Variant],
        examples: Sequence[Example],
        *,
        device: torch.device,
        alone: str = "",
        carried: Carried | None = None,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            parts: The model.
            variants: The first one is the reference.
            examples: Rows with labels.
            device: Where blocks are run; hidden states stay in main memory.
            alone: The variant whose blocks are also run on the reference's hidden states, one at a time.
            carried: Where an interrupted walk stood; None to begin.
        """
        self.parts, self.variants, self.device, self.alone = parts, tuple(variants), device, alone
        self.carried = carried or Carried()
        self._examples = examples
        self._batches = {by_row: batches_of(examples, by_row=by_row) for by_row in {v.by_row for v in variants}}
        used = sorted({int(token) for example in examples for token in example.input_ids})
        self._used = used
        self._calls: dict[tuple[bool, int], list[Call]] = {}

    @property
    def reference(self) -> Variant:
        """The variant that the others are compared with."""
        return self.variants[0]

    @torch.no_grad()
    def run(self, tell: Callable[[float, str], None], stopping: Callable[[Carried], bool]) -> bool:
        """Take all variants through all blocks; return whether the end was reached.

        Args:
            tell: Told the fraction done and the block's name.
            stopping: Called after each block with what is needed to go on later; True ends the walk.

        Raises:
            JobFailed: A hidden state is not finite.
        """
        self._enter()
        blocks = self.parts.blocks
        for place in range(len(self.carried.seen), len(blocks)):
            tell(place / len(blocks), blocks[place][0])
            self.carried.seen.append(self._through(place))
            if place + 1 < len(blocks) and stopping(self.carried):
                return False
        return True

    @torch.no_grad()
    def finals(self) -> dict[str, Tensor]:
        """Return every variant's final hidden states `[tokens, hidden]` of tokens that a label follows, row by row."""
        made = {}
        for variant in self.variants:
            of_row: dict[int, Tensor] = {}
            with self._settled(variant):
                for index, batch in enumerate(self._batches[variant.by_row]):
                    whole = self._after(variant, index, batch)
                    states = whole[batch.wanted.to(whole.device)].cpu()
                    of_row |= dict(zip(batch.rows, torch.split(states, list(batch.tokens_of_rows)), strict=True))
            made[variant.name] = torch.cat([of_row[row] for row in range(len(self._examples))])
        return made

    def targets(self) -> Tensor:
        """Return the tokens that follow the final hidden states, `[tokens]`, row by row."""
        return torch.cat([_following(example) for example in self._examples])

    def scores(
        self, tell: Callable[[float], None] = lambda fraction: None, finals: dict[str, Tensor] | None = None
    ) -> dict[str, TokenScores]:
        """Return the figures of every variant, tokens row by row; `finals` are computed if they are not given."""
        finals = {name: states.to(self.device) for name, states in (finals or self.finals()).items()}
        heads = {variant.name: variant.head for variant in self.variants}
        targets = self.targets().to(self.device)
        return score(finals, targets, heads, self.parts.form, reference=self.reference.name, tell=tell)

    def _settled(self, variant: Variant) -> AbstractContextManager[None]:
        return settled(self.parts, variant.read, variant.embed(self._used), self.device)

    def _enter(self) -> None:
        """Record the arguments of every block, and begin the hidden states unless an interrupted walk has left some."""
        for variant in self.variants:
            begun = self.carried.hidden.setdefault(variant.name, [])
            fresh = not begun
            with self._settled(variant):
                for index, batch in enumerate(self._batches[variant.by_row]):
                    calls, hidden = noted_calls(self.parts, self._renumbered(batch))
                    self._calls[variant.by_row, index] = calls
                    if fresh:
                        begun.append(hidden.cpu())

    def _after(self, variant: Variant, index: int, batch: Batch) -> Tensor:
        """Return a batch's final hidden states `[rows, seq, hidden]`, after everything that follows the last block."""
        states = self.carried.hidden[variant.name][index].to(self.device)
        return behind_the_blocks(self.parts, self._renumbered(batch), states)

    def _renumbered(self, batch: Batch) -> Tensor:
        return renumbered(batch.ids, self._used).to(self.device)

    def _through(self, place: int) -> BlockSeen:
        name, block = self.parts.blocks[place]
        seen, own = BlockSeen(name), list[Tensor]()
        # The variant whose blocks are also run alone goes first: it needs the reference's states from before the block.
        ordered = sorted(self.variants, key=lambda variant: (variant.name != self.alone, variant is not self.reference))
        for variant in ordered:
            with filled(name, block, variant.read, variant.form_of, self.device) as roundings:
                if variant.name == self.alone:
                    own = self._carry(self.reference, block, place)
                self.carried.hidden[variant.name] = self._carry(variant, block, place)
            seen.roundings[variant.name] = roundings
            if variant is self.reference and own:
                seen.own = self._distance(own, self.carried.hidden[variant.name], batches=self._batches[False])
                own = []
        for variant in self.variants[1:]:
            seen.drift[variant.name] = self._drift(variant)
        return seen

    def _carry(self, variant: Variant, block: nn.Module, place: int) -> list[Tensor]:
        made = []
        for index, hidden in enumerate(self.carried.hidden[variant.name]):
            args, kwargs = self._calls[variant.by_row, index][place]
            out = first_of(block(hidden.to(self.device), *args, **kwargs)).cpu()
            if not bool(torch.isfinite(out).all()):
                raise JobFailed(
                    "nonfinite_hidden",
                    f"{variant.name}: the hidden states after {self.parts.blocks[place][0]} hold NaN or infinity",
                    "look at the model's weights; an adapter may be broken",
                )
            made.append(out)
        return made

    def _drift(self, variant: Variant) -> float:
        """Return how far a variant's hidden states are from the reference's; their batches may differ."""
        of_row = dict(self._rows(self.reference))
        total, tokens = 0.0, 0
        for row, states in self._rows(variant):
            apart, count = _apart(states, of_row[row])
            total, tokens = total + apart, tokens + count
        return math.sqrt(total / tokens)

    def _rows(self, variant: Variant) -> Iterator[tuple[int, Tensor]]:
        """Yield index and hidden states `[seq, hidden]` of each row, without padding."""
        for batch, hidden in zip(self._batches[variant.by_row], self.carried.hidden[variant.name], strict=True):
            for row, states, real in zip(batch.rows, hidden, batch.real, strict=True):
                yield row, states[real]

    @staticmethod
    def _distance(found: Sequence[Tensor], wanted: Sequence[Tensor], batches: Sequence[Batch]) -> float:
        total, tokens = 0.0, 0
        for one, other, batch in zip(found, wanted, batches, strict=True):
            apart, count = _apart(one[batch.real], other[batch.real])
            total, tokens = total + apart, tokens + count
        return math.sqrt(total / tokens)


def _apart(found: Tensor, wanted: Tensor) -> tuple[float, int]:
    """Return the summed squared relative difference of hidden states `[tokens, hidden]`, and the number of tokens."""
    changed, whole = (found - wanted).square().sum(-1), wanted.square().sum(-1)
    return float((changed / whole.clamp(min=1e-30)).double().sum()), found.shape[0]


def _following(example: Example) -> Tensor:
    labels = torch.from_numpy(example.labels[1:]).long()
    return labels[labels != IGNORED]
