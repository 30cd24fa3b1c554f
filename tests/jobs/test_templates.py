"""Chat templates of every temper: that rewrite history, mark their answers, refuse rows, or are not there at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jinja2 import TemplateError
from transformers import AutoTokenizer

from studio.core.errors import BadInput, JobFailed
from studio.jobs.base.data import bounded
from studio.jobs.base.data.bounded import apply_template
from studio.jobs.base.data.rows import sample_prompts
from studio.jobs.base.data.template import ensure_template
from tests.fakes.tokenizers import ASK, CHATML, LOOP, MARKED, ONE, TWO, byte_tokenizer, chat, encode, learnt

# Templates that rewrite what they wrote

QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% endfor %}"
) + ASK
HARMONY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}{% endfor %}"
) + ASK
R1 = LOOP + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"


def test_reasoning_that_history_drops_makes_an_example_of_each_answer() -> None:
    tokenizer = byte_tokenizer(QWEN3)
    examples, report, said = encode(TWO, tokenizer)
    assert [learnt(example, tokenizer) for example in examples] == [
        ["<think>\n\n</think>\n\nbb<|im_end|>"],
        ["<think>\n\n</think>\n\ndd<|im_end|>"],
    ]
    assert "assistant\nbb<|im_end|>" in tokenizer.decode(examples[1].input_ids), "as history the answer stands bare"
    assert (report.rows, report.examples, report.split) == (1, 2, 1)
    assert "rewrites earlier turns: in 1 rows" in said[0]


def test_a_last_answer_that_ends_differently_makes_an_example_of_each() -> None:
    tokenizer = byte_tokenizer(HARMONY)
    examples, _, _ = encode(TWO, tokenizer)
    assert [learnt(example, tokenizer) for example in examples] == [["bb<|return|>"], ["dd<|return|>"]]


def test_one_answer_never_needs_splitting() -> None:
    for template in (QWEN3, HARMONY):
        examples, report, said = encode(ONE, byte_tokenizer(template))
        assert (len(examples), report.split, said) == (1, 0, [])


def test_a_generation_prompt_that_opens_reasoning() -> None:
    tokenizer = byte_tokenizer(R1)
    (example,), report, said = encode(ONE, tokenizer)
    assert learnt(example, tokenizer) == ["Because.<|im_end|>"]
    assert report.moved == 1
    assert "leaves out what its generation prompt opens with" in said[0]
    (example,), report, _ = encode(chat(("user", "a"), ("assistant", "<think>\nx</think>b")), tokenizer)
    assert learnt(example, tokenizer) == ["x</think>b<|im_end|>"], "what the prompt opens is not learnt"


@pytest.mark.parametrize(
    ("answer", "opener"),
    [
        ("<tool_call>f()</tool_call>", "<think>\n"),
        ("<answer>4</answer>", "<think>\n"),
        ("<t", "<think>\n"),
        ("[TOOL_CALLS]f()", "[THINK]"),
        ("\n  four", "<think>\n"),
        ("e", "<think>\n"),
    ],
)
def test_an_answer_that_begins_as_the_reasoning_of_the_prompt_does_is_learnt_whole(answer: str, opener: str) -> None:
    tokenizer = byte_tokenizer(R1.replace("<think>\n", opener))
    (example,), report, _ = encode(chat(("user", "a"), ("assistant", answer)), tokenizer)
    assert learnt(example, tokenizer) == [f"{answer}<|im_end|>"]
    assert report.moved == 1


def test_an_answer_that_the_template_does_not_write_is_left_out() -> None:
    template = LOOP.replace("m.content", "(m.content if m.role == 'user' else '')") + R1.removeprefix(LOOP)
    with pytest.raises(JobFailed, match="its answer is not found") as caught:
        encode(chat(("user", "Why?"), ("assistant", "Because.")), byte_tokenizer(template.replace("<|im_end|>", "")))
    assert caught.value.kind == "template_refused"


# Templates that leave something out

TALK = chat(
    ("system", "Be brief."),
    ("user", "How warm?"),
    ("assistant", "<think>\nLook.\n</think>\n\nw()"),
    ("tool", '"21\n°C"'),
    ("system", "Be kind."),
    ("assistant", "Warm, 21."),
    number=5,
)
ANSWER_ALONE = "m.content.split('</think>')[-1]"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (CHATML, ""),
        (CHATML.replace("m.content", "(m.content|tojson if m.role == 'tool' else m.content)"), ""),
        (CHATML.replace("m.content", "m.content|trim|replace('\n\n', '\n')"), ""),
        (CHATML.replace("m.content", "('' if m.role == 'tool' else m.content)"), "1 x tool"),
        (CHATML.replace("m.content", "('' if m.role == 'system' and loop.index > 1 else m.content)"), "1 x system"),
        (CHATML.replace("m.content", ANSWER_ALONE), "1 x reasoning"),
        (QWEN3, "1 x reasoning"),
        (
            MARKED.replace("INSIDE", "'<|im_end|>'").replace("AFTER", "'\n'").replace("m.content", ANSWER_ALONE),
            "1 x reasoning",
        ),
        (CHATML.replace("m.content", "('' if m.role in ('tool', 'system') else m.content)"), "2 x system, 1 x tool"),
    ],
)
def test_what_no_example_shows_is_counted_and_told(template: str, told: str) -> None:
    _, report, said = encode([ONE, TALK], byte_tokenizer(template))
    assert str(report.unseen) == told
    sentence = f"leaves out parts of 1 rows, which the model does not see: {told} (the first: row 5)."
    assert [sentence in one for one in said].count(True) == bool(told)


def test_answers_that_vanish_when_a_row_is_split_are_counted_and_told() -> None:
    refusing = "{% if messages|length == 3 %}{{ raise_exception('no user query') }}{% endif %}"
    row = chat(("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d"), number=4)
    late = chat(("system", "s"), ("user", "a"), ("assistant", "bb"), ("user", "c"), ("assistant", "dd"), number=9)
    tokenizer = byte_tokenizer(refusing + QWEN3)
    examples, report, said = encode([row, late], tokenizer)
    learnt_here = [learnt(example, tokenizer)[0].rpartition("\n")[2] for example in examples]
    assert learnt_here == ["b<|im_end|>", "dd<|im_end|>"]
    assert (report.split, report.refused, report.examples, report.lost.rows) == (0, 0, 2, 2)
    sentence = "In 2 rows the chat template refuses or leaves out 2 answers, which are not learnt (the first: row 4)."
    assert sentence in said


# Templates that mark their answers


@pytest.mark.parametrize(
    ("inside", "after", "stop"),
    [("'<|im_end|>'", "'\n'", "<|im_end|>"), ("''", "'<|im_end|>\n'", "<|im_end|>"), ("''", "'\n'", "</s>")],
)
def test_generation_blocks_are_taken_with_the_stop_token(inside: str, after: str, stop: str) -> None:
    template = MARKED.replace("INSIDE", inside).replace("AFTER", after)
    tokenizer = byte_tokenizer(template, eos_token="</s>")
    examples, _, _ = encode(TWO, tokenizer)
    # A stop that only training writes is not what a later answer is asked behind.
    apart = [[f"bb{stop}"], [f"dd{stop}"]] if stop == "</s>" else [[f"bb{stop}", f"dd{stop}"]]
    assert [learnt(example, tokenizer) for example in examples] == apart


def test_a_generation_block_at_the_very_end_without_stop_token() -> None:
    template = MARKED.replace("INSIDE", "''").replace("AFTER", "''")
    tokenizer = byte_tokenizer(template, eos_token="</s>")
    (example,), _, _ = encode(ONE, tokenizer)
    assert learnt(example, tokenizer) == ["Because.</s>"]


@pytest.mark.parametrize(
    ("inside", "after", "stop"),
    [
        ("'<|im_end|>\n'", "''", "<|im_end|>"),
        ("''", "''", "</s>"),
        ("'\n'", "''", "</s>"),
        ("'\n'", "'<|end|>'", "\n<|end|>"),
    ],
)
def test_a_generation_block_that_ends_in_white_space_teaches_no_header(inside: str, after: str, stop: str) -> None:
    """Such blocks have Qwen's, Gemma's and LFM's templates for training: the next header follows at once."""
    tokenizer = byte_tokenizer(MARKED.replace("INSIDE", inside).replace("AFTER", after), eos_token="</s>")
    examples, _, _ = encode(TWO, tokenizer)
    apart = [[f"bb{stop}"], [f"dd{stop}"]] if stop == "</s>" else [[f"bb{stop}", f"dd{stop}"]]
    assert [learnt(example, tokenizer) for example in examples] == apart
    for example in examples:
        assert tokenizer.decode(example.input_ids).count("</s>") == (stop == "</s>")


