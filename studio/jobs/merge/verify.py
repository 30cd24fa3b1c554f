"""Checks that the merged files behave like base + adapter.

Every byte is read again, some tensors are merged again by peft and compared bit by bit, and answers are compared.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.jobs.base.closeness import FEWEST_TOKENS, MOST_TOKENS, Closeness, compare, padded, rows_of
from studio.jobs.base.data.template import render
from studio.jobs.base.device import free_bytes
from studio.jobs.base.generation import greedy
from studio.jobs.base.model_class import class_in
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.base.weights.skeleton import attach
from studio.jobs.base.weights.streamed import folder_logits, streamed_logits
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge.shards import ShardWriter
from studio.jobs.merge.steps import MergeSteps, Step
from studio.probe.adapter_folder import AdapterFound
from studio.probe.data import Message
from studio.probe.model_folder import weight_files
from studio.probe.weight_sums import form_of, weight_sums

_SAMPLE = 4
_SAMPLE_BYTES = 4 * 2**20
"""Largest tensor that is merged again, because that needs it whole in fp32 with its delta; larger if all are larger."""
_WORK = 8e10
"""Most parameters times tokens of one forward pass: a few seconds on two cores."""
_MOST_LOGITS = 2**24
"""Most logits of one model: 64 MiB in fp32."""
_ADVICE = "the disk or the memory may be faulty; look at the system's log, then merge again"
NEW_TOKENS = 24
_MOST_PARAMETERS = 1e9
"""A larger model is not loaded whole for this: the merge keeps to the memory of its largest tensor."""
_ROOM = 1.5
"""Memory of a model that answers, over its weights in fp32: the rest is for what it computes."""
_SIDES = {"separate": "text of base + adapter", "merged": "text of the merged model"}
_QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")


def read_back(writer: ShardWriter, tell: Callable[[float], None]) -> int:
    """Read every tensor in the files again and compare its checksum with the written one's; return how many there are.

    Args:
        writer: The writer of the files.
        tell: Told the fraction done; may raise.

    Raises:
        JobFailed: A tensor in the files is missing, of another shape, or differs.
        OSError: A file cannot be read.
    """
    seen = weight_sums(weight_files(writer.folder), tell, anew=True)
    if seen.shapes != {key: form_of(entry) for shard in writer.shards for key, entry in shard.entries.items()}:
        raise JobFailed("merged_incomplete", "the merged files do not hold the tensors that were written", _ADVICE)
    for key, found in (seen.sums or {}).items():
        if found != writer.sums.get(key):
            raise _differs(key)
    return len(seen.shapes)


def make_again(steps: MergeSteps, folder: Path) -> int:
    """Let peft merge some layers whole and compare them bit by bit with the files; return the number of tensors.

    Args:
        steps: What was merged.
        folder: The merged model.

    Raises:
        JobFailed: A tensor in the files differs.
        OSError: A file cannot be read.
    """
    files, count = TensorFiles(folder), 0
    for step in _some([step for step in steps.steps if step.copies is None]):
        for key, tensor in steps.compute(step).items():
            count += 1
            if not torch.equal(files.read(key), tensor):
                raise _differs(key)
    return count


def compare_logits(
    steps: MergeSteps, folder: Path, ids: Tensor, mask: Tensor, tell: Callable[[str, float], None]
) -> Closeness:
    """Run base + adapter and the merged files on the same tokens in fp32, with a few rows of each matrix in memory.

    Args:
        steps: Base and adapter.
        folder: The merged model.
        ids: `[batch, seq]`.
        mask: `[batch, seq]`, 0 for padding.
        tell: Told which of the two is run and the fraction of it that is done; may raise.

    Raises:
        JobFailed: The merged files lack a parameter of the model, or a logit is not finite.
        OSError: A file cannot be read.
    """
    real = mask.bool()
    separate = streamed_logits(
        steps.skeleton.adapted,
        steps,
        ids,
        mask,
        "base_model.model.",
        tell=lambda fraction: tell("answers of base and adapter", fraction),
    )[real]
    merged = folder_logits(folder, ids, mask, lambda fraction: tell("answers of the merged model", fraction))[real]
    closeness = compare(merged, separate)
    if not all(bool(torch.isfinite(logits).all()) for logits in (merged, separate)):
        raise JobFailed(
            "merged_nonfinite", "the merged model's logits hold NaN or infinity", "look at the adapter's last losses"
        )
    return closeness


def encode(texts: Sequence[str], tokenizer: Any, steps: MergeSteps) -> tuple[Tensor, Tensor]:
    """Return ids and mask `[batch, seq]` of texts, cut to as many tokens as this model can compute in seconds."""
    parameters = sum(torch.Size(output.shape).numel() for step in steps.steps for output in step.outputs)
    vocabulary = steps.skeleton.clean.config.get_text_config().vocab_size
    budget = min(MOST_TOKENS, _MOST_LOGITS / vocabulary, max(FEWEST_TOKENS, _WORK / max(1, parameters)))
    return padded(rows_of(texts, tokenizer, budget))


def _differs(key: str) -> JobFailed:
    return JobFailed("merged_differs", f"{plain(key, one_line=True)} on disk is not what was made", _ADVICE)


def _some(steps: Sequence[Step]) -> Sequence[Step]:
    """Return a few steps, spread over the whole model and without large ones if there are small ones."""
    limit = max(_SAMPLE_BYTES, min(map(_size_of, steps), default=0))
    small = [step for step in steps if _size_of(step) <= limit]
    return small[:: max(1, len(small) // _SAMPLE)][:_SAMPLE]


def _size_of(step: Step) -> int:
    return sum(output.size_bytes for output in step.outputs)


def why_not(steps: MergeSteps) -> str:
    """Return why the model cannot answer here; empty where it can."""
    parameters = sum(torch.Size(output.shape).numel() for step in steps.steps for output in step.outputs)
    if parameters > _MOST_PARAMETERS:
        return f"the model has {parameters / 1e9:.1f} billion parameters: lora-studio chat shows what it says"
    if parameters * 4 * _ROOM > free_bytes():
        return "memory is short"
    return ""


def side_by_side(
    steps: MergeSteps,
    adapters: Sequence[tuple[AdapterFound, float]],
    merged: Path,
    tokenizer: Any,
    *,
    questions: Sequence[str],
    tell: Callable[[float, str], None],
) -> list[dict[str, str]]:
    """Return for each question what base + adapter and what the merged model answers, both greedily in fp32.

    Args:
        steps: What was merged.
        adapters: The adapters, with their weights.
        merged: The merged model's folder.
        tokenizer: Its tokenizer.
        questions: Prompts from the training run; if empty, built-in ones are asked.
        tell: Told the fraction done and what is being written, before a model is loaded and after every token.
    """
    prompts = [_ids(tokenizer, question) for question in questions or _QUESTIONS]
    written: dict[str, list[str]] = {}
    for half, (side, words) in enumerate(_SIDES.items()):
        tell(half / 2, words)
        model = _whole(steps, merged) if side == "merged" else _adapted(steps, adapters)
        written[side] = []
        for place, ids in enumerate(prompts):
            begun = half / 2 + place / (2 * len(prompts))
            after_token = partial(_go_on, tell, words, count(1), begun, 1 / (2 * len(prompts) * NEW_TOKENS))
            written[side].append(_answer(model, tokenizer, ids, after_token))
        del model
    return [
        {"prompt": question, "separate": separate, "merged": same}
        for question, separate, same in zip(
            questions or _QUESTIONS, written["separate"], written["merged"], strict=True
        )
    ]


def _go_on(tell: Callable[[float, str], None], words: str, tokens: Iterator[int], begun: float, each: float) -> bool:
    """Tell that another token is written. False, always, lets the answer go on."""
    tell(begun + each * next(tokens), words)
    return False


def _whole(steps: MergeSteps, folder: Path) -> PreTrainedModel:
    # The skeleton's class: it has the towers of a multimodal model only where the adapter changes them.
    from_pretrained: Any = type(steps.skeleton.clean).from_pretrained
    model: PreTrainedModel = from_pretrained(folder, config=class_in(folder).config, dtype=torch.float32)
    model.train(False)
    return model


@torch.no_grad()
def _adapted(steps: MergeSteps, adapters: Sequence[tuple[AdapterFound, float]]) -> Any:
    model = _whole(steps, steps.files.folder)
    vocabulary = steps.skeleton.vocabulary
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    for name, parameter in model.named_parameters():
        if name in steps.changed:
            parameter.copy_(steps.read(name))
    return attach(model, adapters)


def _answer(model: Any, tokenizer: Any, ids: list[int], after_token: Callable[[], bool]) -> str:
    stops = stop_ids(tokenizer, model.generation_config)
    made = greedy(model, ids, stops=stops, new_tokens=NEW_TOKENS, cancelled=after_token)
    return str(tokenizer.decode(made, skip_special_tokens=True)).strip()


def _ids(tokenizer: Any, question: str) -> list[int]:
    text = render(tokenizer, [(Message("user", question),)], ask=True)[0] if tokenizer.chat_template else None
    ids = tokenizer(question).input_ids if text is None else tokenizer(text, add_special_tokens=False).input_ids
    return list(ids) or [0]
