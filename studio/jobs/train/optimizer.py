"""The AdamW optimizers that a recipe can ask for: torch's, and bitsandbytes' in 8 bits or paged."""

from collections.abc import Callable, Iterable
from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn

from studio.core.recipe import Optimizer, Recipe

_WITHOUT_PAGES = {"paged_adamw_8bit": "adamw_8bit", "paged_adamw_32bit": "adamw_torch"}

_RATIO = "learning_rate_ratio"
_SECOND = ("lora_B", "lora_embedding_B")
_WHOLE = ".modules_to_save."
"""In the names that peft gives to the parameters of modules that are trained whole."""
_MOMENTS = ("state1", "state2")
"""State that bitsandbytes allocates with `get_state_buffer` and so may page; its scales and tables stay on the card."""


class UnpagedAdamW8bit(bnb.optim.AdamW8bit):  # type: ignore[misc]
    """bitsandbytes' 8-bit AdamW, but without waiting for the card after every tensor.

    An adapter has hundreds of tensors. The library waits so that paged memory stays in order (optim/optimizer.py
    `step`). Without pages the kernels follow each other on one stream, as with torch's own optimizers, and the host can
    prepare the next one meanwhile.
    """

    initialized: bool

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step: the library's own `step` without its waits."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.update_step(group, parameter, group_index, index)
        return loss


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    kind: Optimizer,
    learning_rate: float,
    weight_decay: float,
    lora_plus_ratio: float = 1.0,
    whole_rate_ratio: float = 1.0,
    device: torch.device,
    warn: Callable[[str], None],
) -> torch.optim.Optimizer:
    """Return an AdamW over those of the named parameters that are trainable.

    With a LoRA+ ratio the B matrices are a group of their own, whose learning rate is the ratio times the others'
    (Hayou et al. 2024). So are modules that are trained whole, with their own ratio. `set_learning_rate` sees to it.

    Paging moves optimizer state between card and host through CUDA's unified memory. On a CPU there is nothing to page,
    so the same optimizer without pages is taken and `warn` is told.

    Args:
        parameters: A model's parameters with their names; frozen ones are passed over.
        kind: The recipe's word for the optimizer.
        learning_rate: Of the first step.
        weight_decay: AdamW's decoupled weight decay.
        lora_plus_ratio: The B matrices' learning rate over the others'; 1 for plain LoRA.
        whole_rate_ratio: The learning rate of modules that are trained whole over the A matrices'.
        device: Where the parameters are.
        warn: Told where another optimizer is taken than was asked for.
    """
    named = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    trainable = _groups(named, lora_plus_ratio, whole_rate_ratio)
    name: str = kind
    if device.type != "cuda" and kind in _WITHOUT_PAGES:
        name = _WITHOUT_PAGES[kind]
        warn(
            f"{kind} pages its state between GPU and host; on a {device.type} there is nothing to page: {name} instead"
        )
    if name == "adamw_torch":
        return torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=weight_decay, fused=device.type == "cuda")
    classes: dict[str, Any] = {
        "adamw_8bit": UnpagedAdamW8bit,
        "paged_adamw_8bit": bnb.optim.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.optim.PagedAdamW32bit,
    }
    return cast(torch.optim.Optimizer, classes[name](trainable, lr=learning_rate, weight_decay=weight_decay))


def optimizer_of(
    recipe: Recipe, model: nn.Module, device: torch.device, *, warn: Callable[[str], None]
) -> torch.optim.Optimizer:
    """Return the optimizer that a recipe asks for, over a model's trainable parameters; see `build_optimizer`."""
    return build_optimizer(
        model.named_parameters(),
        kind=recipe.train.optimizer,
        learning_rate=recipe.train.learning_rate,
        weight_decay=recipe.train.weight_decay,
        lora_plus_ratio=recipe.adapter.lora_plus_ratio,
        whole_rate_ratio=recipe.adapter.whole_rate_ratio,
        device=device,
        warn=warn,
    )


def restore_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Restore a saved state to where an uninterrupted run has it: paged tensors in unified memory, others on the card.

    bitsandbytes' own `load_state_dict` (optim/optimizer.py) puts everything on the card and pages nothing afterwards.
    Here paged tensors never lie on the card, not even for a moment: it may have no room for them.

    Args:
        optimizer: A new one, over the parameters that the state belongs to.
        saved: As `state_dict` returned it, tensors on the host.
    """
    if not getattr(optimizer, "is_paged", False):
        optimizer.load_state_dict(saved)
        return
    paged: Any = optimizer
    paged.load_state_dict(saved, move_to_device=False)
    for group in paged.param_groups:
        for parameter in group["params"]:
            state = paged.state.get(parameter, {})
            for name, value in state.items():
                if name in _MOMENTS:
                    # The library pages large ones only. It has waited for the card when it returns, so the host may
                    # write into unified memory.
                    state[name] = paged.get_state_buffer(parameter, dtype=value.dtype)
                    state[name].copy_(value)
                elif isinstance(value, Tensor):
                    state[name] = value.to(parameter.device)


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every parameter group, times the group's ratio where it has one."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATIO, 1.0)


def _groups(named: list[tuple[str, nn.Parameter]], second: float, whole: float) -> list[dict[str, Any]]:
    """Return the parameters by the ratio of their learning rate, those without one first."""
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        ratio = whole if _WHOLE in name else second if any(word in name for word in _SECOND) else 1.0
        groups.setdefault(ratio, []).append(parameter)
    made = [{"params": parameters} | ({_RATIO: ratio} if ratio != 1.0 else {}) for ratio, parameters in groups.items()]
    return [group for group in made if group["params"]]