def test_a_generation_block_that_holds_the_header_teaches_the_answer_alone() -> None:
    """SmolLM3's template marks the whole turn."""
    block = "{% generation %}{{ '<|im_start|>assistant\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}"
    other = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    template = f"{{% for m in messages %}}{{% if m.role == 'assistant' %}}{block}{{% else %}}{other}{{% endif %}}"
    tokenizer = byte_tokenizer(template + "{% endfor %}" + ASK)
    (example,), _, said = encode(chat(*((m.role, m.content) for m in TWO.messages), ("assistant", "ee")), tokenizer)
    assert learnt(example, tokenizer) == ["bb<|im_end|>", "dd<|im_end|>", "ee<|im_end|>"]
    assert said == []


# Templates that refuse

STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, MARKED.replace("INSIDE", "'<|im_end|>'").replace("AFTER", "'\n'")])
def test_a_system_prompt_that_the_template_refuses_goes_to_the_user(template: str) -> None:
    tokenizer = byte_tokenizer(STRICT + template)
    examples, report, said = encode([ONE, TWO], tokenizer)
    assert "user\nBe brief.\n\na<|im_end|>" in tokenizer.decode(examples[1].input_ids)
    assert learnt(examples[1], tokenizer) == ["bb<|im_end|>", "dd<|im_end|>"]
    assert (report.folded, report.refused) == (1, 0)
    assert "knows no system prompt: in 1 rows" in said[0]
    (prompt,) = sample_prompts([TWO], tokenizer, 1, seq_len=4096)
    assert "Be brief." in tokenizer.decode(prompt.input_ids)


