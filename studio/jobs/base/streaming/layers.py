"""Packs the frozen weights of decoder layers into main memory, and lends them to each layer while it is computed.

Adapters, norms, biases and the head stay where they are. A weight that is not lent is an `Absent`, which raises when it
is computed with. Whatever a layer saves of a lent weight for the backward pass is remembered by its place, and read
from the buffer that the layer has then.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from studio.core.placement.streaming import BUFFERS
from studio.core.vram.frozen import ALIGNMENT
from studio.jobs.base.model_class import decoder_layers
from studio.jobs.base.streaming.four_bit import parameter_of, plain, show_products, tensors_of, with_tensors
from studio.jobs.base.streaming.ring import FreshCopies, Lender, Queues, Ring, Way
from studio.jobs.base.weights.streamed import Absent

NewBytes = Callable[[int], Tensor]
"""Makes a tensor of so many bytes."""


def ordinary_bytes(size: int) -> Tensor:
    """Return a tensor of so many bytes in ordinary main memory."""
    return torch.empty(size, dtype=torch.uint8)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies in its layer's bytes."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size

    @property
    def end(self) -> int:
        return self.offset + self.shape.numel() * self.dtype.itemsize

    def inside(self, buffer: Tensor) -> Tensor:
        """Return the tensor as a view of a buffer."""
        return buffer[self.offset : self.end].view(self.dtype).view(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Weight:
    """A frozen weight of a layer.

    Attributes:
        module: What has it.
        name: Its name there.
        kind: The class of the parameter.
        said: Its attributes, without tensors.
        state: How it is quantised, without tensors; None where it is not.
        places: Its tensors: the weight, and in 4 bits what `tensors_of` yields.
        absent: Stands in for it.
    """

    module: nn.Module
    name: str
    kind: type
    said: dict[str, Any]
    state: Any
    places: tuple[_Place, ...]
    absent: Any

    def inside(self, buffer: Tensor) -> nn.Parameter:
        """Return the parameter whose tensors are views of a buffer."""
        held, *more = (place.inside(buffer) for place in self.places)
        state = None if self.state is None else with_tensors(self.state, iter(more))
        return parameter_of(self.kind, self.said, held, state)


@dataclass(frozen=True, slots=True)
class _Saved:
    """What is kept of a tensor inside a lent buffer until the backward pass."""

    layer: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class StreamedLayers:
    """The streamed layers of a model.

    Attributes:
        count: How many they are.
        host_bytes: What waits in main memory.
        buffer_bytes: Size of each buffer on the card.
        lender: Where the layers' weights are had from.
    """

    def __init__(
        self,
        model: nn.Module,
        numbers: Sequence[int],
        queues: Queues,
        *,
        new_host: NewBytes = ordinary_bytes,
        new_buffer: NewBytes = ordinary_bytes,
    ) -> None:
        """Pack the weights of layers into main memory and hook the layers.

        Args:
            model: A loaded base, with an adapter or without.
            numbers: Which of its layers, from 0, in order.
            queues: Where copies and computation go.
            new_host: Makes the memory in which a layer's weights wait.
            new_buffer: Makes a buffer on the card.
        """
        every = decoder_layers(model.get_base_model() if isinstance(model, PeftModel) else model)
        kept = _shared(model) | _of_adapters(model)
        self._sources: list[Tensor] = []
        self._weights: list[tuple[_Weight, ...]] = []
        self._views: dict[tuple[int, int], list[nn.Parameter]] = {}
        self._lent: int | None = None
        for place, number in enumerate(numbers):
            _, layer = every[number]
            show_products(layer)
            source, weights = _packed(layer, kept, new_host)
            self._sources.append(source)
            self._weights.append(weights)
            self._hook(layer, place)
        self.count = len(numbers)
        self.host_bytes = sum(source.numel() for source in self._sources)
        self.buffer_bytes = max(source.numel() for source in self._sources)
        self._new_buffer = lambda: new_buffer(self.buffer_bytes)
        self._ring = Ring(self._sources, self._new_buffer, min(BUFFERS, len(numbers)), queues)
        self.lender: Lender = self._ring

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers on the card."""
        return self._ring.buffers

    @contextmanager
    def fresh_buffers(self) -> Iterator[None]:
        """Lend every layer, inside the context, in a new buffer that nothing else ever uses."""
        self._switch()
        self._ring.end()
        self.lender = FreshCopies(self._sources, self._new_buffer)
        try:
            yield
        finally:
            self._switch()
            self._ring.begin()
            self.lender = self._ring

    def _switch(self) -> None:
        self._take_back()
        self._views.clear()

    def _lend(self, number: int, way: Way) -> None:
        self._take_back()
        buffer = self.lender.take(number, way)
        views = self._views.get((number, id(buffer)))
        if views is None:
            views = [weight.inside(buffer) for weight in self._weights[number]]
            if self.lender is self._ring:  # whose buffers stay, so that the views serve again
                self._views[number, id(buffer)] = views
        for weight, view in zip(self._weights[number], views, strict=True):
            weight.module._parameters[weight.name] = view
        self._lent = number

    def _give_back(self, number: int, way: Way) -> None:
        if self._lent == number:
            self._take_back()
            self.lender.give_back(way)

    def _take_back(self) -> None:
        if self._lent is not None:
            for weight in self._weights[self._lent]:
                weight.module._parameters[weight.name] = weight.absent
            self._lent = None

    def _hook(self, layer: nn.Module, number: int) -> None:
        open_hooks: list[saved_tensors_hooks] = []

        def before(module: Any, args: Any, named: Any) -> None:
            self._lend(number, "forward" if torch.is_grad_enabled() else "alone")
            if not torch.is_grad_enabled():
                return
            given = _first_floating((*args, *named.values()))
            if given is not None and given.requires_grad:
                # Its gradient is complete when everything in the layer that computes with weights has gone backward.
                given.register_hook(lambda _: self._give_back(number, "backward"))  # type: ignore[no-untyped-call]
            open_hooks.append(saved_tensors_hooks(lambda tensor: self._pack(number, tensor), self._unpack))
            open_hooks[-1].__enter__()

        def after(module: Any, args: Any, named: Any, result: Any) -> None:
            while open_hooks:
                open_hooks.pop().__exit__()
            made = _first_floating(result if isinstance(result, tuple) else (result,))
            if made is not None and made.requires_grad:
                made.register_hook(lambda _: self._lend(number, "backward"))  # type: ignore[no-untyped-call]
            self._give_back(number, "forward" if torch.is_grad_enabled() else "alone")

        layer.register_forward_pre_hook(before, with_kwargs=True)
        layer.register_forward_hook(after, with_kwargs=True, always_call=True)

    def _pack(self, number: int, tensor: Tensor) -> Any:
        buffer: Tensor = self.lender.buffer_of(number)
        if tensor.untyped_storage() is not buffer.untyped_storage():
            return tensor
        return _Saved(number, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, kept: Any) -> Tensor:
        if not isinstance(kept, _Saved):
            return cast(Tensor, kept)
        buffer: Tensor = self.lender.buffer_of(kept.layer)
        return buffer.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)


