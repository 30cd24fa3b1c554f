"""What base + adapter and the merged model write, side by side: numbers prove more, words are believed sooner."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from studio.jobs.base.data.template import render
from studio.jobs.base.generation import greedy, stop_ids
from studio.jobs.base.weights.skeleton import attach
from studio.jobs.merge.steps import MergeSteps
from studio.probe.adapter_folder import AdapterFound
from studio.probe.data import Message

NEW_TOKENS = 24
_MOST_PARAMETERS = 1e9
"""A larger model is not loaded whole for this: the merge keeps to the memory of its largest tensor."""
_ROOM = 1.5
"""Of the model in fp32, for what it computes."""
_SIDES = {"separate": "text of base + adapter", "merged": "text of the merged model"}
_QUESTIONS = ("What is the capital of France?", "Write one sentence about the sea.")


def why_not(steps: MergeSteps) -> str:
    """Return why no text is written here, or nothing where it can be."""
    parameters = sum(torch.Size(output.shape).numel() for step in steps.steps for output in step.outputs)
    if parameters > _MOST_PARAMETERS:
        return f"the model has {parameters / 1e9:.1f} billion parameters: lora-studio chat shows what it says"
    if parameters * 4 * _ROOM > psutil.virtual_memory().available:
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
        adapters: Base + adapter is made of them.
        merged: The merged model's folder.
        tokenizer: Its tokenizer.
        questions: Of the user; none for ours.
        tell: Told the share that is written and what is being written, before a model is loaded and after every token.
    """
    prompts = [_ids(tokenizer, question) for question in questions or _QUESTIONS]
    written: dict[str, list[str]] = {}
    for half, (side, words) in enumerate(_SIDES.items()):
        tell(half / 2, words)
        model = _whole(merged) if side == "merged" else _adapted(steps, adapters)
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
    """Tell of another token; never ends the answer."""
    tell(begun + each * next(tokens), words)
    return False


def _whole(folder: Path) -> PreTrainedModel:
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model: PreTrainedModel = from_pretrained(folder, dtype=torch.float32)
    model.train(False)
    return model


@torch.no_grad()
def _adapted(steps: MergeSteps, adapters: Sequence[tuple[AdapterFound, float]]) -> Any:
    model = _whole(steps.files.folder)
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
