"""Decoder layers compiled by torch: fused element-wise work, and fewer activations kept where nothing is checkpointed.

One function is compiled for all layers of a class, for any batch size and length. Only the training step runs it.
Evaluation and generation run the layers as written, because an answer grows by a token each time and every new shape
could be compiled again. The seconds that compiling took are told, and the compiled step's loss is compared with the
plain one's before it is used.
"""

import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from studio.jobs.base.progress import PhaseTeller
from studio.jobs.train.fused_forms import unfuse_forms
from studio.jobs.train.head import TOLERANCE
from studio.jobs.train.randomness import draws
from studio.jobs.train.step_model import StepModel
from studio.runs.failure import leaves_no_other_way

BACKEND = "inductor"
"""torch's own code generator: C++ on a processor, which needs a compiler there, and Triton on a card."""

_RECOMPILES = 64
"""Variants that torch may compile of one function before it gives up: kinds of layers times ways to batch, and more."""

_PHASE = "compiling the layers"

Undo = Callable[[], None]


def compile_step(step_model: StepModel, batch: dict[str, Any], tell: PhaseTeller, device: torch.device) -> str:
    """Compile the layers on one batch, forward and backward, and keep them compiled if the loss stays the same.

    Args:
        step_model: The model as the loop calls it.
        batch: The first micro-batch of the run, which is its longest.
        tell: Told what is being done, and the seconds that it took.
        device: Where it runs.

    Returns:
        Why the layers run as written; empty where they run compiled.

    Raises:
        RuntimeError: The batch does not fit, or the card has failed.
    """
    tell(_PHASE)
    was_training = step_model.training
    step_model.train()
    undo: Undo = _nothing
    try:
        # Random state is restored afterwards, so that a compiled run draws the same dropout as a plain one.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            with torch.no_grad():
                plain = float(step_model(batch))
            undo = compile_layers(step_model.causal)
            began = time.perf_counter()
            loss = step_model(batch)
            loss.backward()
            compiled = float(loss.detach())
            seconds = time.perf_counter() - began
    except Exception as error:
        # Compilers fail in many ways, and every layer can run as it is written.
        if leaves_no_other_way(error):
            raise
        undo()
        return f"{type(error).__name__}: {error}"
    finally:
        step_model.zero_grad(set_to_none=True)
        step_model.train(was_training)
    dtype = next(step_model.causal.parameters()).dtype
    # With dropout the two losses differ anyway, so there is nothing to compare.
    if not draws(step_model.causal) and abs(compiled - plain) > TOLERANCE.get(dtype, 1e-4) * abs(plain):
        undo()
        return f"the compiled loss is {compiled:.6g}, the plain one {plain:.6g}"
    tell(_PHASE, 1.0, detail=f"ready after {seconds:.0f} s, once per run")
    return ""


def compile_layers(causal: nn.Module) -> Undo:
    """Set up a model's layers to be compiled when they first run in training.

    A checkpointed layer is compiled inside its checkpoint, which itself stays as it is.

    Returns:
        A function that lets the layers run as written again.

    Raises:
        ValueError: The model has no layers that are marked as transformers marks them.
    """
    import torch._dynamo as dynamo  # noqa: PLC0415  a second that only compiled runs pay

    dynamo.config.recompile_limit = _RECOMPILES
    forwards: dict[Any, Any] = {}
    undo: list[Undo] = [unfuse_forms(causal)]
    for layer in _layers(causal):
        # The class's own function, without decorators: all layers of the class then share one compiled function.
        written = inspect.unwrap(type(layer).forward)
        if written not in forwards:
            forwards[written] = torch.compile(written, backend=BACKEND, dynamic=True)
        undo.append(_replace(layer, forwards[written]))
    if len(undo) == 1:
        undo[0]()
        raise ValueError("this model's layers are not marked as transformers marks them")

    def undo_all() -> None:
        for back in undo:
            back()

    return undo_all


def _layers(causal: nn.Module) -> Iterator[Any]:
    return (module for module in causal.modules() if isinstance(module, GradientCheckpointingLayer))


def _replace(layer: Any, compiled: Callable[..., Any]) -> Undo:
    if layer.gradient_checkpointing:
        run = layer._gradient_checkpointing_func

        def checkpointed(function: partial[Any], *args: Any) -> Any:
            # transformers passes the layer's call with its keywords bound (modeling_layers.py __call__); only the
            # function inside is exchanged.
            return run(partial(compiled, layer, **function.keywords), *args)

        layer._gradient_checkpointing_func = checkpointed
        return lambda: setattr(layer, "_gradient_checkpointing_func", run)
    written = layer.forward

    def forward(*args: Any, **named: Any) -> Any:
        return compiled(layer, *args, **named) if layer.training else written(*args, **named)

    layer.forward = forward
    # The instance's attribute hides the class's method; without it the method is seen again.
    return lambda: delattr(layer, "forward")


def _nothing() -> None:
    pass
