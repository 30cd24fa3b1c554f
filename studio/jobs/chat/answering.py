"""From messages to token ids, from tokens to text as it grows, and where an answer ends."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from transformers import StoppingCriteria, TextStreamer

from studio.core.errors import BadInput
from studio.core.text import plain

_MARK = "ANSWER"


class Streamer(TextStreamer):
    """Gives out text as soon as no later token can change it: whole words, never half a character."""

    def __init__(self, tokenizer: Any, give: Callable[[str], None]) -> None:
        """Give pieces to `give`."""
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._give = give

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the library."""
        if text:
            self._give(text)


class Watch(StoppingCriteria):
    """Ends an answer between two tokens when it is no longer wanted."""

    def __init__(self, cancelled: Callable[[], bool]) -> None:
        """Ask `cancelled` after every token."""
        self._cancelled = cancelled

    def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
        """Called by the library."""
        return torch.full((input_ids.shape[0],), self._cancelled(), dtype=torch.bool, device=input_ids.device)


def token_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Return the messages through the chat template, ending where the answer begins: as training wrote them.

    A template that knows no system turn gets its text before the first question.

    Raises:
        BadInput: The template refuses them.
    """
    try:
        text = _render(tokenizer, messages)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        if messages[0]["role"] != "system":
            raise BadInput(f"the chat template refuses this: {plain(str(error), one_line=True, limit=200)}") from None
        system, first = messages[0], messages[1]
        folded = {"role": "user", "content": f"{system['content']}\n\n{first['content']}"}
        return token_ids(tokenizer, [folded, *messages[2:]])
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def stop_ids(tokenizer: Any, generation: Any) -> list[int]:
    """Return every token that ends an answer.

    Those of the tokenizer and of the generation config, and the special token that the template writes after an
    answer: some models name only the end of the text, not the end of a turn.
    """
    named = getattr(generation, "eos_token_id", None)
    stops = set(named) if isinstance(named, (list, tuple)) else {named}
    stops |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return sorted(int(stop) for stop in stops if stop is not None)


def _end_of_turn(tokenizer: Any) -> int | None:
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except (TemplateError, ValueError, TypeError, IndexError):
        return None
    after = tokenizer(text.rpartition(_MARK)[2].lstrip(), add_special_tokens=False).input_ids[:1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special.union(tokenizer.all_special_ids) else None


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
