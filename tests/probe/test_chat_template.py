"""What chat templates do, found out by letting them write; strangers' programs, some of which never end."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.probe import chat_template
from studio.probe.chat_template import FoundTemplate, find_template, template_traits
from tests.fakes.tiny_model import CHAT_TEMPLATE


def traits(text: str, **tokens: str) -> dict[str, Any]:
    return template_traits(FoundTemplate(text, "chat_template.jinja", tokens))


def test_a_plain_template_writes_every_role_and_nothing_more() -> None:
    seen = traits(CHAT_TEMPLATE)
    assert sorted(seen["roles"]) == ["assistant", "system", "tool", "user"]
    assert [seen[name] for name in ("system", "tools", "generation_block", "date", "think")] == [True, *[False] * 4]
    assert (seen["keeps_thinking"], seen["refused"], seen["trouble"]) == (True, {}, "")


def test_traits_of_a_template_with_all_of_them() -> None:
    seen = traits(
        "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=2) }}{% endif %}Today is {{ strftime_now('%d %b %Y') }}"
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system\x1b[31m turn') }}"
        "{% elif m.role == 'assistant' %}{% generation %}{{ m.content.split('</think>')[-1] }}{% endgeneration %}"
        "{% elif m.role == 'user' %}{{ m.content }}{% else %}{% continue %}{% endif %}{% endfor %}<think>",
        bos_token="<s>",
    )
    assert seen["roles"] == ["user", "assistant"]
    assert seen["refused"] == {"system": "no system\\x1b[31m turn"}
    assert [seen[name] for name in ("system", "tools", "generation_block", "date", "think")] == [False, *[True] * 4]
    assert seen["keeps_thinking"] is False


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{{ oops", "it is no template"),
        ("{% generation %}", "it is no template"),
        ("x" * (chat_template._MOST_TEMPLATE + 1), "is not tried"),
    ],
)
def test_a_broken_template_is_trouble(text: str, said: str) -> None:
    seen = traits(text)
    assert said in seen["trouble"]
    assert (seen["there"], seen["roles"], seen["system"], seen["date"]) == (True, [], None, None)


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "_SECONDS", 2.0)
    seen = traits("{% for a in range(99999) %}" * 3 + "{{ a }}" + "{% endfor %}" * 3)
    assert "too long" in seen["trouble"]
    assert (seen["there"], seen["roles"], seen["system"]) == (True, [], None)


@pytest.mark.parametrize(
    "text",
    [
        "{{ 'a' * 10 ** 11 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages[7].content }}",
    ],
)
def test_what_a_hostile_template_tries_is_refused_without_harm(text: str) -> None:
    seen = traits(text)
    assert seen["roles"] == []
    assert seen["trouble"] == ""
    assert all(words.isprintable() for words in seen["refused"].values())


def test_the_template_is_the_one_that_the_tokenizer_reads(tmp_path: Path) -> None:
    assert find_template(tmp_path) == FoundTemplate(tokens=None)
    assert template_traits(find_template(tmp_path))["there"] is False
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "one", "eos_token": {"content": "</s>"}, "bos_token": None}))
    assert find_template(tmp_path) == FoundTemplate("one", config.name, {"eos_token": "</s>"})
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_template(tmp_path).text == "three"
    (tmp_path / "chat_template.jinja").write_text("four")
    assert find_template(tmp_path) == FoundTemplate("four", "chat_template.jinja", {})


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"chat_template": 3}', '{"chat_template": [3, {"name": "x"}]}', "[" * 9999]
)
def test_odd_files_of_a_tokenizer_are_told_or_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    found = find_template(tmp_path)
    assert found.text == ""
    assert found.trouble.isprintable()
    assert bool(found.trouble) is not text.startswith('{"')


def test_a_template_where_no_tokenizer_looks_is_said(tmp_path: Path) -> None:
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "one"}))
    assert "chat_template.json alone" in find_template(tmp_path).trouble
