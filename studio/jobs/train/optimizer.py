"""AdamW in the forms a recipe can ask for."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn

from studio.core.recipe import Optimizer

_WITHOUT_PAGES = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}


_RATIO = "learning_rate_ratio"
_SECOND = ("lora_B", "lora_embedding_B")


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: Optimizer,
    learning_rate: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
    device: torch.device,
    warn: Callable[[str], None],
) -> torch.optim.Optimizer:
    """Return an AdamW over the trainable of the named parameters.

    With a LoRA+ ratio the B matrices are a group of their own, whose rate `set_learning_rate` multiplies by the ratio
    (Hayou et al. 2024).

    Paging moves optimizer state between card and host through CUDA's unified memory, so it means nothing on a CPU: the
    same optimizer without pages is taken there and `warn` is told.
    """
    trainable = _groups(
        [(name, parameter) for name, parameter in parameters if parameter.requires_grad], lora_plus_ratio
    )
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
    """Set the rate of every parameter group: the given one times the group's ratio, where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATIO, 1.0)


def _groups(named: list[tuple[str, nn.Parameter]], ratio: float) -> list[dict[str, Any]]:
    if ratio == 1.0:
        return [{"params": [parameter for _, parameter in named]}]
    second = [parameter for name, parameter in named if any(word in name for word in _SECOND)]
    others = [parameter for name, parameter in named if not any(word in name for word in _SECOND)]
    return [{"params": others}, {"params": second, _RATIO: ratio}]
