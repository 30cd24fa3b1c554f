"""The chat template that a recipe names: found, and checked against the base's tokenizer before a run is made."""

import re
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.named_templates import NAMED, NamedTemplate
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.chat_template import FoundTemplate, find_template, template_traits
from studio.probe.models import BaseFound

_MOST_BYTES = 2**20
_TOKENIZER = "tokenizer.json"
_MARK = re.compile(r"<\|[^<>|\s'\"{}]{1,40}\|>|<(?:start|end)_of_turn>")
"""What looks like a special token in a template file."""


def template_of(word: str) -> NamedTemplate | None:
    """Return the template that a recipe names; None for the model's own.

    Args:
        word: A name, or the path of a file; empty for the model's own.

    Raises:
        BadInput: It is no name, and no file that can be read.
    """
    if not word or word in NAMED:
        return NAMED.get(word)
    path, shown = Path(word).expanduser(), plain(word, one_line=True, limit=200)
    try:
        if not path.is_file():
            raise BadInput(
                f"data.template: there is no template {shown}. Wanted one of {', '.join(NAMED)}, the path of a jinja "
                "file, or nothing for the model's own."
            )
        if path.stat().st_size > _MOST_BYTES:
            raise BadInput(f"data.template: {shown} is larger than 1 MiB; a chat template has some kilobytes.")
        text = path.read_text("utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"data.template: {shown} cannot be read: {error}. Wanted a jinja template in UTF-8.") from None
    if not text.strip():
        raise BadInput(f"data.template: {shown} is empty. Leave data.template empty for the model's own template.")
    return NamedTemplate(word, text)


def check_template(recipe: Recipe, base: BaseFound) -> None:
    """Refuse a template that is none, or whose special tokens the base's tokenizer lacks.

    A base that is not on this machine yet is checked by the job.

    Raises:
        BadInput: The message says what is wrong and what to do.
    """
    chosen = template_of(recipe.data.template)
    if chosen is None:
        return
    if chosen.name not in NAMED:
        tokens = find_template(base.path).tokens if base.path else None
        traits = template_traits(FoundTemplate(chosen.text, chosen.name, tokens or {}))
        shown = plain(chosen.name, one_line=True, limit=200)
        if traits["trouble"]:
            raise BadInput(f"data.template: {shown}: {traits['trouble']}.")
        if missing := [role for role in ("user", "assistant") if role not in traits["roles"]]:
            said = "; ".join(f"{role}: {words}" for role, words in traits["refused"].items() if role in missing)
            raise BadInput(
                f"data.template: {shown} does not write what the {' and the '.join(missing)} says"
                f"{f' ({said})' if said else ''}. Wanted a template that writes every message of `messages`."
            )
    file = base.path / _TOKENIZER if base.path else None
    if file is not None and file.is_file():
        from tokenizers import Tokenizer  # noqa: PLC0415  only a named template needs it

        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for a damaged file
            raise BadInput(
                f"{plain(str(file), one_line=True)} is damaged: {plain(str(error), one_line=True)}"
            ) from error
        refuse_missing(chosen, [token for token in chosen.tokens if tokenizer.token_to_id(token) is None])


def refuse_missing(chosen: NamedTemplate, missing: list[str]) -> None:
    """Refuse a template for the special tokens that a tokenizer lacks; return if it lacks none.

    Raises:
        BadInput: Says which are missing, and what to do.
    """
    if missing:
        free = ", ".join(name for name, template in NAMED.items() if not template.tokens)
        lacks = ", ".join(plain(token, one_line=True) for token in missing)
        raise BadInput(
            f"data.template: {plain(chosen.name, one_line=True, limit=200)} needs special tokens that this tokenizer "
            f"lacks: {lacks}. They would be cut into pieces, and no answer would end with one token. Choose a template "
            f"whose tokens it has, or one that needs none ({free}); or add the tokens to tokenizer and embeddings of a "
            "copy of the base, and train embeddings and head whole (adapter.modules_to_save)."
        )


def marks_in(text: str) -> list[str]:
    """Return what looks like a special token in a text, each once."""
    return list(dict.fromkeys(_MARK.findall(text)))
