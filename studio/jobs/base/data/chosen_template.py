"""Puts the chat template that a recipe names into a tokenizer, with the end token that this template writes."""

from typing import Any

from jinja2 import TemplateError

from studio.core.errors import BadInput
from studio.core.named_templates import NAMED, NamedTemplate
from studio.core.text import plain
from studio.jobs.base.data.bounded import apply_template
from studio.jobs.base.data.template import Warn, starts_with_bos
from studio.probe.named_template import marks_in, refuse_missing

_ASKED, _ANSWERED = "QUESTION", "ANSWER"
_NEXT_TO_ZERO = 1e-3
"""Of the largest number that a row of the embeddings has as a rule. Training leaves none so small; an initialisation
that was never trained is either zero, or cannot be told from what was."""
_LOOKED_AT = 1000
_CHAT = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": _ANSWERED}]


def use_template(tokenizer: Any, chosen: NamedTemplate | None, warn: Warn) -> None:
    """Give the tokenizer a template in place of its own, and the end token that it writes after an answer.

    Both are saved with the tokenizer, so that whoever loads it with the adapter asks and stops as was trained.

    Args:
        tokenizer: Of the base.
        chosen: The template; None leaves the model's own.
        warn: Told what is replaced, and what of it is not as it should be.

    Raises:
        BadInput: The tokenizer lacks tokens of the template, or the template cannot be used.
    """
    if chosen is None:
        return
    refuse_missing(chosen, [token for token in chosen.tokens if not _is_token(tokenizer, token)])
    shown, own = plain(chosen.name, one_line=True, limit=200), bool(tokenizer.chat_template)
    bos = starts_with_bos(tokenizer) and chosen.name in NAMED
    tokenizer.chat_template = ("{{ bos_token }}" if bos else "") + chosen.text
    try:
        text = str(apply_template(tokenizer, [_CHAT], tokenize=False)[0])
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        said = plain(str(error), one_line=True, limit=300)
        raise BadInput(f"data.template: {shown} refuses a question and an answer: {said}.") from error
    if _ASKED not in text or _ANSWERED not in text.partition(_ASKED)[2]:
        raise BadInput(f"data.template: {shown} does not write a question and, after it, its answer.")
    after = text.rpartition(_ANSWERED)[2].lstrip()
    end = chosen.end or _end(tokenizer, after)
    broken = [mark for mark in marks_in(text) if not _is_token(tokenizer, mark)]
    refuse_missing(chosen, [mark for mark in broken if after.startswith(mark)])
    said = f"the chat template is {shown}" + (", in place of the model's own" if own else "")
    if end and end != tokenizer.eos_token:
        said += f"; answers end with {plain(end, one_line=True)}"
        tokenizer.eos_token = end
    warn(f"{said}. It is saved with the tokenizer: {text!r}.")
    if broken and chosen.name not in NAMED:
        warn(
            f"The template writes {', '.join(plain(mark, one_line=True) for mark in broken)}, which this tokenizer "
            "cuts into pieces: they are learnt as plain text."
        )


def untrained_tokens(tokenizer: Any, template: str, embeddings: Any) -> list[str]:
    """Return the special tokens in a template's text whose embeddings are next to zero: the base has never seen them.

    Args:
        tokenizer: Of the base.
        template: The template.
        embeddings: The input embeddings, `[vocabulary, hidden]`.
    """
    numbers = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks_in(template) if _is_token(tokenizer, mark)}
    usual = embeddings[:: max(1, len(embeddings) // _LOOKED_AT)].abs().amax(dim=1).median()
    return [
        mark
        for mark, number in numbers.items()
        if number < len(embeddings) and bool(embeddings[number].abs().amax() < _NEXT_TO_ZERO * usual)
    ]


def _end(tokenizer: Any, after: str) -> str:
    """Return the special token with which a text begins; empty where it begins with none."""
    found = tokenizer(after, add_special_tokens=False).input_ids[:1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    return str(tokenizer.convert_ids_to_tokens(found[0])) if found and found[0] in special else ""


def _is_token(tokenizer: Any, word: str) -> bool:
    return len(tokenizer(word, add_special_tokens=False).input_ids) == 1 and word in tokenizer.get_vocab()
