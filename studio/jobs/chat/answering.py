"""From messages to token ids, and from tokens to text as it grows."""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import TextStreamer

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.data.bounded import apply_template


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


def _render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return str(apply_template(tokenizer, [messages], tokenize=False, add_generation_prompt=True)[0])
