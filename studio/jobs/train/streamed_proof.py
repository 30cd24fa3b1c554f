"""Proves a streamed base at the start of a run: one micro-batch with its buffers, and one with a buffer for every use.

Streaming is right if both give the same gradients to the adapter. If copies and computation got out of order, the loss
could look healthy all the same.
"""

import torch
from torch import nn

from studio.core.errors import JobFailed
from studio.jobs.base.streaming.layers import StreamedLayers
from studio.jobs.train.objectives import Batch

_NOISE = 4.0
"""How many times the difference of two equal passes is taken for noise, where a card adds up in no fixed order."""


def prove_streaming(step_model: nn.Module, streamed: StreamedLayers, batch: Batch, device: torch.device) -> None:
    """Compare the gradients of a micro-batch with those of copies that are waited for, into buffers of their own.

    Args:
        step_model: The model as the loop calls it.
        streamed: Its streamed layers.
        batch: The first micro-batch of the run, which is its longest.
        device: Where it is computed.

    Raises:
        JobFailed: They are not the same.
    """
    # The second one is wanted: it begins with buffers that another pass has left behind.
    _gradients(step_model, batch, device)
    got = _gradients(step_model, batch, device)
    with streamed.fresh_buffers():
        wanted = _gradients(step_model, batch, device)
        noise = 0.0 if _apart(got, wanted) == 0 else _apart(_gradients(step_model, batch, device), wanted)
    if not (apart := _apart(got, wanted)) <= _NOISE * noise:
        raise JobFailed(
            "streaming_wrong",
            f"with streamed layers the adapter's gradients differ by {apart:.2g} of their size from those with copies "
            "that are waited for: weights were overwritten while they were used, or used before they were there",
            "train with model.stream off, and report this with the output of lora-studio doctor --imports",
        )


def _gradients(step_model: nn.Module, batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    """Return the trained parameters' gradients on the host. Random state is afterwards as it was before."""
    was_training = step_model.training
    step_model.train()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            step_model(batch).backward()
        return {
            name: parameter.grad.to("cpu", copy=True)
            for name, parameter in step_model.named_parameters()
            if parameter.grad is not None
        }
    finally:
        step_model.zero_grad(set_to_none=True)
        step_model.train(was_training)


def _apart(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of a parameter's gradients over the largest of them; NaN counts as infinite."""
    if got.keys() != wanted.keys():
        return float("inf")
    furthest = 0.0
    for name, gradient in wanted.items():
        if not torch.equal(got[name], gradient):
            ratio = float((got[name] - gradient).abs().max() / gradient.abs().max().clamp_min(1e-30))
            furthest = max(furthest, ratio if ratio == ratio else float("inf"))  # noqa: PLR0124  NaN
    return furthest
