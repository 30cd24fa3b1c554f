"""Rows made into ids and labels: what is learnt is each answer and the stop token after it."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from studio.core.errors import JobFailed
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoder, Encoding, sample_prompts
from studio.probe.data import Message, PlainText, Preference, read_data
from studio.probe.embedded_model import find_embedded
from tests.examples import examples
from tests.fakes.tokenizers import (
    ASK,
    CHATML,
    LOOP,
    MARKED,
    ONE,
    TWO,
    byte_tokenizer,
    chat,
    encode,
    learnt,
    metaspace_tokenizer,
)

# The model that ships with us


@pytest.fixture(scope="module")
def smollm() -> Any:
    gguf = find_embedded().gguf
    return AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)


@pytest.mark.slow
def test_the_embedded_model_learns_the_answer_and_its_stop_token(smollm: Any) -> None:
    assert smollm.pad_token_id == smollm.eos_token_id, "the case that masks the stop token elsewhere"
    (example,), report, said = encode(ONE, smollm)
    assert learnt(example, smollm) == ["Because.<|im_end|>"]
    assert said == []
    assert smollm.decode(example.input_ids).endswith("<|im_start|>assistant\nBecause.<|im_end|>\n")
    assert report.loss_tokens == 3
    assert example.input_ids.dtype == example.labels.dtype == np.int32


@pytest.mark.slow
def test_every_shipped_row_is_learnt_whole_and_asked_as_it_is_trained(smollm: Any) -> None:
    rows = read_data(Path("embedded")).rows
    examples, report, said = encode(list(rows), smollm, seq_len=256)
    assert said == []
    assert (report.rows, report.examples, report.cut, report.dropped) == (len(rows), len(rows), 0, 0)
    prompts = sample_prompts(rows, smollm, len(rows), seq_len=256)
    for row, example, prompt in zip(rows, examples, prompts, strict=True):
        assert learnt(example, smollm) == [f"{row.answer}<|im_end|>"]
        first = int(np.flatnonzero(example.labels != IGNORED)[0])
        assert tuple(example.input_ids[:first]) == prompt.input_ids
        assert (prompt.text, prompt.expected) == (row.prompt, row.answer)
    assert report.tokens == sum(len(example.input_ids) for example in examples)


# Many turns


def test_every_answer_of_a_conversation_is_learnt() -> None:
    tokenizer = byte_tokenizer()
    (example,), report, _ = encode(TWO, tokenizer)
    assert learnt(example, tokenizer) == ["bb<|im_end|>", "dd<|im_end|>"]
    assert report.loss_tokens == 6


def test_answers_in_a_row_and_an_answer_first() -> None:
    tokenizer = byte_tokenizer()
    rows = [chat(("assistant", "hi"), ("user", "a"), ("assistant", "b"), ("assistant", "c"))]
    (example,), _, _ = encode(rows, tokenizer)
    assert learnt(example, tokenizer) == ["hi<|im_end|>", "b<|im_end|>", "c<|im_end|>"]


def test_an_answer_first_is_found_behind_a_default_system_prompt(smollm: Any) -> None:
    (example,), _, _ = encode(chat(("assistant", "You are here")), smollm)
    assert learnt(example, smollm) == ["You are here<|im_end|>"]


def test_all_tokens_are_learnt_when_asked_for() -> None:
    tokenizer = byte_tokenizer()
    (example,), _, _ = encode(TWO, tokenizer, answers_only=False)
    assert (example.labels == example.input_ids).all()


# Stop tokens


@pytest.mark.parametrize("pad", ["<|im_end|>", "</s>", None])
def test_the_stop_token_is_learnt_whatever_the_pad_token_is(pad: str | None) -> None:
    tokenizer = byte_tokenizer(pad_token=pad)
    (example,), _, _ = encode(ONE, tokenizer)
    assert learnt(example, tokenizer) == ["Because.<|im_end|>"]


def test_a_turn_end_that_is_not_the_end_token_is_learnt_as_it_stands() -> None:
    tokenizer = byte_tokenizer(eos_token="</s>", pad_token="</s>")
    (example,), _, said = encode(TWO, tokenizer)
    assert learnt(example, tokenizer) == ["bb<|im_end|>", "dd<|im_end|>"]
    assert said == []


NO_STOP = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)


def test_a_template_without_stop_tokens_gets_them_and_it_is_said_once() -> None:
    tokenizer = byte_tokenizer(NO_STOP, eos_token="</s>")
    examples, report, said = encode([TWO, ONE], tokenizer)
    assert [learnt(example, tokenizer) for example in examples] == [["bb</s>"], ["dd</s>"], ["Because.</s>"]]
    served = "### system: Be brief.\n\n### user: a\n\n### assistant: bb\n\n### user: c\n\n### assistant: "
    assert tokenizer.decode(examples[1].input_ids).rstrip() == f"{served}dd</s>", "no stop where the template has none"
    assert report.stop_added == 2
    assert len(said) == 2
    assert "in 1 rows" in said[0]
    assert "without a stop token: </s> was added in 2 rows" in said[1]


def test_without_any_end_token_the_rows_are_learnt_and_it_is_said() -> None:
    tokenizer = byte_tokenizer(NO_STOP, eos_token=None, pad_token=None)
    (example,), _, said = encode(ONE, tokenizer)
    assert learnt(example, tokenizer) == ["Because."]
    assert "has no end token: 1 rows" in said[0]


def test_text_between_answer_and_stop_token_is_learnt_too() -> None:
    template = LOOP.replace("<|im_end|>\n", "\n<|end|>\n") + ASK
    tokenizer = byte_tokenizer(template)
    (example,), _, said = encode(ONE, tokenizer)
    assert learnt(example, tokenizer) == ["Because.\n<|end|>"]
    assert said == []


# Start tokens


def test_one_start_token_where_both_template_and_tokenizer_write_one() -> None:
    tokenizer = byte_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True)
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    (example,), _, _ = encode(ONE, tokenizer)
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1
    (prompt,) = sample_prompts([ONE], tokenizer, 1, seq_len=4096)
    assert prompt.input_ids.count(tokenizer.bos_token_id) == 1


def test_llama2_style_where_the_space_belongs_to_the_answers_first_token() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = metaspace_tokenizer(template)
    (example,), _, said = encode(ONE, tokenizer)
    assert said == []
    tokens = tokenizer.convert_ids_to_tokens([int(i) for i in example.labels if i != IGNORED])
    assert tokens[0] == "▁Because"
    assert tokens[-1] == "</s>"
    assert list(example.input_ids).count(tokenizer.bos_token_id) == 1


# Length


def test_long_rows_lose_their_end_and_are_counted() -> None:
    tokenizer = byte_tokenizer()
    whole = len(encode(ONE, tokenizer)[0][0].input_ids)
    (example,), report, said = encode(ONE, tokenizer, seq_len=whole - 3)
    assert learnt(example, tokenizer) == ["Because"], "stop token and full stop are cut away"
    assert (report.cut, report.longest, report.tokens) == (1, whole, whole - 3)
    assert example.input_ids.base is None, "no view that keeps the long row alive"
    assert f"longer than train.seq_len = {whole - 3} tokens" in said[0]


def test_rows_whose_answer_is_cut_away_are_dropped() -> None:
    tokenizer = byte_tokenizer()
    long = chat(("user", "x" * 500), ("assistant", "b"))
    examples, report, said = encode([ONE, long], tokenizer, seq_len=100)
    assert len(examples) == 1
    assert (report.cut, report.dropped) == (1, 1)
    assert "no token of an answer is left" in said[1]


def test_when_nothing_is_left_to_learn_the_run_fails_with_advice() -> None:
    long = chat(("user", "x" * 500), ("assistant", "b"))
    with pytest.raises(JobFailed) as caught:
        encode([long] * 3, byte_tokenizer(), seq_len=100)
    assert caught.value.kind == "all_labels_masked"
    assert "3 of 3 are cut at train.seq_len = 100" in str(caught.value)
    assert "Raise train.seq_len towards 5" in caught.value.advice


# Plain text


@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_text_is_learnt_from_start_to_end_token(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>", adds_bos=adds_bos)
    examples, _, said = encode([PlainText("Once."), PlainText("Twice.</s>")], tokenizer)
    start = "<s>" if adds_bos else ""
    assert [tokenizer.decode(e.input_ids) for e in examples] == [f"{start}Once.</s>", f"{start}Twice.</s>"]
    assert all((e.labels == e.input_ids).all() for e in examples)
    assert said == []


@pytest.mark.parametrize("adds_bos", [False, True])
def test_rendered_text_that_begins_with_the_start_token_gets_no_second_one(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>", adds_bos=adds_bos)
    text = PlainText("<s>[INST] Why? [/INST] Because.")
    (example,), _, _ = encode(text, tokenizer)
    assert tokenizer.decode(example.input_ids) == text.text + "</s>"
    (prompt,) = sample_prompts([text], tokenizer, 1, seq_len=100)
    assert tokenizer.decode(prompt.input_ids) == prompt.text


def test_plain_text_prompts_are_the_first_half() -> None:
    tokenizer = byte_tokenizer(None)
    (prompt,) = sample_prompts([PlainText("Once upon a time.")], tokenizer, 3, seq_len=100)
    assert (prompt.text, prompt.expected) == ("Once upo", "n a time.")


# Whatever people write

TEMPLATES: list[Callable[[], Any]] = [
    byte_tokenizer,
    lambda: byte_tokenizer("{{ bos_token }}" + CHATML, adds_bos=True),
    lambda: byte_tokenizer(MARKED.replace("INSIDE", "'<|im_end|>'").replace("AFTER", "'\n'")),
]
ANYTHING = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=30).filter(lambda text: text.strip())


@pytest.mark.parametrize("make", TEMPLATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(40))
@given(question=ANYTHING, answer=ANYTHING)
def test_any_answer_is_learnt_exactly_and_asked_for_as_trained(
    make: Callable[[], Any], question: str, answer: str
) -> None:
    tokenizer = make()
    row = chat(("user", question), ("assistant", answer))
    (example,), _, said = encode(row, tokenizer)
    assert learnt(example, tokenizer) == [f"{answer}<|im_end|>"]
    (prompt,) = sample_prompts([row], tokenizer, 1, seq_len=4096)
    first = int(np.flatnonzero(example.labels != IGNORED)[0])
    assert tuple(example.input_ids[:first]) == prompt.input_ids
    assert said == []


def test_progress_and_order() -> None:
    tokenizer = byte_tokenizer()
    rows = [chat(("user", "q"), ("assistant", str(n))) for n in range(600)]
    told: list[float] = []
    examples, _, _ = encode(rows, tokenizer, progress=told.append)
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert [learnt(e, tokenizer) for e in examples] == [[f"{n}<|im_end|>"] for n in range(600)]


def test_a_tokenizer_without_offsets_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(JobFailed, match="cannot say where its tokens stand") as caught:
        encode(ONE, Slow())
    assert caught.value.kind == "slow_tokenizer"


def test_prompts_longer_than_the_limit_are_passed_over() -> None:
    tokenizer = byte_tokenizer()
    rows = [chat(("user", "x" * 200), ("assistant", "a")), ONE]
    assert [prompt.expected for prompt in sample_prompts(rows, tokenizer, 5, seq_len=100)] == ["Because."]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(100))
@given(question=ANYTHING, answer=ANYTHING)
def test_any_answer_is_learnt_by_the_embedded_model(smollm: Any, question: str, answer: str) -> None:
    # White space joins the template's new line in one token, which belongs to the question.
    assume(not answer[0].isspace())
    assume(smollm.decode(smollm(answer).input_ids) == answer)  # its vocabulary lacks some control characters
    (example,), _, said = encode(chat(("user", question), ("assistant", answer)), smollm)
    assert learnt(example, smollm) == [f"{answer}<|im_end|>"]
    assert said == []


def test_special_tokens_in_what_people_write_move_no_boundary() -> None:
    tokenizer = byte_tokenizer()
    row = chat(("user", "a<|im_end|>\n<|im_start|>assistant\nno"), ("assistant", "yes"))
    (example,), report, said = encode(row, tokenizer)
    assert learnt(example, tokenizer) == ["yes<|im_end|>"]
    assert report.special == 1
    assert "the text itself holds special tokens such as <|im_end|>" in said[0]


def test_no_token_reaches_from_the_question_into_the_answer(smollm: Any) -> None:
    """A model that is asked never starts inside a token, so what it is asked with is tokenised by itself."""
    row = chat(("user", "Why?"), ("assistant", "  Because."), ("user", "So?"), ("assistant", "\n\nYes."))
    examples, report, _ = encode(row, smollm)
    assert "\n " in [smollm.decode([token]) for token in smollm("assistant\n  Because.").input_ids], "they would join"
    assert [learnt(example, smollm) for example in examples] == [["  Because.<|im_end|>"], ["\n\nYes.<|im_end|>"]]
    for example, place in zip(examples, (1, 3), strict=True):
        asked = [{"role": turn.role, "content": turn.content} for turn in row.messages[:place]]
        served = smollm.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        first = int(np.flatnonzero(example.labels != IGNORED)[0])
        assert example.input_ids[:first].tolist() == served
    assert report.joined == 0


def test_chunks_are_encoded_one_by_one_and_their_reports_added_up() -> None:
    tokenizer = byte_tokenizer()
    rows = [ONE, chat(("user", "x" * 500), ("assistant", "b"), number=2), PlainText("Once."), TWO]
    whole, report, _ = encode(rows, tokenizer, seq_len=100)
    encoder = pickle.loads(pickle.dumps(Encoder(tokenizer, Encoding(100))))  # noqa: S301  our own
    (first, one), (second, two) = encoder.encode(rows[:2]), encoder.encode(rows[2:])
    assert [len(of_row) for of_row in first + second] == [1, 0, 1, 1]
    made = [example for of_row in first + second for example in of_row]
    for example, same in zip(whole, made, strict=True):
        assert example.input_ids.tolist() == same.input_ids.tolist()
        assert example.labels.tolist() == same.labels.tolist()
    one.add(two)
    assert one == report and report.dropped == 1


def test_sides_of_a_preference_are_encoded_as_conversations() -> None:
    tokenizer = byte_tokenizer()
    row = Preference((Message("user", "a"),), (Message("assistant", "good"),), (Message("assistant", "bad"),))
    (((chosen,), (rejected,)),), report = Encoder(tokenizer, Encoding(100)).sides([row])
    assert [learnt(side, tokenizer) for side in (chosen, rejected)] == [["good<|im_end|>"], ["bad<|im_end|>"]]
    assert report.examples == 2
