"""Writes conversations with a model's chat template, in the spelling that this template takes.

Templates agree on role and content alone. Some take the arguments of a call as an object, some as JSON text; reasoning
stands in one of several fields, in parts of the content, or between tags in it; a turn that only calls tools has an
empty content or none; some want ids of nine letters. Spellings are tried, the usual one first, on a conversation made
up for the purpose that has the features of the row: the first that the template accepts, and whose rendering holds
every word, is taken. If the row itself is refused in that spelling, the others are tried on the row.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

from jinja2 import TemplateError

from studio.core.chat_options import NOT_VARIABLES
from studio.jobs.base.data.bounded import Table, apply_template, unknown_variables
from studio.jobs.base.data.seen import missing
from studio.probe.data import Conversation, Message, ToolCall

Turns = Sequence[Message]
Arguments = Literal["object", "text"]
Reasoning = Literal["reasoning_content", "reasoning", "thinking", "content", "parts", "blocks"]
_PYTHON = "{'type': '"
"""How a list of parts begins in the text of a template that expects none."""
_REFUSALS = (TemplateError, ValueError, TypeError, IndexError)


@dataclass(frozen=True, slots=True)
class Spelling:
    """How turns are handed to a template.

    Attributes:
        arguments: Whether a call's arguments are an `object`, as transformers' guide asks for, or JSON `text`.
        reasoning: The field that holds it; `content`: between `<think>` tags before the content; `parts`: Mistral's
            parts of the content; `blocks`: those of Apertus.
        empty_is_none: Whether a turn that only calls tools has None for its content; transformers from 5.24 on leaves
            such a field out.
        own_ids: Whether calls have the ids of the file. If not, they are counted in nine letters, and the results have
            the names of their tools.
        in_parts: Whether every content is a list of one part, as the templates of models that see want it.
    """

    arguments: Arguments = "object"
    reasoning: Reasoning = "reasoning_content"
    empty_is_none: bool = False
    own_ids: bool = True
    in_parts: bool = False


USUAL = Spelling()


class Wanted(NamedTuple):
    """A text to be rendered: the first turns of a row, with the generation prompt behind them or without."""

    row: Conversation
    turns: int
    ask: bool


class Features(NamedTuple):
    """What of a row decides on its spelling."""

    thinks: bool
    calls: bool
    several: bool
    talks: bool
    ids: bool
    results: bool


class Renderer:
    """Writes conversations with one tokenizer's chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._spellings: dict[Features, Spelling] = {}

    def texts(self, wanted: Sequence[Wanted], spelling: Spelling | None = None) -> list[str | None]:
        """Return each text, None where the template refuses it.

        Args:
            wanted: What is rendered.
            spelling: That of all of them; None for that which suits the features of each row.
        """
        made: list[str | None] = [None] * len(wanted)
        together: dict[tuple[str, str, bool], list[int]] = {}
        for place, (row, _, ask) in enumerate(wanted):
            together.setdefault((row.tools, row.template_kwargs, ask), []).append(place)
        for (tools, more, ask), places in together.items():
            tables = list(self._tables([wanted[place] for place in places], spelling))
            try:
                texts = _rendered(self.tokenizer, tables, ask, options(tools, more))
            except ValueError:  # its variables
                continue
            for place, text in zip(places, texts, strict=True):
                made[place] = text
        return made

    def spelling_of(self, row: Conversation) -> Spelling:
        """Return the spelling for rows with this one's features."""
        features = features_of(row)
        if features not in self._spellings:
            self._spellings[features] = self.best(_made_up(features))
        return self._spellings[features]

    def best(self, row: Conversation) -> Spelling:
        """Return the first spelling in which least of the row is missing; the usual one where all are refused."""
        features = features_of(row)
        found, least = USUAL, float("inf")
        for spelling in spellings(features):
            amiss = self._amiss(row, spelling)
            if amiss < least:
                found, least = spelling, amiss
            if not least:
                break
        return found

    def why_refused(self, row: Conversation) -> str:
        """Return what the template says when it refuses a conversation."""
        wanted = Wanted(row, len(row.messages), ask=False)
        try:
            more = options(row.tools, row.template_kwargs)
            apply_template(self.tokenizer, list(self._tables([wanted], None)), tokenize=False, **more)
        except _REFUSALS as error:
            return str(error)
        return ""

    def unknown(self, row: Conversation) -> list[str]:
        """Return the row's variables of which the template knows nothing."""
        names = json.loads(row.template_kwargs) if row.template_kwargs else ()
        return unknown_variables(self.tokenizer, names)

    def _tables(self, wanted: Sequence[Wanted], spelling: Spelling | None) -> Iterator[Table]:
        """Yield what the template gets for each text; that of fewer turns is a beginning of that of all."""
        row: Conversation | None = None
        table: Table = ()
        for one in wanted:
            if one.row is not row:
                row, table = one.row, table_of(one.row.messages, spelling or self.spelling_of(one.row))
            yield table[: one.turns]

    def _amiss(self, row: Conversation, spelling: Spelling) -> float:
        """Return how much of a row is missing in this spelling, or quoted twice; infinite if refused or no text."""
        places = [place for place, turn in enumerate(row.messages) if turn.role == "assistant"]
        texts = self.texts([Wanted(row, place + 1, ask=False) for place in places], spelling)
        if texts[-1] is None:
            return float("inf")
        said = {place: text for place, text in zip(places, texts, strict=True) if text is not None}
        written = list(said.values())
        amiss = float(sum(missing(row, written, said).values()))
        if any(_PYTHON in text for text in written):
            return float("inf")
        arguments = [call.arguments for turn in row.messages for call in turn.calls]
        spoilt = [shape for one in arguments for shape in (str(json.loads(one)), json.dumps(one)[1:-1]) if shape != one]
        return amiss + sum(0.5 for shape in spoilt if any(shape in text for text in written))


