"""AdamW in the forms a recipe can ask for."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from studio.core.recipe import Optimizer

_WITHOUT_PAGES = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    kind: Optimizer,
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
    warn: Callable[[str], None],
) -> torch.optim.Optimizer:
    """Return an AdamW over the trainable parameters.

    Paging moves optimizer state between card and host through CUDA's unified memory, so it means nothing on a CPU: the
    same optimizer without pages is taken there and `warn` is told.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    name: str = kind
    if device.type != "cuda" and kind in _WITHOUT_PAGES:
        name = _WITHOUT_PAGES[kind]
        warn(
            f"{kind} pages its state between GPU and host; on a {device.type} there is nothing to page: {name} instead"
        )
    if name == "adamw_torch":
        return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay, fused=device.type == "cuda")
    import bitsandbytes as bnb  # noqa: PLC0415  only where it is asked for

    classes: dict[str, Any] = {
        "adamw_8bit": bnb.optim.AdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return cast(torch.optim.Optimizer, classes[name](trainable, lr=learning_rate, weight_decay=weight_decay))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
