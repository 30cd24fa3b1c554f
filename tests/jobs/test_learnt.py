"""What of an answer is learnt: all of it, the parts that the recipe names, or the stretches that the data marks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.core.recipe import Recipe
from studio.jobs.base.data.bounded import apply_template, set_variables
from studio.jobs.base.data.rows import Encoder, Encoding, sample_prompts
from studio.jobs.base.data.template import say_variables
from studio.jobs.base.tokenizer import load_tokenizer
from studio.probe.data import Conversation, Message, ToolCall
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe
from tests.fakes.tokenizers import ASK, CHATML, ONE, TWO, byte_tokenizer, chat, encode, learnt

TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}])
CALL = ToolCall("weather", '{"city": "Oslo"}', "call_1")
WHOLE = (
    "{% if tools %}{{ '<|im_start|>system\n' + (tools|tojson) + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content %}{{ '<think>\n' + m.reasoning_content + '\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' }}"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments}|tojson }}{{ '\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
) + ASK
"""As Qwen's: it knows tools, calls and reasoning, and drops none."""
TALK = Conversation(
    (
        Message("user", "How warm?"),
        Message("assistant", "Let me look.", reasoning="Where?", calls=(CALL,)),
        Message("tool", "21 degrees", name="weather", call_id="call_1"),
        Message("assistant", "It has 21.", reasoning="Good."),
    ),
    3,
    tools=TOOLS,
)
CALLED = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
THOUGHT = ("<think>\nWhere?\n</think>\n\n", "<think>\nGood.\n</think>\n\n")


def all_learnt(row: Conversation, template: str = WHOLE, **options: Any) -> list[str]:
    tokenizer = byte_tokenizer(template)
    examples, _, _ = encode(row, tokenizer, **options)
    return [stretch for example in examples for stretch in learnt(example, tokenizer)]


def test_calls_and_reasoning_are_rendered_and_learnt() -> None:
    tokenizer = byte_tokenizer(WHOLE)
    (example,), report, said = encode(TALK, tokenizer)
    assert said == []
    assert learnt(example, tokenizer) == [
        f"{THOUGHT[0]}Let me look.\n{CALLED}<|im_end|>",
        f"{THOUGHT[1]}It has 21.<|im_end|>",
    ]
    text = tokenizer.decode(example.input_ids)
    assert "<|im_start|>tool\n21 degrees<|im_end|>" in text
    assert text.startswith('<|im_start|>system\n[{"type": "function"')
    assert report.examples == 1


@pytest.mark.parametrize(
    ("learn", "stretches"),
    [
        (("reasoning",), [THOUGHT[0], THOUGHT[1]]),
        (("answer",), ["Let me look.", "It has 21.<|im_end|>"]),
        (("calls",), [f"\n{CALLED}<|im_end|>"]),
        (("answer", "calls"), [f"Let me look.\n{CALLED}<|im_end|>", "It has 21.<|im_end|>"]),
        (("reasoning", "answer"), [f"{THOUGHT[0]}Let me look.", f"{THOUGHT[1]}It has 21.<|im_end|>"]),
        (("reasoning", "calls"), [THOUGHT[0], f"\n{CALLED}<|im_end|>", THOUGHT[1]]),
    ],
)
def test_parts_of_an_answer_are_a_choice(learn: tuple[str, ...], stretches: list[str]) -> None:
    """The stop token belongs to the last part that an answer has."""
    assert all_learnt(TALK, learn=learn) == stretches


def test_reasoning_between_tags_in_the_content_is_reasoning() -> None:
    row = chat(("user", "a"), ("assistant", "<think>\nb\n</think>\n\nc"))
    assert all_learnt(row, CHATML, learn=("answer", "calls")) == ["c<|im_end|>"]
    assert all_learnt(row, CHATML, learn=("reasoning",)) == ["<think>\nb\n</think>\n\n"]


