"""What can be changed in a recipe so that it needs less memory: gentlest kinds first, smallest changes first in each.

A change is gentler the less it costs: first come those that cost nothing, then time, then quality, then data. Knows no
bytes and no card; `studio.core.fit` searches among these changes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from studio.core.placement.streaming import BUFFERS
from studio.core.recipe import Recipe, number_of
from studio.core.shape import ModelShape
from studio.core.value_kinds import ALL_LINEAR

_SHORTEST_WORTHWHILE = 256
"""Tokens below which rows are not shortened further: most instruction rows would be cut."""

_LEAST_RANK = 8
"""The smallest rank that is proposed."""

_SAME, _NEARLY = "same result", "nearly the same result"
AS_FAST = (1.0, 1.0)
"""The time of a change that a step of padded rows does not notice, whatever the card; packed rows
make smaller batches."""

_MOST_ACCUMULATION = int(number_of("train.accumulation").high)


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a recipe.

    Attributes:
        settings: The fields it changes, with their new values.
        words: What is changed, for a user.
        price: What it costs besides memory and time, in a few words.
        why: The same in a sentence.
        time: Lowest and highest factor on the time of a step, for where it cannot be computed; `AS_FAST` holds always.
    """

    settings: tuple[tuple[str, Any], ...]
    words: str
    price: str
    why: str
    time: tuple[float, float]


Kind = Callable[[Recipe, ModelShape], Iterable[Change]]


def applied(recipe: Recipe, changes: Iterable[Change]) -> Recipe:
    """Return the recipe with the changes made."""
    for change in changes:
        for path, value in change.settings:
            recipe = recipe.with_(path, value)
    return recipe


