"""Tells which characters of an answer, as the template wrote it, are learnt: all of it, or the chosen parts.

An answer has up to three parts, in this order: its reasoning with the tags around it, what it says, and the calls that
it makes. The stop token belongs to the last of them: whoever learns that part learns to stop after it.
"""

import re
from collections.abc import Collection, Iterator

from studio.probe.data import Message

Range = tuple[int, int]
_CLOSING = re.compile(r"\s*(?:</[^<>\s]+>|\[/[^\[\]\s]+\]|<\|[^<>|]*\|>|<[^<>|\s]+\|>)\s*")
"""What closes reasoning: `</think>`, `[/THINK]`, `<|end|>`, `<channel|>`."""


def learnt_ranges(turn: Message, said: str, learn: Collection[str]) -> tuple[Range, ...] | None:
    """Return the character ranges of an answer that are learnt, in order.

    Args:
        turn: The answer in the data.
        said: The same as the template writes it, stop token included.
        learn: The parts that are learnt: `reasoning`, `answer`, `calls`.

    Returns:
        None where a choice is to be made and the parts cannot be told apart.
    """
    every = {"reasoning", "answer", "calls"} <= set(learn)
    if every and turn.spans is None:
        return ((0, len(said)),)
    parts = _parts(turn, said)
    if parts is None:
        return None
    found: list[Range] = []
    for kind, begin, end in parts:
        if kind == "answer" and turn.spans is not None:
            if kind in learn:
                chosen = _chosen(turn, said, begin, end)
                if chosen is None:
                    return None
                found += chosen
        elif kind in learn:
            found.append((begin, end))
    return tuple(_joined(found))


def reasoning_of(turn: Message) -> tuple[str, str]:
    """Return the reasoning of an answer, in a field of its own or between tags in its content, and the rest."""
    if turn.reasoning or "</think>" not in turn.content:
        return turn.reasoning, turn.content
    thought, _, rest = turn.content.partition("</think>")
    return thought.partition("<think>")[2] or thought, rest


def says_something(turn: Message, said: str) -> bool:
    """Return whether an answer as the template writes it holds anything of the answer in the data."""
    thought, words = (text.strip() for text in reasoning_of(turn))
    if words and words in said:
        return True
    bare = "".join(said.split())
    return any("".join(one.split()) in bare for one in (thought, words, *(call.name for call in turn.calls)) if one)


def _parts(turn: Message, said: str) -> list[tuple[str, int, int]] | None:
    """Return kind, begin and end of each part that the answer has, one behind the other; None if one is not found."""
    thought, words = (text.strip() for text in reasoning_of(turn))
    at, starts = 0, list[tuple[str, int]]()
    if thought:
        place = said.find(thought)
        if place >= 0:
            starts.append(("reasoning", 0))
            at = place + len(thought)
            closing = _CLOSING.match(said, at)
            at = closing.end() if closing else at
    if words:
        place = said.find(words, at)
        if place < 0:
            return None
        starts.append(("answer", at if at and starts else 0))
        at = place + len(words)
    if turn.calls:
        if said.find(turn.calls[0].name, at) < 0:
            return None
        starts.append(("calls", at if starts else 0))
    ends = [begin for _, begin in starts[1:]] + [len(said)]
    return [(kind, begin, end) for (kind, begin), end in zip(starts, ends, strict=True)]


def _chosen(turn: Message, said: str, begin: int, end: int) -> list[Range] | None:
    """Return the spans of a turn's content as ranges of what was written; with its end goes the stop token, if any."""
    content = turn.content.strip()
    place = said.find(content, begin, end)
    if place < 0:
        return None
    shift = place - (len(turn.content) - len(turn.content.lstrip()))
    found = []
    for first, last in turn.spans or ():
        low, high = max(begin, first + shift), min(last + shift, end)
        if last >= len(turn.content.rstrip()):
            high = end
        if low < high:
            found.append((low, high))
    return found


def _joined(ranges: list[Range]) -> Iterator[Range]:
    """Yield ranges in order, those that touch as one."""
    begin = end = -1
    for first, last in sorted(ranges):
        if first > end:
            if end > begin:
                yield begin, end
            begin, end = first, last
        end = max(end, last)
    if end > begin:
        yield begin, end
