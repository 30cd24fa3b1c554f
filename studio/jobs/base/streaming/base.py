"""A base whose decoder layers are streamed: what is loaded where, what passes through buffers, what is looked up.

The frozen matrices of the streamed layers wait in main memory, and so does an input embedding that is neither trained
nor shared with the head: only the rows of a batch's tokens are copied. Everything else is on the card.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import core_model_loading, modeling_utils

from studio.core.errors import BadInput
from studio.core.placement.streaming import streamed_layers
from studio.jobs.base.model_class import decoder_layers
from studio.jobs.base.streaming.four_bit import on_device
from studio.jobs.base.streaming.host import locked_memory
from studio.jobs.base.streaming.layers import NewBytes, StreamedLayers, is_matrix, ordinary_bytes
from studio.jobs.base.streaming.ring import CardQueues, HostQueues
from studio.jobs.base.swapped import swapped
from studio.jobs.base.weights.streamed import Absent

Waits = Callable[[str, nn.Parameter], bool]
"""Whether a parameter, by its name in the base, waits in main memory."""


def waiting_in(causal: nn.Module, count: int) -> Waits:
    """Return which parameters of a model wait in main memory.

    Args:
        causal: The base without an adapter, or its structure without weights.
        count: How many decoder layers are streamed, at most.
    """
    layers = decoder_layers(causal)
    places = tuple(f"{layers[number][0]}." for number in streamed_layers(count, len(layers)))
    looked_up = _looked_up(causal)
    embedding = next((f"{name}.weight" for name, module in causal.named_modules() if module is looked_up), "")
    return lambda name, parameter: name == embedding or (name.startswith(places) and is_matrix(parameter))


def waiting_bytes(causal: nn.Module, waiting: Waits, itemsize: float, embedding_itemsize: int) -> float:
    """Return about how many bytes will wait in main memory.

    Args:
        causal: The base, or its structure without weights.
        waiting: Which parameters wait.
        itemsize: Bytes of a weight in a layer.
        embedding_itemsize: Bytes of a weight of an embedding.
    """
    embedding = cast(Any, causal).get_input_embeddings().weight
    found = (parameter for name, parameter in causal.named_parameters() if waiting(name, parameter))
    return sum(one.numel() * (embedding_itemsize if one is embedding else itemsize) for one in found)


@contextmanager
def loading_behind(waiting: Waits) -> Iterator[None]:
    """Let what transformers loads onto a card inside the context go on to main memory, where it waits there."""
    usual = core_model_loading.set_param_for_module

    def set_param(model: Any, target_name: str, *more: Any) -> None:
        usual(model, target_name, *more)
        path, _, leaf = target_name.rpartition(".")
        module: nn.Module = model.get_submodule(path)
        parameter = module._parameters.get(leaf)
        if parameter is not None and waiting(target_name, parameter):
            module._parameters[leaf] = on_device(parameter, torch.device("cpu"))
            if hasattr(module, "quant_state"):
                module.quant_state = None  # type: ignore[assignment]

    # transformers has no hook between two weights, and would take the memory of the whole model on the card at once.
    with (
        swapped(core_model_loading, "set_param_for_module", set_param),
        swapped(modeling_utils, "caching_allocator_warmup", lambda *given, **named: None),
    ):
        yield


def place_rest(causal: nn.Module, waiting: Waits, device: torch.device) -> None:
    """Move everything that does not wait to a device; what modules share they share afterwards, too."""
    moved: dict[int, nn.Parameter] = {}
    for path, module in causal.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and not waiting(f"{path}.{leaf}" if path else leaf, parameter):
                if id(parameter) not in moved:
                    moved[id(parameter)] = on_device(parameter, device)
                module._parameters[leaf] = moved[id(parameter)]
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


def stream(
    model: nn.Module,
    count: int,
    device: torch.device,
    *,
    new_host: NewBytes = ordinary_bytes,
    new_buffer: NewBytes | None = None,
) -> StreamedLayers:
    """Let the layers of a loaded base be streamed from now on.

    Args:
        model: The base, with an adapter or without.
        count: How many decoder layers, at most.
        device: Where they are computed.
        new_host: Makes the memory in which weights wait.
        new_buffer: Makes the buffers; None makes them on the device.

    Raises:
        BadInput: The model has no stack of decoder layers.
    """
    causal = model.get_base_model() if isinstance(model, PeftModel) else model
    numbers = streamed_layers(count, len(decoder_layers(causal)))
    if not numbers:
        raise BadInput(f"{type(causal).__name__} is no stack of decoder layers: set model.stream off.")
    if (embedding := _looked_up(causal)) is not None:
        look_up(embedding, device)
    queues = CardQueues(device) if device.type == "cuda" else HostQueues()
    on_card = new_buffer or partial(torch.empty, dtype=torch.uint8, device=device)
    made = StreamedLayers(model, numbers, queues, new_host=new_host, new_buffer=on_card)
    for parameter in model.parameters():
        # An adapter, which peft puts where its base is; an embedding that is trained; what several layers share.
        if not isinstance(parameter, Absent) and parameter.device != device:
            parameter.data = parameter.data.to(device)
    return made


def stream_from_here(model: nn.Module, count: int, device: torch.device) -> tuple[StreamedLayers, str]:
    """Let the layers of a loaded base be streamed from this machine's memory.

    Args:
        model: The base, with an adapter or without.
        count: How many decoder layers, at most.
        device: Where they are computed.

    Returns:
        The layers, and what the user should know of where they wait; empty where all is page-locked.
    """
    if device.type != "cuda":
        why = f"on a {device.type} all weights are in main memory anyway: streaming only copies them"
        return stream(model, count, device), f"model.stream saves nothing: {why}"
    memory = locked_memory()
    return stream(model, count, device, new_host=memory.new), memory.said()


def look_up(embedding: nn.Embedding, device: torch.device) -> None:
    """Let an embedding keep its weight in main memory, and copy only the rows that are asked for."""
    table, written = embedding.weight.detach(), embedding.forward
    absent = Absent.of(embedding.weight, device)
    embedding.padding_idx = None  # says which row has no gradient; this one has none at all, and other row numbers

    def forward(ids: Tensor) -> Tensor:
        rows = table.index_select(0, ids.to("cpu").flatten()).to(device)
        embedding._parameters["weight"] = nn.Parameter(rows, requires_grad=False)
        try:
            return written(torch.arange(ids.numel(), device=device).view(ids.shape))
        finally:
            embedding._parameters["weight"] = absent

    embedding._parameters["weight"] = absent
    embedding.forward = forward  # type: ignore[method-assign,assignment]


def _looked_up(causal: nn.Module) -> nn.Embedding | None:
    """Return the input embedding if its weight can wait in main memory: frozen, and of no use to the head."""
    model = cast(Any, causal)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or getattr(head, "weight", None) is embedding.weight:
        return None  # peft's wrapper is no embedding: one with a pair beside it is trained
    return None if isinstance(embedding.weight, Absent) or embedding.weight.requires_grad else embedding
