"""Room in the computer's memory, before a merge begins."""

import psutil
import torch

from studio.core.errors import BadInput
from studio.jobs.base.weights.streamed import most_lent
from studio.jobs.merge.steps import MergeSteps

_FP32_BYTES = 4
_LENT_BYTES = 6
"""A number of what is lent to the comparison of answers: read in 16 bit, computed with in fp32."""
_COPIES = 4
"""At once in fp32: the weight, the delta before and after scaling, and half as much again for 16-bit copies of both."""


def check_memory(steps: MergeSteps) -> None:
    """Make sure that the largest step, and what is lent at once to the comparison afterwards, have room.

    Raises:
        BadInput: It needs more than is free.
    """
    largest = max((_elements(steps, place) for place in range(len(steps.steps))), default=0)
    lent = most_lent(steps.skeleton.adapted, steps, "base_model.model.")
    needed = max(largest * _FP32_BYTES * _COPIES, lent * _LENT_BYTES)
    free = psutil.virtual_memory().available
    if needed > free:
        raise BadInput(
            f"the largest tensors to be merged need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: "
            "close other programs, or merge on a computer with more."
        )


def _elements(steps: MergeSteps, place: int) -> int:
    step = steps.steps[place]
    if step.copies is not None or step.row_sum is not None:
        return 0
    return sum(torch.Size(output.shape).numel() for output in step.outputs)
