"""MLPs of checkpointed layers in tiles of the sequence, so that nothing of length x intermediate ever stands whole.

An MLP works on each token by itself, so it can take a long row piece by piece. Only its input is kept. On the way back
each tile is computed once more and goes backward at once, and the adapter's gradients add up in fp32 from tile to tile.

In a checkpointed layer that costs nothing more than the checkpoint does. The input is saved by an operator of its own,
just before the MLP. Where the MLP is the last that saves anything, torch's checkpoint stops computing again there, and
does not run the MLP a second time for nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import Function, FunctionCtx

from studio.core.tiles import tile_tokens
from studio.jobs.base.model_class import decoder_layers, is_plain

_ADAPTER = "default"
_PLACES = ("mlp", "feed_forward", "mixer")
"""What transformers calls the MLP of a layer, in Nemotron-H that of a layer which has nothing else."""


def tile_mlps(causal: nn.Module) -> int:
    """Let the dense MLPs of checkpointed layers take long micro-batches in tiles.

    Args:
        causal: The model with its adapter attached.

    Returns:
        How many MLPs do so from now on where a micro-batch is long enough.
    """
    count = 0
    for _, layer in decoder_layers(causal):
        mlp = dense_mlp(layer)
        if mlp is not None:
            mlp.forward = _Tiles(layer, mlp, mlp.forward)
            count += 1
    return count


def dense_mlp(layer: nn.Module) -> nn.Module | None:
    """Return the module of a layer's dense MLP; None where it has none, or one that is more than products and a curve.

    Modules that are trained whole, and DoRA, whose norms are of the whole weight, leave an MLP as it is.
    """
    found = (getattr(layer, name, None) for name in _PLACES)
    mlp = next((module for module in found if isinstance(module, nn.Module)), None)
    if mlp is None:
        return None
    parts = list(mlp.children())
    products = [part for part in parts if isinstance(part, LoraLayer) or is_plain(part)]
    others = [part for part in parts if part not in products]
    # An activation may hold a few numbers (xIELU). What holds more is something else, such as a router or experts.
    if len(products) not in (2, 3) or any(p.numel() > 1 for part in others for p in part.parameters()):
        return None
    adapted = [part for part in products if isinstance(part, LoraLayer)]
    if any(part.use_dora.get(_ADAPTER) for part in adapted) or any(p.requires_grad for p in mlp.parameters(False)):
        return None
    frozen = [part.get_base_layer() if isinstance(part, LoraLayer) else part for part in products]
    return None if any(p.requires_grad for part in frozen for p in part.parameters()) else mlp


class _Tiles:
    """The forward of one MLP."""

    def __init__(self, layer: nn.Module, mlp: nn.Module, whole: Callable[..., Tensor]) -> None:
        self._layer, self._mlp, self.whole = layer, mlp, whole

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        """Return the MLP's output `[batch, seq, hidden]`; a module that is given more than x is no plain MLP."""
        x = given[0] if len(given) == 1 and not named else None
        tile = 0 if x is None else tile_tokens(x.shape[:-1].numel())
        if x is None or not tile or torch.compiler.is_compiling():
            return self.whole(*given, **named)
        if not torch.is_grad_enabled():
            return _in_tiles(self.whole, x, tile)
        if not (self._layer.training and getattr(self._layer, "gradient_checkpointing", False)):
            return self.whole(x)
        trained = [parameter for parameter in self._mlp.parameters() if parameter.requires_grad]
        kept = _Kept.apply(x) if x.requires_grad else x  # type: ignore[no-untyped-call]
        out: Tensor = _Tiled.apply(self, tile, kept.grad_fn, kept, *trained)  # type: ignore[no-untyped-call]
        return out

    def drops(self) -> bool:
        """Return whether a forward drops anything at random."""
        modules = self._mlp.modules()
        return any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in modules)


def _in_tiles(whole: Callable[[Tensor], Tensor], x: Tensor, tile: int) -> Tensor:
    rows = x.reshape(1, -1, x.shape[-1])
    out: Tensor | None = None
    for begin in range(0, rows.shape[1], tile):
        made = whole(rows[:, begin : begin + tile])
        if out is None:
            out = made.new_empty((*x.shape[:-1], made.shape[-1]))
        out.view(1, -1, made.shape[-1])[:, begin : begin + tile] = made
    assert out is not None  # noqa: S101  there are at least two tiles
    return out


class _Kept(Function):
    """Saves its input for the operator after it, which reads it from here."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _Tiled(Function):
    """An MLP in tiles. Trained weights are inputs only so that it goes backward: it adds to their gradients itself."""

    @staticmethod
    def forward(ctx: Any, tiles: "_Tiles", tile: int, keeper: Any, x: Tensor, *trained: Tensor) -> Tensor:
        ctx.whole, ctx.tile, ctx.keeper, ctx.trained = tiles.whole, tile, keeper, len(trained)
        ctx.surroundings = _Surroundings(x.device, drops=tiles.drops())
        if keeper is None:
            ctx.save_for_backward(x)
        return _in_tiles(ctx.surroundings.noting(tiles.whole), x, tile)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (x,) = ctx.saved_tensors if ctx.keeper is None else ctx.keeper.saved_tensors
        wanted = ctx.needs_input_grad[3]
        into = torch.empty_like(x, memory_format=torch.contiguous_format) if wanted else None
        rows, incoming = x.detach().reshape(1, -1, x.shape[-1]), gradient.reshape(1, -1, gradient.shape[-1])
        for number, begin in enumerate(range(0, rows.shape[1], ctx.tile)):
            part = slice(begin, begin + ctx.tile)
            piece = rows[:, part].requires_grad_(wanted)
            with torch.enable_grad(), ctx.surroundings.as_in_forward(number):
                made = ctx.whole(piece)
            torch.autograd.backward(made, incoming[:, part])
            del made
            if into is not None:
                into.view(1, -1, x.shape[-1])[:, part] = piece.grad
        return None, None, None, into, *[None] * ctx.trained


class _Surroundings:
    """Autocast and random state of a forward, so that its tiles are computed again as they were."""

    def __init__(self, device: torch.device, *, drops: bool) -> None:
        self._device, self._drops = device.type, drops
        self._autocast = {
            "dtype": torch.get_autocast_dtype(device.type),
            "enabled": torch.is_autocast_enabled(device.type),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }
        self._states: list[tuple[Tensor, Tensor | None]] = []

    def noting(self, whole: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Return an MLP's forward that notes the random state before each tile where something is dropped."""

        def noted(x: Tensor) -> Tensor:
            if self._drops:
                self._states.append((torch.get_rng_state(), self._of_card()))
            return whole(x)

        return noted

    @contextmanager
    def as_in_forward(self, number: int) -> Iterator[None]:
        """Compute tile `number` as in the forward."""
        with torch.autocast(self._device, **self._autocast):  # type: ignore[arg-type]
            if not self._states:
                yield
                return
            host, card = self._states[number]
            with torch.random.fork_rng(devices=[torch.cuda.current_device()] if card is not None else []):
                torch.set_rng_state(host)
                if card is not None:
                    torch.cuda.set_rng_state(card)
                yield

    def _of_card(self) -> Tensor | None:
        return torch.cuda.get_rng_state() if self._device == "cuda" else None
