r"""Renders conversations as text, with the model's own chat template or with a plain one where the model has none.

There is a plain template for each data format. It is also written into the tokenizer, so that whoever loads that with
the adapter asks in the form that was trained. `{eos}` is the tokenizer's end token, written after each answer.

    chat                ### System:\n{text}\n\n### User:\n{text}\n\n### Assistant:\n{text}{eos}\n\n
    alpaca              {system}\n\n### Instruction:\n{text}\n\n### Response:\n{text}{eos}
    prompt_completion   {prompt}\n{completion}{eos}      (no new line where the prompt ends in white space itself)
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jinja2 import TemplateError

from studio.jobs.base.data.bounded import Table, apply_template
from studio.probe.data import Message

Warn = Callable[[str], None]
Turns = Sequence[Message]
_SWITCH = re.compile(r"(?<!<)/(?:no_?)?think\b")

_LOOP = "{%- for message in messages %}{%- set text = message['content'] %}"
_PLAIN = {
    "chat": (
        "{%- if message['role'] == 'assistant' %}{{ '### Assistant:\n' + text + (eos_token or '') + '\n\n' }}"
        "{%- else %}{{ '### ' + message['role'].capitalize() + ':\n' + text + '\n\n' }}{% endif %}",
        "{{ '### Assistant:\n' }}",
    ),
    "alpaca": (
        "{%- if message['role'] == 'assistant' %}{{ '### Response:\n' + text + (eos_token or '') }}"
        "{%- elif message['role'] == 'system' %}{{ text + '\n\n' }}"
        "{%- else %}{{ '### Instruction:\n' + text + '\n\n' }}{% endif %}",
        "{{ '### Response:\n' }}",
    ),
    "prompt_completion": (
        "{%- if message['role'] == 'assistant' %}{{ text + (eos_token or '') }}"
        "{%- elif message['role'] == 'system' %}{{ text + '\n\n' }}"
        "{%- else %}{{ text }}{% if not text or not text[-1].isspace() %}{{ '\n' }}{% endif %}{% endif %}",
        "",
    ),
}


def ensure_template(tokenizer: Any, data_format: str, warn: Warn) -> None:
    """Give the tokenizer a plain chat template for this data format if it has none, and say so."""
    if tokenizer.chat_template or data_format not in _PLAIN:
        return
    turn, prompt = _PLAIN[data_format]
    start = "{{ bos_token }}" if starts_with_bos(tokenizer) else ""
    ask = "{%- if add_generation_prompt %}" + prompt + "{%- endif %}" if prompt else ""
    tokenizer.chat_template = f"{start}{_LOOP}{turn}{{%- endfor %}}{ask}"
    warn(
        "This model has no chat template (it is probably a base model). A plain one is used and saved with the "
        f"tokenizer: {_example(tokenizer)!r}. Whoever uses the adapter must ask in this form."
    )


def starts_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts its start token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def render(tokenizer: Any, turns: Sequence[Turns], *, ask: bool = False) -> list[str | None]:
    """Return each conversation as the template writes it, None where the template refuses it.

    Args:
        tokenizer: Has a chat template.
        turns: Conversations.
        ask: Whether to end with the generation prompt, which opens the assistant's turn.
    """
    tables = [table_of(messages) for messages in turns]
    if not tables:
        return []
    try:
        texts: list[str | None] = apply_template(tokenizer, tables, tokenize=False, add_generation_prompt=ask)
    except (TemplateError, ValueError, TypeError, IndexError):
        # One conversation fails the whole call; one by one the others are rendered.
        return [_render_one(tokenizer, table, ask) for table in tables]
    return texts


def table_of(turns: Turns) -> Table:
    """Return turns as a chat template reads them: role, content, and what else a turn has.

    Calls have OpenAI's form, their arguments as an object, which transformers' guide asks for; reasoning stands in
    `reasoning_content`, as in the templates of Qwen and DeepSeek.
    """
    return [_table_row(turn) for turn in turns]


def _table_row(turn: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        row["reasoning_content"] = turn.reasoning
    if turn.calls:
        row["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": json.loads(call.arguments)}}
            | ({"id": call.id} if call.id else {})
            for call in turn.calls
        ]
    if turn.name:
        row["name"] = turn.name
    if turn.call_id:
        row["tool_call_id"] = turn.call_id
    return row


def left_out(messages: Turns, texts: Sequence[str]) -> Counter[str]:
    """Return how many messages of each role, and how much `reasoning`, stand in none of the texts made of a row.

    Each message takes its own place in a text, the longest first, so that a short one is not found inside another.
    White space and the words that switch reasoning on or off do not count: templates take them away as they please.
    """
    pieces = sorted((piece for turn in messages for piece in _pieces(turn)), key=lambda piece: -len(piece[1]))
    missing = set(range(len(pieces)))
    for text in reversed(texts):  # the last one has the most turns
        if not missing:
            break
        rest = _SWITCH.sub("", text)
        for place, (_, words) in enumerate(pieces):
            if words in rest:
                rest = rest.replace(words, "\0", 1)
                missing.discard(place)
        if missing:
            bare = "".join(rest.split())
            missing = {place for place in missing if not any(form in bare for form in _bare(pieces[place][1]))}
    return Counter(pieces[place][0] for place in missing)


def _pieces(turn: Message) -> Iterator[tuple[str, str]]:
    """Yield the words of a message under its role; an answer's reasoning under `reasoning`."""
    thought, _, said = turn.content.rpartition("</think>") if turn.role == "assistant" else ("", "", turn.content)
    for kind, words in (("reasoning", thought.replace("<think>", "")), (turn.role, said)):
        if words := _SWITCH.sub("", words).strip():
            yield kind, words


def _bare(words: str) -> tuple[str, str]:
    """Return the words without white space, as they are and as JSON: some templates write tool results so."""
    return "".join(words.split()), "".join(json.dumps(words, ensure_ascii=False)[1:-1].split())


def with_system_folded(messages: Turns) -> tuple[Message, ...]:
    """Return the turns with a leading system prompt put before the user's first words.

    Some templates refuse a system turn.
    """
    if len(messages) > 1 and messages[0].role == "system" and messages[1].role == "user":
        return (Message("user", f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:])
    return tuple(messages)


def why_refused(tokenizer: Any, messages: Turns) -> str:
    """Return what the template says when it refuses this conversation."""
    try:
        apply_template(tokenizer, [table_of(messages)], tokenize=False)
    except (TemplateError, ValueError, TypeError, IndexError) as error:
        return str(error)
    return ""


def _render_one(tokenizer: Any, table: Table, ask: bool) -> str | None:
    try:
        return str(apply_template(tokenizer, [table], tokenize=False, add_generation_prompt=ask)[0])
    except (TemplateError, ValueError, TypeError, IndexError):
        return None


def _example(tokenizer: Any) -> str:
    return render(tokenizer, [(Message("user", "QUESTION"), Message("assistant", "ANSWER"))])[0] or ""
