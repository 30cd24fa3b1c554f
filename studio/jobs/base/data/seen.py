"""Compares what a row says with the texts that a chat template made of it: what stands in none of them is missing."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from studio.probe.data import Conversation, Message, ToolCall

_SWITCH = re.compile(r"(?<!<)/(?:no_?)?think\b")
_FROM_LENGTH = 2
"""The shortest value of an argument that is searched for; shorter ones stand in any text."""


def missing(row: Conversation, texts: Sequence[str], said: Mapping[int, str]) -> Counter[str]:
    """Return how much of a row stands in none of its texts: messages by role, `reasoning`, `calls` and `tools`.

    Each message takes its own place in a text, the longest first, so that a short one is not found inside another.
    White space and the words that switch reasoning on or off do not count: templates take them away as they please.

    Args:
        row: The conversation.
        texts: What was made of it; the last one has the most turns.
        said: The learnt answers as they were written, by the places of their turns. Whatever belongs to one of them
            must stand there; of the others the reasoning may be missing, as the model will not see it either.
    """
    counts: Counter[str] = Counter()
    for place, text in said.items():
        turn = row.messages[place]
        counts.update(_absent(list(_pieces(turn)), [text]))
        if turn.calls:
            counts["calls"] += _uncalled(turn.calls, text)
    others = [turn for place, turn in enumerate(row.messages) if place not in said]
    counts.update(_absent([piece for turn in others for piece in _pieces(turn) if piece[0] != "reasoning"], texts))
    if row.tools or any(turn.calls for turn in others):
        whole = "\n".join(texts)
        counts["calls"] += _uncalled([call for turn in others for call in turn.calls], whole)
        counts["tools"] = sum(name not in whole for name in _names(row.tools))
    return +counts


def _absent(pieces: Sequence[tuple[str, str]], texts: Sequence[str]) -> list[str]:
    """Return the kinds of those pieces that stand in none of the texts."""
    pieces = sorted(pieces, key=lambda piece: -len(piece[1]))
    absent = set(range(len(pieces)))
    for text in reversed(texts):
        if not absent:
            break
        rest = _switched(text)
        for place, (_, words) in enumerate(pieces):
            if words in rest:
                rest = rest.replace(words, "\0", 1)
                absent.discard(place)
        if absent:
            bare = "".join(rest.split())
            absent = {place for place in absent if not any(form in bare for form in _bare(pieces[place][1]))}
    return [pieces[place][0] for place in absent]


def _uncalled(calls: Sequence[ToolCall], text: str) -> int:
    """Return how many calls do not stand in a text with their name and all that their arguments say."""
    bare = "".join(text.split()) if calls else ""
    return sum(
        call.name not in text or not all(_written(value, text, bare) for value in _values(json.loads(call.arguments)))
        for call in calls
    )


def _pieces(turn: Message) -> Iterator[tuple[str, str]]:
    """Yield the words of a message under its role; an answer's reasoning under `reasoning`."""
    thought, _, said = turn.content.rpartition("</think>") if turn.role == "assistant" else ("", "", turn.content)
    for kind, words in (
        ("reasoning", turn.reasoning),
        ("reasoning", thought.replace("<think>", "")),
        (turn.role, said),
    ):
        if words := _switched(words).strip():
            yield kind, words


def _switched(text: str) -> str:
    """Return a text without the words that switch reasoning on or off."""
    return _SWITCH.sub("", text) if "think" in text else text


def _bare(words: str) -> tuple[str, str]:
    """Return the words without white space, as they are and as JSON: some templates write tool results so."""
    return "".join(words.split()), "".join(json.dumps(words, ensure_ascii=False)[1:-1].split())


def _values(value: Any) -> Iterator[str]:
    """Yield the texts and numbers in a call's arguments."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from _values(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _values(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _written(value: str, whole: str, bare: str) -> bool:
    return len(value) < _FROM_LENGTH or value in whole or any(form in bare for form in _bare(value))


def _names(tools: str) -> Iterator[str]:
    for tool in json.loads(tools) if tools else ():
        inner = tool.get("function", tool)
        name = inner.get("name") if isinstance(inner, dict) else None
        if isinstance(name, str):
            yield name