def test_an_answer_whose_parts_cannot_be_told_apart_is_counted() -> None:
    template = CHATML.replace("m.content", "m.content|replace('\n\n', '\n')")
    _, report, said = encode([TWO, ONE], byte_tokenizer(template), learn=("answer",))
    assert (report.mixed, said) == (0, [])
    row = chat(("user", "a"), ("assistant", "b\n\nc"), ("user", "d"), ("assistant", "99"))
    tokenizer = byte_tokenizer(template)
    examples, report, said = encode(row, tokenizer, learn=("answer",))
    assert [learnt(example, tokenizer) for example in examples] == [["99<|im_end|>"]]
    assert report.mixed == 1
    assert any("In 1 answers the parts that data.learn names" in sentence for sentence in said)


def test_the_last_answer_only() -> None:
    assert all_learnt(TWO, CHATML, last_answer_only=True) == ["dd<|im_end|>"]
    assert all_learnt(TALK, last_answer_only=True) == [f"{THOUGHT[1]}It has 21.<|im_end|>"]


def test_answers_that_the_data_excludes_are_read_and_not_learnt() -> None:
    turns = list(TWO.messages)
    turns[2] = replace(turns[2], learnt=False)
    row = Conversation(tuple(turns))
    tokenizer = byte_tokenizer()
    (example,), _, said = encode(row, tokenizer)
    assert learnt(example, tokenizer) == ["dd<|im_end|>"]
    assert "assistant\nbb<|im_end|>" in tokenizer.decode(example.input_ids)
    assert said == []
    none = Conversation(tuple(replace(turn, learnt=False) for turn in turns))
    _, report, said = encode([none, ONE], tokenizer)
    assert (report.dropped, report.refused) == (1, 0)
    assert "no token of an answer is left in them" in said[0]


