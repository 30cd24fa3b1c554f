"""Rows of the corpus with anything put in their place: each gives a row or a finding, and nothing ever breaks."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from studio.probe.data import PlainText, Reading, inspect_data, row_keys, twin_keys
from studio.probe.data.reading import Wants
from tests.fakes.data_rows import BAD, GOOD

ROWS = [good.row for good in GOOD.values()] + [bad.row for bad in BAD.values()]
VALUES: list[Any] = [
    None, True, False, 0, 1, -3, 0.5, float("nan"), 10**40, "", " ", "x", "[", "{}", "[]", "[1]", '{"name": "a"}',
    '[{"role": "user"}]', [], {}, [[]], [{}], [None], ["a", "b"], [[["a"]]], {"a": 1}, {"role": "user"},
    {"from": "gpt", "value": "x"}, {"type": "text"}, {"type": "tool_use"}, [{"type": "tool_result"}],
    {"function": None}, {"name": {}},
    "<tool_call>", "<tools>[", "<think>", "\ud800", "USER: a", "\n\nHuman: a\n\nAssistant: b",
]  # fmt: skip
FIELDS = [
    "weight",
    "train",
    "loss",
    "train_detail",
    "tool_calls",
    "function_call",
    "reasoning",
    "thinking",
    "name",
    "tool_call_id",
    "content",
    "role",
    "text",
    "label",
    "tools",
    "history",
    "context",
    "documents",
    "chat_template_kwargs",
    "system",
    "chosen",
    "rejected",
    "input",
    "messages",
    "prompt",
    "answers",
]


def places(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield (*before, key)
        yield from places(part, (*before, key))


def mutated(chance: random.Random) -> dict[str, Any]:
    """Return a row of the corpus with one to three things replaced, removed or added."""
    row = copy.deepcopy(chance.choice(ROWS))
    for _ in range(chance.choice([1, 1, 2, 3])):
        path = chance.choice([*places(row), ("text",)])
        holder: Any = row
        for key in path[:-1]:
            holder = holder[key]
        what, value = chance.random(), copy.deepcopy(chance.choice(VALUES))
        if isinstance(holder, list):
            holder.insert(path[-1], value)
        elif what < 0.6:
            holder[path[-1]] = value
        elif what < 0.75:
            holder.pop(path[-1], None)
        else:
            holder[chance.choice(FIELDS)] = value
    return row


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_anything_gives_a_row_or_a_finding(tmp_path: Path, count: int) -> None:
    chance, path = random.Random(count), tmp_path / "row.jsonl"  # noqa: S311  no secret
    for _ in range(count):
        row = mutated(chance)
        path.write_text(json.dumps(row) + "\n")
        data = inspect_data(path, Reading(wants=chance.choice(get_args(Wants)), answers_only=chance.random() < 0.9))
        assert len(data.rows) or data.findings, row
        assert all(finding.message.isprintable() and finding.field.isprintable() for finding in data.findings)
        for made in data.rows:
            assert row_keys(made).content and twin_keys(made).same_prompt
            assert all(json.loads(call.arguments) is not None for turn in made.turns for call in turn.calls)
            if not isinstance(made, PlainText):
                assert isinstance(json.loads(made.tools or "[]"), list)
                assert isinstance(json.loads(made.template_kwargs or "{}"), dict)
