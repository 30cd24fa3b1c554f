"""Guards that stop a useless run: each turns a failure that nobody would notice into a `Failed` event."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from studio.core.errors import JobFailed

MOVED_BY_STEP = 3
"""After this many optimizer steps some adapter weight must differ (the check of peft's troubleshooting guide)."""

MOST_SKIPPED = 10
"""Overflowing fp16 steps in a row that end a run. The loss scaler skips such a step and halves its scale: ten halvings
take it from 2**16 to 64."""


def check_loss(loss: float, step: int, steadier: str = "") -> None:
    """Stop on a loss that is not a number or exactly 0.

    Args:
        loss: Of the step.
        step: Its number.
        steadier: Advice that names a number format of wider range; empty where there is none.

    Raises:
        JobFailed: `nonfinite_loss` or `zero_loss`.
    """
    if not math.isfinite(loss):
        raise JobFailed(
            "nonfinite_loss",
            f"the loss is {loss} at step {step}; every later step would be worthless",
            f"{_lower(steadier)}; look at the rows of this step in the data",
        )
    if loss == 0.0:
        raise JobFailed(
            "zero_loss",
            f"the loss is exactly 0 at step {step}: nothing is being learnt",
            "check with `lora-studio data check` that the rows have answers within train.seq_len",
        )


def check_labels(loss_tokens: int, step: int) -> None:
    """Stop on a step of which no token has a label.

    Args:
        loss_tokens: Labelled tokens of the step.
        step: Its number.

    Raises:
        JobFailed: `all_labels_masked`.
    """
    if loss_tokens == 0:
        raise JobFailed(
            "all_labels_masked",
            f"no token of step {step} has a label: the answers are empty or were cut off",
            "raise train.seq_len, or check the rows with `lora-studio data check`",
        )


def check_gradient(grad_norm: float, step: int, skipped: int, *, scaled: bool, steadier: str = "") -> None:
    """Stop on a gradient that is not finite; with an fp16 scaler only after `MOST_SKIPPED` such steps in a row.

    Args:
        grad_norm: Of the step.
        step: Its number.
        skipped: How many steps in a row it was not finite, this one included.
        scaled: Whether a loss scaler is at work, which skips the step and lowers its scale.
        steadier: As for `check_loss`.

    Raises:
        JobFailed: `nonfinite_gradient`.
    """
    if math.isfinite(grad_norm) or (scaled and skipped < MOST_SKIPPED):
        return
    times = f", the {skipped}th overflow in a row" if scaled else ""
    raise JobFailed(
        "nonfinite_gradient",
        f"the gradient norm is {grad_norm} at step {step}{times}",
        _lower(steadier),
    )


def _lower(steadier: str) -> str:
    return "lower the learning rate" + (f", or {steadier}" if steadier else "")


class MovementGuard:
    """Checks once, after the first steps, that training changes the adapter. Until then a copy waits on the host."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._before: list[Tensor] | None = [p.detach().to("cpu", copy=True) for p in self._parameters]
        self._steps = 0

    def after_step(self, step: int) -> None:
        """Count an optimizer step that was not skipped; at the third, compare the weights and drop the copy.

        Raises:
            JobFailed: `adapter_not_moving`.
        """
        if self._before is None:
            return
        self._steps += 1
        if self._steps < MOVED_BY_STEP:
            return
        pairs = zip(self._before, self._parameters, strict=True)
        moved = any(not torch.equal(before, now.detach().cpu()) for before, now in pairs)
        self._before = None
        if not moved:
            raise JobFailed(
                "adapter_not_moving",
                f"no adapter weight has changed in {self._steps} steps (up to step {step}): no gradient reaches them",
                "check adapter.targets, and that the chosen layers take part in the forward pass",
            )


def check_adapter(weights: dict[str, Tensor]) -> None:
    """Refuse an adapter that holds a non-finite number, or whose B matrices are all zero and which thus does nothing.

    Raises:
        JobFailed: `adapter_nonfinite` or `adapter_zero`.
    """
    broken = [name for name, weight in weights.items() if not torch.isfinite(weight).all()]
    if broken:
        raise JobFailed(
            "adapter_nonfinite",
            f"{len(broken)} of {len(weights)} adapter tensors hold NaN or infinity, the first is {broken[0]}",
            "resume from an earlier checkpoint with a lower learning rate",
        )
    second = [weight for name, weight in weights.items() if "lora_B" in name or "lora_embedding_B" in name]
    if second and not any(bool(weight.any()) for weight in second):
        raise JobFailed(
            "adapter_zero",
            "every B matrix of the adapter is zero: it would change nothing",
            "train for more steps, or check that gradients reach the adapter",
        )