@pytest.mark.parametrize("template", [CHATML, MARKED.replace("INSIDE", "'<|im_end|>'").replace("AFTER", "'\n'")])
def test_refused_rows_are_left_out_counted_and_explained(template: str) -> None:
    tokenizer = byte_tokenizer(ALTERNATING + template)
    bad = chat(("user", "a"), ("user", "b"), ("assistant", "c"), number=7)
    examples, report, said = encode([ONE, bad, ONE], tokenizer)
    assert len(examples) == 2
    assert report.refused == 1
    assert "1 of 3 rows are left out: row 7: " in said[0]
    assert "Roles must alternate" in said[0]
    assert sample_prompts([bad], tokenizer, 1, seq_len=4096) == []


def test_when_every_row_is_refused_the_run_fails() -> None:
    bad = chat(("user", "a"), ("user", "b\x1b[2J"), ("assistant", "c"))
    with pytest.raises(JobFailed, match="refuses every row") as caught:
        encode(bad, byte_tokenizer(ALTERNATING + CHATML))
    assert caught.value.kind == "template_refused"


# Models without a template


@pytest.mark.parametrize(
    ("data_format", "text"),
    [
        (
            "chat",
            "### System:\nBe brief.\n\n### User:\na\n\n### Assistant:\nbb</s>\n\n"
            "### User:\nc\n\n### Assistant:\ndd</s>",
        ),
        (
            "alpaca",
            "Be brief.\n\n### Instruction:\na\n\n### Response:\nbb</s>### Instruction:\nc\n\n### Response:\ndd</s>",
        ),
        ("prompt_completion", "Be brief.\n\na\nbb</s>c\ndd</s>"),
    ],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_plain_templates(data_format: str, text: str, adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>", adds_bos=adds_bos)
    said: list[str] = []
    ensure_template(tokenizer, data_format, said.append)
    (example,), _, warned = encode(TWO, tokenizer)
    assert tokenizer.decode(example.input_ids).strip() == ("<s>" if adds_bos else "") + text
    assert learnt(example, tokenizer) == ["bb</s>", "dd</s>"]
    assert warned == []
    assert "This model has no chat template" in said[0]
    assert "QUESTION" in said[0]


def test_a_prompt_that_ends_in_white_space_gets_no_second_one() -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>")
    ensure_template(tokenizer, "prompt_completion", lambda _: None)
    (example,), _, _ = encode(chat(("user", "Q: a\nA: "), ("assistant", "b")), tokenizer)
    assert tokenizer.decode(example.input_ids) == "Q: a\nA: b</s>"


def test_a_plain_template_survives_saving(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(None, eos_token="</s>")
    ensure_template(tokenizer, "alpaca", lambda _: None)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert list(encode(ONE, again)[0][0].input_ids) == list(encode(ONE, tokenizer)[0][0].input_ids)


def test_an_existing_template_is_left_alone() -> None:
    tokenizer = byte_tokenizer()
    ensure_template(tokenizer, "alpaca", lambda _: pytest.fail("nothing to say"))
    assert tokenizer.chat_template == CHATML


# Templates that never end

TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
FOREVER = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(9) %}{% endfor %}{% endfor %}{% endfor %}"
)


def test_a_template_that_loops_for_ever_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "_SECONDS", 0.3)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(BadInput, match="has not ended after"):
        apply_template(byte_tokenizer(FOREVER), [TURNS], tokenize=False)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0.0
    with pytest.raises(BadInput, match="has not ended after"):
        encode(ONE, byte_tokenizer(FOREVER))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the address space is limited on Linux alone")
