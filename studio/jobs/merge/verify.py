"""Proves that the files on disk behave like base + adapter: tensors made again and compared, logits side by side."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.weights.streamed import folder_logits, streamed_logits
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge.steps import MergeSteps, Step

_SAMPLE = 4
_WORK = 8e10
"""Parameters times tokens of one pass: a few seconds on two cores."""
_FEWEST_TOKENS, _MOST_TOKENS = 48, 384
_ADVICE = "the disk or the memory may be faulty; look at the system's log, then merge again"


@dataclass(frozen=True, slots=True)
class Closeness:
    """Merged model against base + adapter on the same tokens: KL in nats, share of equal top tokens, logit gap."""

    tokens: int
    mean_kl: float
    largest_kl: float
    same_top_token: float
    largest_logit_difference: float


def recompute_sample(steps: MergeSteps, folder: Path, kept: Collection[str] = ()) -> int:
    """Make some tensors again and compare them bit by bit with the files; return how many.

    Args:
        steps: What was merged.
        folder: The merged model.
        kept: Shards that an earlier process wrote: each is looked into as well.

    Raises:
        JobFailed: A tensor in the files is missing, of another shape, or differs.
        OSError: A file cannot be read.
    """
    files = TensorFiles(folder)
    wanted = {output.key: output for step in steps.steps for output in step.outputs}
    if files.tensors.keys() != wanted.keys():
        raise JobFailed("merged_incomplete", "the merged files do not hold the tensors that were written", _ADVICE)
    for key, output in wanted.items():
        if files.tensors[key].entry.shape != output.shape:
            raise JobFailed("merged_incomplete", f"{plain(key, one_line=True)} has another shape on disk", _ADVICE)
    made = [step for step in steps.steps if step.copies is None]
    copied = [step for step in steps.steps if step.copies is not None]
    of_kept = [
        step
        for name in sorted(kept)
        for step in _some([step for step in steps.steps if files.tensors[step.outputs[0].key].path.name == name])
    ]
    count = 0
    for step in _some(made) + _some(copied) + of_kept:
        for key, tensor in _again(steps, step).items():
            count += 1
            if not torch.equal(files.read(key), tensor):
                raise JobFailed("merged_differs", f"{plain(key, one_line=True)} on disk is not what was made", _ADVICE)
    return count


def compare_logits(
    steps: MergeSteps, folder: Path, ids: Tensor, mask: Tensor, tell: Callable[[str], None]
) -> Closeness:
    """Run base + adapter and the merged files on the same tokens, layer by layer, in fp32.

    Args:
        steps: Base and adapter.
        folder: The merged model.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        tell: Gets a word on what is done.

    Raises:
        JobFailed: The merged files lack a parameter of the model, or a logit is not finite.
        OSError: A file cannot be read.
    """
    tell("base and adapter")
    separate = streamed_logits(steps.skeleton.adapted, steps.parameter, ids, mask, "base_model.model.")
    tell("merged")
    merged = folder_logits(folder, ids, mask)
    real = mask.bool()
    closeness = compare(merged[real], separate[real])
    if not all(bool(torch.isfinite(logits[real]).all()) for logits in (merged, separate)):
        raise JobFailed(
            "merged_nonfinite", "the merged model's logits hold NaN or infinity", "look at the adapter's last losses"
        )
    return closeness


def compare(merged: Tensor, separate: Tensor) -> Closeness:
    """Return how close logits `[tokens, vocabulary]` are to those that are meant."""
    ours, theirs = log_softmax(merged, -1), log_softmax(separate, -1)
    kl = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1)
    return Closeness(
        tokens=merged.shape[0],
        mean_kl=max(0.0, float(kl.mean())),
        largest_kl=max(0.0, float(kl.max())),
        same_top_token=float((merged.argmax(-1) == separate.argmax(-1)).float().mean()),
        largest_logit_difference=float((merged - separate).abs().max()),
    )


def encode(texts: Sequence[str], tokenizer: Any, steps: MergeSteps) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, seq]` of some texts, as many tokens as a model of this size can do in seconds."""
    parameters = sum(torch.Size(output.shape).numel() for step in steps.steps for output in step.outputs)
    budget = int(min(_MOST_TOKENS, max(_FEWEST_TOKENS, _WORK / max(1, parameters))))
    each = max(8, budget // len(texts))
    rows = [tokenizer(text, add_special_tokens=False).input_ids[:each] or [0] for text in texts]
    width = max(len(row) for row in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def _some(steps: list[Step]) -> list[Step]:
    apart = max(1, len(steps) // _SAMPLE)
    return steps[::apart][:_SAMPLE]


def _again(steps: MergeSteps, step: Step) -> dict[str, Tensor]:
    if step.copies is None:
        return steps.compute(step)
    (output,) = step.outputs
    return {output.key: steps.files.read(step.copies).to(output.dtype)}