def _chunked_loss(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.train.loss == "full":
        settings = (("train.loss", "chunked"),)
        yield Change(settings, "loss in chunks", _SAME, "the same result: whole logits never exist", (0.95, 1.05))


def _fused_attention(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    if recipe.train.attention == "eager" and shape.fused_attention:
        settings = (("train.attention", "sdpa"),)
        yield Change(settings, "fused attention", _SAME, "the same result without S x S matrices", (0.5, 1.0))


def fewer_rows_at_once(recipe: Recipe, _shape: ModelShape | None) -> Iterator[Change]:
    """Yield smaller micro-batches with as much more accumulation: a step sees the same rows."""
    rows, steps = recipe.train.micro_batch, recipe.train.accumulation
    for fewer in range(rows - 1, 0, -1):
        more, rest = divmod(rows * steps, fewer)
        if rest == 0 and more <= _MOST_ACCUMULATION:
            settings = (("train.micro_batch", fewer), ("train.accumulation", more))
            words = f"micro-batch {rows} -> {fewer}, accumulation {steps} -> {more}"
            yield Change(settings, words, "same rows a step", "a step sees the same rows", (1.0, 1.3))


def recomputing(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    """Yield a quarter of the layers computed once more, then a half, three quarters and all."""
    now = recipe.train.recompute
    if now in ("all", "auto"):
        return
    now = 0 if isinstance(now, str) else now
    for quarter in (1, 2, 3, 4):
        layers = shape.layers * quarter // 4
        if now < layers:
            value = "all" if quarter == 4 else layers
            words = "all layers computed again" if quarter == 4 else f"{layers} of {shape.layers} layers computed again"
            most = 1 + quarter / 8
            why = "the same result: layers are computed once more instead of keeping their activations"
            yield Change((("train.recompute", value),), words, _SAME, why, (1 + 0.6 * (most - 1), most))


def _small_states(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if "8bit" not in recipe.train.optimizer:
        settings = (("train.optimizer", "paged_adamw_8bit"),)
        yield Change(settings, "8-bit optimizer", _NEARLY, "its state in 8 bits: nearly the same result", (1.0, 1.1))


def _half_weights(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.model.dtype == "fp32":
        yield Change(
            (("model.dtype", "auto"),), "16-bit weights", _NEARLY, "products in 16 bit, as is usual", (0.4, 1.0)
        )


def offloading(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    """Yield that the inputs of layers which are computed again wait in main memory."""
    if recipe.train.recompute != "none" and not recipe.train.offload_checkpoints:
        settings = (("train.offload_checkpoints", True),)
        why = "the same result: layer inputs wait in main memory"
        yield Change(settings, "checkpoints in main memory", _SAME, why, (1.0, 1.3))


def _double_quant(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.method == "qlora" and not recipe.model.double_quant:
        settings = (("model.double_quant", True),)
        yield Change(settings, "double quantisation on", _NEARLY, "no loss that was ever measured", (1.0, 1.05))


def _four_bits(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    if recipe.method == "lora":
        settings = (("method", "qlora"), ("model.double_quant", True))
        why = "4-bit weights: the base loses a little, models below 4 B more"
        yield Change(settings, "QLoRA 4-bit", "the base loses a little", why, (1.05, 2.0))


def _narrower(recipe: Recipe, _shape: ModelShape) -> Iterator[Change]:
    rank = recipe.adapter.rank
    while rank > _LEAST_RANK:
        rank = max(_LEAST_RANK, rank // 2)
        words = f"rank {recipe.adapter.rank} -> {rank}"
        yield Change(
            (("adapter.rank", rank),), words, "it can learn less", "a narrower adapter: it can learn less", (0.97, 1.0)
        )


def _no_empty_length(recipe: Recipe, _shape: ModelShape, longest_tokens: int) -> Iterator[Change]:
    """Yield the shortest length at which no row is cut: estimates take rows as full, so that the rest is counted."""
    length = recipe.train.seq_len
    for stop in number_of("train.seq_len").stops:
        if longest_tokens <= stop < length:
            words = f"length {length} -> {int(stop)}"
            price = f"nothing lost: your longest row has {longest_tokens} tokens"
            why = f"no row is cut: the longest has {longest_tokens} tokens"
            yield Change((("train.seq_len", int(stop)),), words, price, why, AS_FAST)
            return


def _shorter_rows(recipe: Recipe, _shape: ModelShape, longest_tokens: int | None = None) -> Iterator[Change]:
    """Yield lengths at which rows are cut; where the longest row is known, none at which none is."""
    length = recipe.train.seq_len
    for stop in reversed(number_of("train.seq_len").stops):
        if _SHORTEST_WORTHWHILE <= stop < min(length, longest_tokens or length):
            words = f"length {length} -> {int(stop)}"
            yield Change(
                (("train.seq_len", int(stop)),),
                words,
                "longer rows are cut",
                "longer rows are cut: their ends are not learnt",
                (stop / length * 0.8, 1.0),
            )


def _fewer_targets(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    if recipe.adapter.targets == ALL_LINEAR:
        attention = [group.layer.qkv for group in shape.groups if group.layer.qkv]
        if not attention:
            return
        projections = attention[0]
        names = tuple(dict.fromkeys((projections[0].name, projections[-1].name)))
        words = f"adapters on {' and '.join(names)} alone"
        yield Change(
            (("adapter.targets", names),),
            words,
            "it can learn less",
            "adapters on attention alone learn less",
            (0.7, 0.9),
        )


def streaming(recipe: Recipe, shape: ModelShape) -> Iterator[Change]:
    """Yield a quarter of the layers in main memory, then a half, three quarters and all."""
    if recipe.model.stream == "auto" or recipe.train.compile:
        return
    now = 0 if recipe.model.stream == "off" else recipe.model.stream
    for quarter in (1, 2, 3, 4):
        layers = shape.layers * quarter // 4
        if layers > max(BUFFERS, now):
            words = f"{layers} of {shape.layers} layers streamed from main memory"
            why = "the same result: layers wait in main memory and are copied ahead; no card has run it yet"
            yield Change((("model.stream", layers),), words, "same result, no card has run it yet", why, (1.0, 4.0))


_KINDS: tuple[Kind, ...] = (
    _chunked_loss,
    _fused_attention,
    fewer_rows_at_once,
    recomputing,
    _small_states,
    _half_weights,
    offloading,
    _double_quant,
    _four_bits,
    _narrower,
    _shorter_rows,
    _fewer_targets,
)


def kinds(longest_tokens: int | None = None, *, streams: bool = False) -> tuple[Kind, ...]:
    """Return the kinds of change, gentlest first.

    Args:
        longest_tokens: Tokens of the longest row of the data, where it is known.
        streams: Whether layers may be streamed. That comes last until a card has run it.
    """
    last: tuple[Kind, ...] = (streaming,) if streams else ()
    if longest_tokens is None:
        return (*_KINDS, *last)
    no_empty: Kind = partial(_no_empty_length, longest_tokens=longest_tokens)
    shorter: Kind = partial(_shorter_rows, longest_tokens=longest_tokens)
    return no_empty, *(shorter if kind is _shorter_rows else kind for kind in _KINDS), *last