@pytest.mark.parametrize(
    "template", ["{{ 'x' * (10 ** 11) }}", "{{ '%99999999999d' % 1 }}", "{{ 'x'|center(10 ** 11) }}"]
)
def test_a_template_that_grows_without_end_is_ended(template: str) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(BadInput, match="2 GiB of memory"):
        apply_template(byte_tokenizer(template), [TURNS], tokenize=False)
    assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_template_that_writes_far_more_than_it_was_given_is_refused() -> None:
    with pytest.raises(BadInput, match=r"makes 9,999,900 characters of a conversation of 15"):
        apply_template(
            byte_tokenizer("{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}"), [TURNS], tokenize=False
        )


@pytest.mark.parametrize(
    "template",
    [
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.nothing.more }}",
    ],
)
def test_a_template_that_fails_by_itself_has_refused(template: str) -> None:
    with pytest.raises(TemplateError):
        apply_template(byte_tokenizer(template), [TURNS], tokenize=False)
    with pytest.raises(JobFailed):
        encode(ONE, byte_tokenizer(template))


_STUCK = """
import sys
from studio.jobs.base.data import bounded
from tests.fakes.tokenizers import byte_tokenizer
bounded._SECONDS = 0.2
turns = [{"role": "user", "content": "a"}]
bounded.apply_template(byte_tokenizer("{{ 9 ** (9 ** 9) }}"), [turns], tokenize=False)
"""


def test_a_computation_that_python_cannot_interrupt_ends_the_process_with_a_reason() -> None:
    from studio.runs.failure import Doing
    from studio.runs.last_words import reason_in

    done = subprocess.run(
        [sys.executable, "-c", _STUCK], capture_output=True, text=True, check=False, timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 1
    found = reason_in(done.stderr.splitlines(), Doing("train", "reading the data"))
    assert found is not None
    assert found.kind == "endless_template"


def test_every_template_of_a_model_is_run_within_limits() -> None:
    """One place calls it; a new one that did so would have no limit."""
    root = Path(bounded.__file__).parents[3]
    callers = [path.name for path in root.rglob("*.py") if "tokenizer.apply_chat_template(" in path.read_text("utf-8")]
    assert callers == ["bounded.py"]
