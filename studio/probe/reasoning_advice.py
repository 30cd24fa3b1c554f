"""Advice for a model that reasons before it answers, where the data hardly reason: it would unlearn to.

Unsloth's guide in Qwen's documentation asks for three reasoning rows in four where a model is to keep its reasoning
(https://qwen.readthedocs.io/en/latest/_sources/training/unsloth.md.txt, read in 2026: "use a 75% reasoning to 25%
non-reasoning dataset ratio"). Together's documentation says that training without it can degrade the model's reasoning
(https://docs.together.ai/docs/fine-tuning-reasoning).
"""

from collections.abc import Sequence
from pathlib import Path

from studio.core.recipe import Recipe
from studio.probe.chat_template import find_template
from studio.probe.data import Conversation, Preference, Row

ENOUGH = 0.75
"""The share of reasoning rows from which nothing is said."""
_LOOKED_AT = 1000
_MARKS = (
    *("<think>", "[THINK]", "<seed:think>", "<|channel|>", "<|START_THINKING|>"),
    *("reasoning_content", "enable_thinking"),
)
"""What stands in the templates of models that reason: Qwen 3, DeepSeek R1, Magistral, Seed-OSS, gpt-oss, Command A."""


def reasoning_advice(folder: Path | None, rows: Sequence[Row]) -> str:
    """Return what to consider where a reasoning model learns from rows of which too few reason; else an empty text.

    Args:
        folder: The base's folder; None where it is not on this machine yet.
        rows: The data. Of many rows a thousand are looked at.
    """
    if folder is None or not rows:
        return ""
    template = find_template(folder).text
    if not any(mark in template for mark in _MARKS):
        return ""
    every = -(-len(rows) // _LOOKED_AT)
    looked = [rows[place] for place in range(0, len(rows), every)]
    chats = [row for row in looked if isinstance(row, Conversation | Preference)]
    share = sum(map(_reasons, chats)) / max(1, len(chats))
    if not chats or share >= ENOUGH:
        return ""
    return (
        f"this model reasons before it answers, and {_percent(share)} of the rows do: it may unlearn to reason. "
        "Unsloth advises 75 % rows with reasoning and 25 % without where a model is to keep it (qwen.readthedocs.io, "
        "training/unsloth): mix such rows in (data.sources), or take a model that does not reason."
    )


def advice_of(recipe: Recipe, folder: Path | None, rows: Sequence[Row]) -> str:
    """Return the advice for a recipe; empty where the user has switched reasoning off in the template."""
    switched = dict(recipe.data.template_kwargs).get("enable_thinking")
    return "" if switched is False else reasoning_advice(folder, rows)


def _reasons(row: Row) -> bool:
    turns = row.asked + row.chosen if isinstance(row, Preference) else row.turns
    return any(turn.role == "assistant" and (turn.reasoning or "</think>" in turn.content) for turn in turns)


def _percent(share: float) -> str:
    return "none" if not share else f"about {max(0.01, share):.0%}"