@pytest.mark.parametrize(
    ("content", "spans", "stretches"),
    [
        ("one two three", ((4, 7),), ["two"]),
        ("one two three", ((0, 3), (8, 13)), ["one", "three<|im_end|>"]),
        ("  one two ", ((2, 5),), ["one"]),
        ("one two", ((0, 4), (4, 7)), ["one two<|im_end|>"]),
        ("one two", (), []),
        ("one two", ((5, 99),), ["wo<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("template", [CHATML, CHATML.replace("m.content", "m.content|trim")])
def test_marked_stretches_alone_are_learnt(
    template: str, content: str, spans: tuple[tuple[int, int], ...], stretches: list[str]
) -> None:
    marked = Message("assistant", content, spans=spans)
    row = Conversation((Message("user", "a"), marked, Message("user", "b"), Message("assistant", "c")))
    assert all_learnt(row, template) == [*stretches, "c<|im_end|>"]


def test_with_every_token_learnt_there_is_one_example() -> None:
    """Also where the template rewrites earlier turns: the user's words would be learnt once for each answer."""
    template = CHATML.replace("m.content", "(m.content if loop.last else m.content|upper)")
    tokenizer = byte_tokenizer(template)
    assert len(encode(TWO, tokenizer)[0]) == 2
    (example,), _, _ = encode(TWO, tokenizer, answers_only=False)
    assert (example.labels == example.input_ids).all()
    assert "assistant\nBB<|im_end|>" in tokenizer.decode(example.input_ids)
    assert tokenizer.decode(example.input_ids).endswith("assistant\ndd<|im_end|>\n")


# What the template is told

TOLD = "{% if shout %}{{ '!' * shout }}{% endif %}" + CHATML


def test_variables_of_the_recipe_and_of_rows_reach_the_template() -> None:
    tokenizer = byte_tokenizer(TOLD)
    set_variables(tokenizer, {"shout": 1})
    rows = [ONE, replace(ONE, template_kwargs='{"shout": 3}'), replace(ONE, template_kwargs='{"shout": 0}')]
    examples, _, _ = encode(rows, tokenizer)
    shouts = [tokenizer.decode(example.input_ids).partition("<")[0] for example in examples]
    assert shouts == ["!", "!!!", ""]
    prompts = sample_prompts(rows, tokenizer, 3, seq_len=100)
    assert [tokenizer.decode(prompt.input_ids).partition("<")[0] for prompt in prompts] == shouts


def test_variables_are_told_and_those_that_the_template_does_not_know() -> None:
    tokenizer, said = byte_tokenizer(TOLD), list[str]()
    say_variables(tokenizer, said.append)
    assert said == []
    set_variables(tokenizer, {"shout": 2, "whisper": True})
    say_variables(tokenizer, said.append)
    assert said[0].startswith("the chat template is told shout = 2: tell it the same")
    assert said[1] == "data.template_kwargs: the chat template does not know whisper"
    row = replace(ONE, template_kwargs='{"whisper": 3, "shout": 1, "documents": []}', number=9)
    _, report, _ = encode([ONE, row], tokenizer)
    assert (str(report.unseen), report.unseen.first) == ("1 x documents, 1 x variables", 9)


def test_a_run_keeps_its_variables_for_whoever_opens_its_adapter(tmp_path: Path) -> None:
    """Audits, samples and chats of a run load its adapter's tokenizer."""
    paths = RunPaths(tmp_path / "run")
    byte_tokenizer(TOLD).save_pretrained(paths.adapter)
    recipe = Recipe().with_("data.template_kwargs", {"shout": 2})
    paths.recipe.write_text(dump_recipe(recipe))
    tokenizer = load_tokenizer(paths.adapter)
    (text,) = apply_template(tokenizer, [[{"role": "user", "content": "a"}]], tokenize=False)
    assert text.startswith("!!<|im_start|>")
    assert not apply_template(tokenizer, [[{"role": "user", "content": "a"}]], tokenize=False, shout=0)[0].startswith(
        "!"
    )


def test_a_variable_that_is_not_the_rows_to_give_refuses_the_row() -> None:
    bad = replace(ONE, template_kwargs='{"messages": []}', number=4)
    _, report, said = encode([ONE, bad], byte_tokenizer())
    assert report.refused == 1
    assert "row 4: the row's variables for the template may not be called messages" in said[0]


def test_a_prompt_has_the_rows_tools() -> None:
    tokenizer = byte_tokenizer(WHOLE)
    (prompt,) = sample_prompts([TALK], tokenizer, 1, seq_len=4096)
    (example,), _, _ = encode(TALK, tokenizer)
    assert example.input_ids[: len(prompt.input_ids)].tolist() == list(prompt.input_ids)
    assert prompt.expected == "It has 21."


# Calls in the form that the template takes

AS_TEXT = WHOLE.replace("{{ {'name': call.function.name, 'arguments': call.function.arguments}|tojson }}", "{{ call.function.name + ' ' + call.function.arguments }}")  # fmt: skip  # noqa: E501
PRINTED = WHOLE.replace("{{ {'name': call.function.name, 'arguments': call.function.arguments}|tojson }}", "{{ call.function.name }} {{ call.function.arguments }}")  # fmt: skip  # noqa: E501
NO_CONTENT = WHOLE.replace("{{ m.content }}", "{{ m.content if not m.tool_calls }}").replace("m.tool_calls or []", "(m.tool_calls if m.content is not defined or m.content is none else []) or []")  # fmt: skip  # noqa: E501
NINE = "{% for m in messages %}{% for call in m.tool_calls or [] %}{% if call.id|length != 9 %}{{ raise_exception('nine letters') }}{% endif %}{% endfor %}{% endfor %}" + WHOLE  # fmt: skip  # noqa: E501
ASKED = (Message("user", "How warm?"), Message("assistant", "", calls=(CALL,)))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (WHOLE, f"\n{CALLED}"),
        (AS_TEXT, '\n<tool_call>\nweather {"city": "Oslo"}\n</tool_call>'),
        (PRINTED, '\n<tool_call>\nweather {"city": "Oslo"}\n</tool_call>'),
        (NO_CONTENT, f"\n{CALLED}"),
        (NINE, f"\n{CALLED}"),
    ],
)
def test_a_call_is_handed_over_as_the_template_takes_it(template: str, said: str) -> None:
    tokenizer = byte_tokenizer(template)
    examples, report, warned = encode(Conversation(ASKED), tokenizer)
    assert [learnt(example, tokenizer) for example in examples] == [[f"{said}<|im_end|>"]]
    assert (report.refused, report.unseen.rows, warned) == (0, 0, [])


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_handed_over_as_the_template_takes_it(field: str) -> None:
    row = Conversation((Message("user", "a"), Message("assistant", "c", reasoning="b")))
    assert all_learnt(row, WHOLE.replace("reasoning_content", field)) == ["<think>\nb\n</think>\n\nc<|im_end|>"]
    assert all_learnt(row, CHATML) == ["<think>\nb\n</think>\n\nc<|im_end|>"], "a template that knows no reasoning"


def test_what_no_example_shows_of_calls_and_tools_is_counted() -> None:
    tokenizer = byte_tokenizer(CHATML)
    _, report, said = encode([TALK, ONE], tokenizer)
    assert str(report.unseen) == "1 x calls, 1 x tools"
    assert any("1 x calls, 1 x tools (the first: row 3)" in sentence for sentence in said)


def test_an_answer_of_which_nothing_is_written_is_not_learnt() -> None:
    """It would teach the model to stop at once."""
    tokenizer = byte_tokenizer(CHATML)
    row = Conversation((*ASKED, Message("tool", "21"), Message("assistant", "It has 21.")), 8)
    (example,), report, said = encode(row, tokenizer)
    assert learnt(example, tokenizer) == ["It has 21.<|im_end|>"]
    assert report.lost.rows == 1
    assert any("leaves out 1 answers, which are not learnt (the first: row 8)" in sentence for sentence in said)


NO_STOP_AT_ALL = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"  # fmt: skip  # noqa: E501

# Prompts that open reasoning

OPENED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"  # fmt: skip  # noqa: E501


@pytest.mark.parametrize(
    "answer",
    [Message("assistant", "c", reasoning="b"), Message("assistant", "<think>\nb\n</think>\n\nc")],
)
def test_reasoning_is_learnt_behind_the_prompt_that_opens_it(answer: Message) -> None:
    """As R1's distills have it: a finished conversation lacks the reasoning that the model is made to write."""
    tokenizer = byte_tokenizer(OPENED)
    examples, report, said = encode(Conversation((Message("user", "a"), answer) * 2), tokenizer)
    assert [learnt(example, tokenizer) for example in examples] == [["b\n</think>\n\nc<|im_end|>"]] * 2
    for example in examples:
        assert tokenizer.decode(example.input_ids).endswith(
            "<|im_start|>assistant\n<think>\nb\n</think>\n\nc<|im_end|>\n"
        )
    assert (report.moved, report.unseen.rows) == (0, 0)
    assert len(said) == 1 and "rewrites earlier turns" in said[0]


def test_a_second_end_token_behind_the_whole_conversation_is_not_learnt() -> None:
    """As Phi-3.5's template writes it: generation has stopped at the end of the turn."""
    tokenizer = byte_tokenizer(
        CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", eos_token="</s>"
    )
    (example,), report, said = encode(TWO, tokenizer)
    assert learnt(example, tokenizer) == ["bb<|im_end|>", "dd<|im_end|>"]
    assert (report.stop_added, said) == (0, [])


def test_an_end_token_inside_of_an_answer_is_told() -> None:
    """Generation stops there: a server gives the reasoning alone."""
    template = WHOLE.replace("'\n</think>\n\n'", "'<|im_end|>\n<|im_start|>assistant\n'")
    row = Conversation((Message("user", "a"), Message("assistant", "c", reasoning="b")))
    _, report, said = encode(row, byte_tokenizer(template))
    assert report.ended_within == 1
    assert any("In 1 answers the chat template writes <|im_end|> before their end" in sentence for sentence in said)
    _, report, _ = encode(chat(("user", "a"), ("assistant", "say <|im_end|>")), byte_tokenizer())
    assert report.ended_within == 0


def test_reasoning_behind_an_opening_token_whose_closing_one_is_unknown_is_counted() -> None:
    tokenizer = byte_tokenizer(OPENED.replace("<think>", "<|start_thinking|>"))
    row = Conversation((Message("user", "a"), Message("assistant", "<think>\nb\n</think>\n\nc")), 5)
    (example,), report, said = encode(row, tokenizer)
    assert learnt(example, tokenizer) == ["\n\nc<|im_end|>"]
    assert (report.moved, str(report.unseen)) == (1, "1 x reasoning")
    assert len(said) == 2


def test_a_special_token_at_the_end_of_the_answers_own_words_is_no_stop() -> None:
    template = NO_STOP_AT_ALL
    tokenizer = byte_tokenizer(template, eos_token="</s>")
    (example,), report, _ = encode(chat(("user", "a"), ("assistant", "say <|im_end|>")), tokenizer)
    assert learnt(example, tokenizer) == ["say <|im_end|></s>"]
    assert report.stop_added == 1


# What splitting costs


def test_what_splitting_multiplies_is_told() -> None:
    template = CHATML.replace("m.content", "(m.content if loop.last else m.content|upper)")
    tokenizer = byte_tokenizer(template)
    turns = [("user", "question"), ("assistant", "answer")] * 10
    examples, report, said = encode(chat(*turns), tokenizer)
    lengths = [len(example.input_ids) for example in examples]
    assert len(examples) == 10
    assert (report.apart, report.once, report.apart_learnt) == (sum(lengths), max(lengths), report.loss_tokens)
    times = f"{sum(lengths) / max(lengths):.1f} times as many"
    assert f"{sum(lengths)} tokens in place of {max(lengths)} ({times}) for {report.loss_tokens}" in said[0]
    assert said[0].endswith("; with data.last_answer_only = true it is one pass.")


def test_long_rows_are_rendered_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    row_list = [chat(("user", "q" * 100), ("assistant", str(n) * 50), number=n) for n in range(9)]
    whole, report, _ = encode(row_list, tokenizer)
    monkeypatch.setattr("studio.jobs.base.data.rows._MOST_CHARACTERS", 1000)
    few, same, _ = encode(row_list, tokenizer)
    assert [example.input_ids.tolist() for example in few] == [example.input_ids.tolist() for example in whole]
    assert same == report


def test_answers_share_an_example_as_long_as_their_prompts_do() -> None:
    """Qwen's templates drop reasoning when the user speaks again, and keep it while tools are called."""
    template = WHOLE.replace(
        "{% if m.reasoning_content %}",
        "{% set last = namespace(user=0) %}{% for one in messages %}{% if one.role == 'user' %}"
        "{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
        "{% if m.reasoning_content and loop.index0 > last.user %}",
    )
    row = replace(TALK, messages=TALK.messages * 2)
    tokenizer = byte_tokenizer(template)
    examples, report, _ = encode(row, tokenizer)
    assert [len(learnt(example, tokenizer)) for example in examples] == [2, 2]
    # Each alone, as a conversation that ends with it: the same prompts, the same answers.
    encoder = Encoder(tokenizer, Encoding(4096, last_answer_only=True))
    together = {
        (tuple(example.input_ids[: begin]), tuple(example.input_ids[begin:end]))
        for example in examples
        for begin, end in runs(example)
    }  # fmt: skip
    for place in (1, 3, 5, 7):
        (((alone,),), _) = encoder.encode([replace(row, messages=row.messages[: place + 1])])
        ((begin, end),) = runs(alone)
        assert (tuple(alone.input_ids[:begin]), tuple(alone.input_ids[begin:end])) in together
    assert report.split == 1


def runs(example: Any) -> list[tuple[int, int]]:
    places = [place for place, label in enumerate(example.labels) if label >= 0]
    begins = [place for place in places if place - 1 not in places]
    return [
        (begin, next(end for end in range(begin, len(example.labels) + 1) if end not in places)) for begin in begins
    ]