def options(tools: str, template_kwargs: str) -> dict[str, Any]:
    """Return a row's tools and variables as `apply_template` takes them.

    Raises:
        ValueError: A variable has a name that is not the row's to give.
    """
    found: dict[str, Any] = json.loads(template_kwargs) if template_kwargs else {}
    if taken := sorted(NOT_VARIABLES.intersection(found) - {"documents"}):
        raise ValueError(f"the row's variables for the template may not be called {', '.join(taken)}")
    if tools:
        found["tools"] = [
            {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool
            for tool in json.loads(tools)
        ]
    return found


def features_of(row: Conversation) -> Features:
    """Return what of a row decides on its spelling."""
    turns = row.messages
    return Features(
        thinks=any(turn.reasoning for turn in turns),
        calls=any(turn.calls for turn in turns),
        several=any(len(turn.calls) > 1 for turn in turns),
        talks=any(turn.calls and turn.content for turn in turns),
        ids=any(call.id for turn in turns for call in turn.calls),
        results=any(turn.role == "tool" for turn in turns),
    )


def spellings(features: Features) -> Iterator[Spelling]:
    """Yield the spellings that differ for a row with these features, the usual one first."""
    linked = features.calls or features.results
    arguments: tuple[Arguments, ...] = ("object", "text") if features.calls else ("object",)
    reasoning: tuple[Reasoning, ...] = get_args(Reasoning) if features.thinks else ("reasoning_content",)
    nothing, ids = (False, True) if features.calls else (False,), (True, False) if linked else (True,)
    for in_parts, own_ids, is_none, handed, field in itertools.product(
        (False, True), ids, nothing, arguments, reasoning
    ):
        yield Spelling(handed, field, is_none, own_ids, in_parts)


def _made_up(features: Features) -> Conversation:
    calls = tuple(
        ToolCall(f"find_{word}", json.dumps({"place": f"{word} 7"}), f"call_{word}" if features.ids else "")
        for word in (("osl0", "b3rn") if features.several else ("osl0",))
    )
    turns = [Message("user", "qsked1")]
    if features.calls:
        said = "m0ment" if features.talks else ""
        turns.append(Message("assistant", said, reasoning="th0ught" if features.thinks else "", calls=calls))
    elif features.results:
        turns.append(Message("assistant", "m0ment"))
    if features.results:
        ids = [call.id for call in calls] if features.calls else [""]
        turns += [Message("tool", f"resu1t{place}", call_id=one) for place, one in enumerate(ids)]
    if features.results or not features.calls:
        turns.append(Message("assistant", "answ2red", reasoning="pond3red" if features.thinks else ""))
    return Conversation(tuple(turns))


def _rendered(tokenizer: Any, tables: Sequence[Table], ask: bool, more: dict[str, Any]) -> list[str | None]:
    try:
        made: list[str | None] = apply_template(tokenizer, tables, tokenize=False, add_generation_prompt=ask, **more)
    except _REFUSALS:
        # One conversation fails the whole call; one by one the others are rendered.
        return [_rendered(tokenizer, [table], ask, more)[0] for table in tables] if len(tables) > 1 else [None]
    return made


def table_of(turns: Turns, spelling: Spelling = USUAL) -> Table:
    """Return turns as a chat template reads them: role, content, and what else a turn has, in OpenAI's format."""
    made = []
    for turn in turns:
        row: dict[str, Any] = {"role": turn.role, "content": turn.content}
        if turn.reasoning:
            row |= _with_reasoning(turn, spelling.reasoning)
        if turn.calls:
            row["tool_calls"] = [_call(call, spelling) for call in turn.calls]
            if not turn.content and spelling.empty_is_none and row["content"] == turn.content:
                row["content"] = None
        if turn.name:
            row["name"] = turn.name
        if turn.call_id:
            row["tool_call_id"] = turn.call_id
        if spelling.in_parts and isinstance(row["content"], str):
            row["content"] = [{"type": "text", "text": row["content"]}] if row["content"] else []
        made.append(row)
    return made if spelling.own_ids else _with_ids(turns, made)


def _call(call: ToolCall, spelling: Spelling) -> dict[str, Any]:
    arguments = json.loads(call.arguments) if spelling.arguments == "object" else call.arguments
    made: dict[str, Any] = {"type": "function", "function": {"name": call.name, "arguments": arguments}}
    return made | ({"id": call.id} if call.id else {})


def _with_reasoning(turn: Message, field: Reasoning) -> dict[str, Any]:
    if field == "content":
        return {"content": f"<think>\n{turn.reasoning}\n</think>\n\n{turn.content}"}
    if field == "parts":
        thought = {"type": "thinking", "thinking": turn.reasoning}
        return {"content": [thought, *([{"type": "text", "text": turn.content}] if turn.content else [])]}
    if field == "blocks":
        thought = {"type": "thoughts", "text": turn.reasoning}
        return {"content": {"blocks": [thought, {"type": "response", "text": turn.content}]}}
    return {field: turn.reasoning}


def _with_ids(turns: Turns, table: list[dict[str, Any]]) -> Table:
    """Give every call an id of nine letters, and every result its call's id and the name of its tool."""
    count, due = 0, list[tuple[str, str, str]]()
    for turn, row in zip(turns, table, strict=True):
        if turn.calls:
            due = []
            for call, made in zip(turn.calls, row["tool_calls"], strict=True):
                made["id"] = f"call{count:05d}"
                due.append((call.id, made["id"], call.name))
                count += 1
        elif turn.role == "tool" and due:
            found = next((one for one in due if turn.call_id and one[0] == turn.call_id), due[0])
            due.remove(found)
            row["tool_call_id"] = found[1]
            row.setdefault("name", found[2])
    return table
