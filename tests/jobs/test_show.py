"""Data shown as a training will see it: tokens, what is learnt, and what the rows add up to."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from studio.core.recipe import Recipe
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoder, Encoding
from studio.jobs.show.pieces import shown_example, token_texts
from studio.jobs.show.session import Session
from studio.jobs.show.tally import ALIKE, NearRows, Tally, alike, runs_of
from studio.jobs.train.objectives.pairs import encode_pairs
from studio.probe.data import Reading, Row, read_data, row_keys
from studio.probe.held_out import hold_out
from studio.runs.held_out import keep_record
from studio.runs.piped import NotAnswered, event_in, event_line
from studio.runs.show import EVENTS, NoRow, Opened, RowShown, ShownExample, ShowProcess, ShowRequest, Summary
from tests.fakes.runs import CHECKOUT, make_run
from tests.fakes.tiny_model import make_tiny_model
from tests.fakes.tokenizers import (
    CHATML,
    byte_tokenizer,
    chat,
    encode,
    learnt,
    sentencepiece_folder,
)

SYSTEM = {"role": "system", "content": "Be brief."}


def talk(question: str, answer: str) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": [SYSTEM, *turns]}


ROWS = [
    *[talk(f"what is {place} and what comes next", f"it is {place}") for place in range(20)],
    {"messages": [SYSTEM, {"role": "user", "content": "nobody answers"}]},
    talk("long", "x" * 300),
    talk("What is 3 and what comes next", "it is 3"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("show") / "tiny")


@pytest.fixture
def opened(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ShowProcess]]:
    """Opens rows in the real process."""
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    started: list[ShowProcess] = []

    def open_rows(rows: list[dict[str, Any]], **settings: Any) -> ShowProcess:
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        recipe = Recipe().with_("data.path", str(file)).with_("model.base", str(model)).with_("eval.rows", 4)
        for path, value in settings.items():
            recipe = recipe.with_(path.replace("__", "."), value)
        started.append(ShowProcess(ShowRequest(recipe)))
        return started[-1]

    yield open_rows
    for process in started:
        process.close()


LAST: dict[ShowProcess, Summary] = {}


def heard(process: ShowProcess, *kinds: type[Any]) -> Any:
    for event in process.events(until=(*kinds, NotAnswered)):
        if isinstance(event, Summary):
            LAST[process] = event
        if isinstance(event, (*kinds, NotAnswered)):
            return event
    raise AssertionError


def whole(process: ShowProcess) -> Summary:
    while process not in LAST or not LAST[process].whole:
        heard(process, Summary)
    return LAST[process]


def test_rows_are_shown_as_the_model_reads_them(opened: Callable[..., ShowProcess]) -> None:
    process = opened(ROWS, train__seq_len=200)
    found = heard(process, Opened)
    assert (found.rows, found.held_out, found.template) == (22, 4, "own")
    assert found.left_out == {"no_answer": 1}
    assert [finding["row"] for finding in found.findings] == [21]
    process.ask_number(3)
    row = heard(process, RowShown)
    (one,) = row.examples
    assert one.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is 2 and what comes next<|im_end|>\n"
        "<|im_start|>assistant\nit is 2<|im_end|>\n"
    )
    assert [one.text[begin:end] for begin, end in one.trained_text] == ["it is 2<|im_end|>"]
    assert [one.tokens[place] for place in one.special] == ["<|im_start|>", "<|im_end|>"] * 3
    assert one.learnt == 8
    summary = whole(process)
    assert (summary.cut, summary.repeats, summary.pairs[0][:2]) == (1, 1, (23, 4))
    assert summary.left_out == {"no_answer": 1}
    assert summary.steps == -(-18 // Recipe().rows_per_step)
    for number, said in ((21, "no assistant turn"), (24, "rows 1 to 23"), (0, "rows 1 to 23")):
        process.ask_number(number)
        assert said in heard(process, NoRow).message
    for only, place, wanted in (("cut", 0, 22), ("repeats", 0, 23)):
        process.ask_next(place, 1, only)
        assert heard(process, RowShown).number == wanted
    process.ask_next(5, 1, "cut", "nowhere")
    assert heard(process, NoRow).message == "No later row that is cut that says 'nowhere'."
    process.ask_next(21, -1, "all", "IS 7 AND")
    assert heard(process, RowShown).number == 8
    held, place = [], -1
    while isinstance(shown := _next(process, place, "held out"), RowShown):
        held.append(shown.held_out)
        place = shown.place
    assert held == [True] * 4
    process.cut_at(40, 5)
    again = heard(process, Summary)
    assert again.cut == 22
    process.cut_at(200, 5)
    assert heard(process, Summary).steps == 4
    process.cut_at(40, 5)
    heard(process, Summary)
    assert again.left_out == {"no_answer": 1, "nothing_to_learn": 22}
    process.ask_number(1)
    row = heard(process, RowShown)
    assert (row.left_out, row.examples[0].kept) == ("nothing_to_learn", 40)


def _next(process: ShowProcess, place: int, only: Any) -> Any:
    process.ask_next(place, 1, only)
    return heard(process, RowShown, NoRow)


def test_the_process_loads_no_torch_and_ends_with_its_parent(opened: Callable[..., ShowProcess]) -> None:
    code = (
        "import sys; from studio.jobs.base.torchless import hide_torch as hide; hide();"
        "import studio.jobs.show.session; print([name for name in sys.modules if name.startswith('torch.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    assert done.stdout == "[]\n"
    process = opened(ROWS)
    heard(process, Opened)
    process.close()
    assert process._process.wait(10) is not None


def test_a_process_that_is_killed_says_so(opened: Callable[..., ShowProcess]) -> None:
    process = opened(ROWS)
    heard(process, Opened)
    os.kill(process._process.pid, 9)
    failed = heard(process)
    assert failed.fatal
    assert "look at the data's process has ended" in failed.message
    process.ask_place(0)  # harmless


@pytest.mark.slow
@pytest.mark.parametrize(
    ("row", "template", "texts"),
    [
        ({"text": "all of it"}, "none", ["all of it<|im_end|>"]),
        ({"prompt": "a", "completion": "b"}, "own", ["b<|im_end|>"]),
    ],
)
def test_other_formats(
    opened: Callable[..., ShowProcess], row: dict[str, Any], template: str, texts: list[str]
) -> None:
    process = opened([row] * 3, eval__rows=0, eval__samples=0)
    assert heard(process, Opened).template == template
    process.ask_place(0)
    (one,) = heard(process, RowShown).examples
    assert [one.text[begin:end] for begin, end in one.trained_text] == texts


def test_a_file_that_cannot_be_read_and_a_model_that_is_not_there(opened: Callable[..., ShowProcess]) -> None:
    failed = heard(opened(ROWS, data__path="/nowhere/rows.jsonl"))
    assert (failed.bad_input, "does not exist" in failed.message) == (True, True)
    failed = heard(opened(ROWS, model__base="/nowhere/model"))
    assert (failed.bad_input, "no model folder" in failed.message) == (True, True)


def test_a_row_that_the_template_refuses_says_why(opened: Callable[..., ShowProcess], model: Path) -> None:
    refuses = "{% if messages[1].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + CHATML
    template = model / "chat_template.jinja"
    before = template.read_text()
    template.write_text(refuses)
    try:
        process = opened([talk("a", "b"), talk("no", "b"), talk("c", "d")], eval__rows=0, eval__samples=0)
        heard(process, Opened)
        process.ask_number(2)
        row = heard(process, RowShown)
        assert (row.examples, row.left_out, row.why) == ((), "refused_by_template", "not this")
        assert whole(process).left_out == {"refused_by_template": 1}
        process.ask_next(0, 1, "left out")
        assert heard(process, RowShown).number == 2
    finally:
        template.write_text(before)


def test_events_pass_the_pipe() -> None:
    example = ShownExample("1 of 2", (1, 2), ("a", "b"), ((0, 1),), (1,), 2, 2)
    for event in (RowShown(1, 2, 3, examples=(example,)), Summary(pairs=((1, 2, 0.5),)), NoRow("no")):
        assert event_in(event_line(event), EVENTS) == event


TEXTS = st.text(st.characters(codec="utf-8"), max_size=40)


@given(TEXTS)
def test_the_pieces_of_bytes_are_the_text(text: str) -> None:
    tokenizer = BYTES
    ids = tokenizer(text).input_ids
    pieces = token_texts(ids, tokenizer)
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tokenizer.decode(ids)


BYTES = byte_tokenizer()


def test_pieces_keep_the_space_before_a_word(tmp_path: Path) -> None:
    folder = sentencepiece_folder(tmp_path, CHATML, kind="LlamaTokenizer", special=["<|im_end|>"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("What a model is é 漢 in memory", add_special_tokens=False).input_ids
    pieces = token_texts(ids, tokenizer)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "".join(pieces).count(" model") == 1


@given(
    st.lists(st.tuples(TEXTS.filter(str.strip), TEXTS.filter(str.strip)), min_size=1, max_size=6), st.integers(8, 90)
)
def test_any_row_length_adds_up_as_encoding_does(pairs: list[tuple[str, str]], seq_len: int) -> None:
    rows: list[Row] = [chat(("user", one), ("assistant", other), number=at) for at, (one, other) in enumerate(pairs, 1)]
    made, report = Encoder(BYTES, Encoding(2**31 - 1)).encode(rows)
    tally = Tally(rows.__getitem__, lambda place: False, {}, rows=len(rows), rows_per_step=2, both_sides=False)
    tally.add(rows, made, report)
    summary = tally.summary(seq_len, "")
    _, wanted = Encoder(BYTES, Encoding(seq_len)).encode(rows)
    assert (summary.examples, summary.tokens, summary.loss_tokens) == (
        wanted.examples,
        wanted.tokens,
        wanted.loss_tokens,
    )
    assert (summary.cut, summary.left_out.get("nothing_to_learn", 0)) == (wanted.cut, wanted.dropped)
    assert sum(summary.counts) == summary.made
    assert sum(many for low, many in zip(summary.edges, summary.counts, strict=False) if low > seq_len) == wanted.cut
    shown = [shown_example(one, BYTES, part="", seq_len=seq_len) for parts in made for one in parts]
    assert sum(one.learnt for one in shown) == wanted.loss_tokens


def test_what_is_shown_as_learnt_is_what_is_labelled() -> None:
    row = chat(("user", "a"), ("assistant", "bb é"), ("user", "c"), ("assistant", "漢"))
    (example,), _, _ = encode(row, BYTES)
    shown = shown_example(example, BYTES, part="", seq_len=4096)
    assert [shown.text[begin:end] for begin, end in shown.trained_text] == learnt(example, BYTES)
    labelled = [place for begin, end in shown.trained for place in range(begin, end)]
    assert labelled == [place for place, label in enumerate(example.labels) if label != IGNORED]


def test_near_duplicates_are_those_of_brute_force() -> None:
    draw = random.Random(4)  # noqa: S311  no secret
    words = [f"word{number}" for number in range(400)]
    texts: list[str] = []
    for _ in range(400):
        if texts and draw.random() < 0.4:
            near = draw.choice(texts).split()
            for _ in range(draw.randrange(4)):
                near[draw.randrange(len(near))] = draw.choice(words)
            texts.append(" ".join(near))
        else:
            texts.append(" ".join(draw.choices(words, k=draw.randrange(15, 60))))
    runs = [runs_of(text) for text in texts]
    wanted = {at for at in range(len(texts)) if any(alike(runs[at], runs[other]) >= ALIKE for other in range(at))}
    rows = NearRows(texts.__getitem__)
    found = {at: near for at in range(len(texts)) if (near := rows.add(at))}
    assert len(wanted) > 60
    assert set(found) <= wanted, "what is found is compared exactly"
    assert len(wanted - set(found)) <= len(wanted) // 100
    for at, (other, share) in found.items():
        assert other < at
        assert share == alike(runs[at], runs[other]) >= ALIKE


def test_a_row_without_words_is_near_to_none() -> None:
    rows = NearRows(["", "  ", "one two three four", "one two three four!"].__getitem__)
    assert [rows.add(place) for place in range(3)] == [None] * 3


def session_of(model: Path, file: Path, rows: list[dict[str, Any]], **settings: Any) -> tuple[Session, Recipe]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe().with_("data.path", str(file)).with_("model.base", str(model))
    for path, value in {"eval__rows": 0, "eval__samples": 0, **settings}.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    return Session(ShowRequest(recipe), lambda detail, fraction: None), recipe


def pair(asked: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": asked, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize("seq_len", [50, 4096])
def test_pairs_show_both_sides_and_add_up_as_their_training_does(model: Path, tmp_path: Path, seq_len: int) -> None:
    rows = [pair(f"what is {place}", f"it is {place}", "x" * place * 4) for place in range(1, 9)]
    session, recipe = session_of(
        model, tmp_path / "pairs.jsonl", rows, train__objective="dpo", train__seq_len=seq_len, data__format="auto"
    )
    session.add_up()
    summary = session.tally.summary(seq_len, "")
    left: Counter[str] = Counter()
    rows_read = read_data(Path(recipe.data.path), Reading.of(recipe)).rows
    made = encode_pairs(rows_read, session.tokenizer, Encoding.of(recipe), warn=lambda text: None, left_out=left)
    assert summary.left_out == +left
    assert summary.examples == 2 * len(made)
    assert summary.train_tokens == sum(len(side.input_ids) for one in made for side in one.sides)
    assert summary.steps == -(-len(made) // min(len(made), recipe.rows_per_step))
    row = session.row(0)
    assert isinstance(row, RowShown)
    assert [one.part for one in row.examples] == ["chosen", "rejected"]
    texts = [[one.text[begin:end] for begin, end in one.trained_text] for one in row.examples]
    assert texts == [["it is 1<|im_end|>"], ["xxxx<|im_end|>"]]


def test_pairs_are_shown_as_pairs_where_nothing_else_is_asked_for(model: Path, tmp_path: Path) -> None:
    """But for a file that holds other rows too: nothing learns from both."""
    rows: list[dict[str, Any]] = [pair(f"what is {place}", f"it is {place}", "no") for place in range(4)]
    _, recipe = session_of(model, tmp_path / "pairs.jsonl", rows)

    def opened(*, pairs: bool) -> Opened:
        return Session(ShowRequest(recipe, pairs=pairs), lambda detail, fraction: None).opened

    assert (opened(pairs=False).rows, opened(pairs=True).rows) == (0, 4)
    session_of(model, tmp_path / "pairs.jsonl", [*rows, talk("what", "it")])
    assert [one["kind"] for one in opened(pairs=True).findings if one["fatal"]] == ["preference_pair"] * 4


def test_texts_in_blocks_are_shown_as_blocks_of_the_row_length(model: Path, tmp_path: Path) -> None:
    session, recipe = session_of(model, tmp_path / "t.jsonl", [{"text": "abcdefgh" * 20}] * 2, train__seq_len=64)
    session.add_up()
    summary = session.tally.summary(64, "")
    rows = read_data(Path(recipe.data.path), Reading.of(recipe)).rows
    _, wanted = Encoder(session.tokenizer, Encoding.of(recipe)).encode(rows)
    assert (summary.examples, summary.tokens, summary.loss_tokens) == (
        wanted.examples,
        wanted.tokens,
        wanted.loss_tokens,
    )
    assert summary.cut == 0
    row = session.row(0)
    assert isinstance(row, RowShown)
    assert [one.part for one in row.examples] == ["1 of 3", "2 of 3", "3 of 3"]
    session.cut_at(1024, 8)
    session.add_up()
    assert session.tally.summary(1024, "").examples == 2


def test_a_run_shows_the_rows_that_it_held_out_itself(model: Path, tmp_path: Path) -> None:
    rows = [talk(f"what is {place}", f"it is {place}") for place in range(20)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe().with_("data.path", str(file)).with_("model.base", str(model)).with_("eval.rows", 3)
    data = read_data(file)
    kept = hold_out(recipe.with_("train.seed", 99), data, None).record
    paths = make_run(tmp_path, "mine", recipe)
    keep_record(paths, kept)

    def held(request: ShowRequest) -> set[str]:
        session = Session(request, lambda detail, fraction: None)
        shown = [session.row(place) for place in range(session.opened.rows)]
        return {one.examples[0].text for one in shown if isinstance(one, RowShown) and one.held_out}

    own, others = held(ShowRequest(recipe, str(paths.root))), held(ShowRequest(recipe))
    numbers = {row.number for row in data.rows if row_keys(row).content.hex() in kept.held_out}
    assert own != others
    assert len(own) == len(numbers) == 3
    assert all(any(f"what is {number - 1}<|im_end|>" in text for text in own) for number in numbers)


def test_a_model_without_a_template_is_shown_the_plain_one_and_says_so(model: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(model, base)
    (base / "chat_template.jinja").unlink()
    session, _ = session_of(base, tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 2)
    assert session.opened.template == "plain"
    assert any("has no chat template" in note for note in session.opened.notes)
    row = session.row(0)
    assert isinstance(row, RowShown)
    assert row.examples[0].text == "a\nb<|im_end|>"


def test_a_template_that_the_recipe_names_is_shown(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<|im_end|>{% endfor %}")
    rows = [{"prompt": "a", "completion": "b"}] * 2
    session, _ = session_of(model, tmp_path / "rows.jsonl", rows, data__template=str(template))
    row = session.row(0)
    assert isinstance(row, RowShown)
    assert row.examples[0].text == "<user>a<|im_end|><assistant>b<|im_end|>"