def is_matrix(parameter: nn.Parameter) -> bool:
    """Return whether a frozen weight of a streamed layer waits in main memory: a matrix, or a stack of them."""
    return parameter.dim() >= 2


def _packed(layer: nn.Module, kept: set[int], new_host: NewBytes) -> tuple[Tensor, tuple[_Weight, ...]]:
    """Move a layer's weights into one piece of memory; return it, and where they are in it."""
    found: list[tuple[_Weight, list[Tensor]]] = []
    size = 0
    for module in layer.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not is_matrix(parameter) or parameter.requires_grad or id(parameter) in kept:
                continue
            state = getattr(parameter, "quant_state", None)
            tensors = [plain(parameter), *(() if state is None else tensors_of(state))]
            places = []
            for tensor in tensors:
                places.append(_Place(size, tensor.dtype, tensor.shape))
                size = -(-places[-1].end // ALIGNMENT) * ALIGNMENT
            said = {key: value for key, value in vars(parameter).items() if key != "quant_state"}
            form = None if state is None else with_tensors(state, iter([None] * len(tensors)))
            absent: Any = Absent.of(parameter)
            if form is not None and len(form.shape) == 3:
                # A stack of experts is asked for its shape at any time. A linear map's state would be asked for its
                # tensors when an adapter is saved.
                absent.quant_state = form
            found.append((_Weight(module, name, type(parameter), said, form, tuple(places), absent), tensors))
    whole = new_host(size)
    for weight, tensors in found:
        for place, tensor in zip(weight.places, tensors, strict=True):
            place.inside(whole).copy_(tensor)
        weight.module._parameters[weight.name] = weight.absent
        if hasattr(weight.module, "quant_state"):  # bitsandbytes keeps it twice
            weight.module.quant_state = None  # type: ignore[assignment]
    return whole, tuple(weight for weight, _ in found)


def _shared(model: nn.Module) -> set[int]:
    """Return the identities of the weights that several modules have."""
    seen, shared = set[int](), set[int]()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _of_adapters(model: nn.Module) -> set[int]:
    """Return the identities of what peft has added, which a chat has frozen, too."""
    added = (
        getattr(module, name)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
        for name in module.adapter_layer_names
        if hasattr(module, name)
    )
    return {id(parameter) for part in added if isinstance(part, nn.Module) for parameter in part.parameters()}


def _first_floating(values: Sequence[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
