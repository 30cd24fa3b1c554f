"""Answers as the template itself marks them: chat templates with `{% generation %}` blocks."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from studio.jobs.base.data.bounded import apply_template
from studio.jobs.base.data.template import Turns

_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def marks_answers(tokenizer: Any) -> bool:
    """Return whether the tokenizer's chat template has generation blocks."""
    return isinstance(tokenizer.chat_template, str) and bool(_BLOCK.search(tokenizer.chat_template))


def masked_rows(
    conversations: Sequence[Turns], tokenizer: Any, stops: Sequence[str]
) -> list[tuple[NDArray[np.int32], NDArray[np.bool_]]]:
    """Return token ids and whether each is part of an answer, `[seq]` each.

    A stop token that the template writes after a block is counted to the answer; one that it leaves out is added.
    """
    tables = [[{"role": turn.role, "content": turn.content} for turn in turns] for turns in conversations]
    encoded = apply_template(tokenizer, tables, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    stop_ids = {tokenizer.convert_tokens_to_ids(token) for token in stops}
    rows = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return [_with_stops(ids, mask, stop_ids, tokenizer.eos_token_id) for ids, mask in rows]


def _with_stops(
    ids: Sequence[int], mask: Sequence[int], stop_ids: set[int], eos: int | None
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    made: list[int] = []
    labelled: list[bool] = []
    for place, (token, inside) in enumerate(zip(ids, mask, strict=True)):
        after_answer = bool(place and mask[place - 1] and not inside and ids[place - 1] not in stop_ids)
        if after_answer and token not in stop_ids and eos is not None:
            made.append(eos)
            labelled.append(True)
        made.append(token)
        labelled.append(bool(inside) or (after_answer and token in stop_ids))
    if mask and mask[-1] and ids[-1] not in stop_ids and eos is not None:
        made.append(eos)
        labelled.append(True)
    return np.array(made, np.int32), np.array(labelled, np.bool_)
