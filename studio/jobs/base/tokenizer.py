"""Loads a model's tokenizer and finds the tokens that end an answer; without torch, which only models need."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from jinja2 import TemplateError
from transformers import AutoTokenizer

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.jobs.base.data.bounded import apply_template, freeze_date, set_variables
from studio.probe.adapter_folder import run_of_adapter
from studio.runs.identity import first_date
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import load_recipe

_MARK = "ANSWER"


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer of a model folder.

    The chat template of a run's adapter is told what the run told it: its date and the recipe's variables.

    Raises:
        BadInput: It cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise BadInput(
            f"The tokenizer of {plain(str(folder), one_line=True)} cannot be loaded: {why_unloadable(error)}"
        ) from error
    if run := run_of_adapter(folder):
        paths = RunPaths(Path(run))
        freeze_date(tokenizer, first_date(paths))
        with suppress(BadInput):  # a folder that is no run's any more, or that of a merge
            set_variables(tokenizer, dict(load_recipe(paths.recipe).data.template_kwargs))
    return tokenizer


def why_unloadable(error: Exception) -> str:
    """Return why a model or its tokenizer cannot be loaded, in words for the user."""
    text = str(error)
    if "trust_remote_code" in text:
        return (
            "it brings Python code of its own, run only where model.trust_remote_code is true. Set it only for "
            "code that you have read: it can do anything that you can."
        )
    if "does not recognize this architecture" in text or "Unrecognized model" in text:
        version = transformers.__version__
        return f"transformers {version} does not know this architecture. Update it: pip install -U transformers"
    return f"{type(error).__name__}: {plain(text, one_line=True, limit=400)}"


def stop_ids(tokenizer: Any, generation: Any) -> list[int]:
    """Return the ids of all tokens that end an answer, sorted.

    They are the end tokens of the tokenizer and of the generation config, and the special token that the chat template
    writes after an answer. The last is needed because some models name only the end of the text, not that of a turn.
    """
    named = getattr(generation, "eos_token_id", None)
    stops = set(named) if isinstance(named, (list, tuple)) else {named}
    stops |= {tokenizer.eos_token_id, _end_of_turn(tokenizer)}
    return sorted(int(stop) for stop in stops if stop is not None)


def _end_of_turn(tokenizer: Any) -> int | None:
    """Return the special token that the chat template writes after an answer; None where there is none."""
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _MARK}]
    try:
        text = str(apply_template(tokenizer, [turns], tokenize=False)[0])
    except (TemplateError, ValueError, TypeError, IndexError):
        return None
    after = tokenizer(text.rpartition(_MARK)[2].lstrip(), add_special_tokens=False).input_ids[:1]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return after[0] if after and after[0] in special.union(tokenizer.all_special_ids) else None
