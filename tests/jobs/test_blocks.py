"""Plain texts as blocks: every token is learnt exactly once, in its place, however the text is cut."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from studio.core.events import Warned
from studio.core.recipe import Recipe
from studio.jobs.audit.rows import read_audit_rows
from studio.jobs.base.data.blocks import start_of
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.tokenizer import load_tokenizer
from studio.probe.audit import audit_of_run, rows_to_measure
from studio.probe.data import PlainText
from studio.probe.data.documents import SECTION, last_part, sections, split_documents
from studio.probe.embedded_model import find_embedded
from studio.probe.resume import check_resume
from studio.runs.held_out import read_record
from studio.runs.log import read_events
from studio.runs.requests import AuditRequest
from tests.fakes.tokenizers import byte_tokenizer, chat, metaspace_tokenizer, qwen_folder, sentencepiece_folder
from tests.jobs.conftest import Train, history_of

GGUF = find_embedded().gguf
TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": byte_tokenizer,
    "bytes with a start token": lambda: byte_tokenizer(adds_bos=True),
    "words": lambda: metaspace_tokenizer(""),
    "qwen": lambda: load_tokenizer(qwen_folder(Path(mkdtemp()), ["<|im_end|>"], eos_token="<|im_end|>")),
    "llama": lambda: load_tokenizer(sentencepiece_folder(Path(mkdtemp()), "", kind="LlamaTokenizer", special=[])),
    "gemma": lambda: load_tokenizer(sentencepiece_folder(Path(mkdtemp()), "", kind="GemmaTokenizer", special=[])),
    "smollm": lambda: AutoTokenizer.from_pretrained(str(GGUF.parent), gguf_file=GGUF.name),
}


@cache
def tokenizer_of(name: str) -> Any:
    return TOKENIZERS[name]()


WORDS = st.sampled_from(
    (" ", "\n", "\n\n", "\t", " the", "training", " of", "3.14", "e\u0301", "日本語", "🙂", "def f():\n  return",
     "a" * 40, "...", "_", "<|im_end|>", "\r\n", "\u00a0")
)  # fmt: skip
TEXTS = st.lists(WORDS, min_size=1, max_size=120).map("".join).filter(str.strip)


def made(text: str, tokenizer: Any, most: int, **how: Any) -> list[Example]:
    rows = list(sections(PlainText(text, 1), most=most, context=64))
    assert "".join(row.text for row in rows) == text
    examples, _ = Encoder(tokenizer, Encoding(**how)).encode(rows)
    return [example for of_row in examples for example in of_row]


@pytest.mark.parametrize("name", [*list(TOKENIZERS)[:-1], pytest.param("smollm", marks=pytest.mark.slow)])
@given(text=TEXTS, most=st.sampled_from((150, 400, 10**6)), seq_len=st.integers(8, 40), stride=st.integers(0, 4),
       ends=st.booleans())  # fmt: skip
@example(text="one\n\n\ntwo " * 60, most=150, seq_len=8, stride=4, ends=True)
@settings(deadline=None, max_examples=25)
def test_every_token_is_learnt_once(name: str, text: str, most: int, seq_len: int, stride: int, ends: bool) -> None:
    tokenizer = tokenizer_of(name)
    start, eos = start_of(tokenizer), tokenizer.eos_token_id
    whole = tokenizer(text, add_special_tokens=False).input_ids
    wanted = whole + ([eos] if ends and eos is not None and whole[-1:] != [eos] else [])
    found: list[int] = []
    for place, one in enumerate(made(text, tokenizer, most, seq_len=seq_len, stride=stride, document_ends=ends)):
        ids, labels = one.input_ids.tolist(), one.labels.tolist()
        assert len(ids) <= seq_len and ids[: len(start)] == start
        own = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
        assert own == [label for label in labels if label != IGNORED]
        if place == 0:
            assert own == ids  # nothing comes before it: only its first token cannot be predicted
            own = own[len(start) :]
        else:
            context = ids[len(start) : len(ids) - len(own)]
            assert min(max(1, stride), len(found)) == len(context) and context == found[-len(context) :]
        found += own
    if len(wanted) > 1 or start:
        assert found == wanted


@pytest.mark.slow
def test_blocks_are_full_but_for_the_last(tmp_path: Path) -> None:
    lengths = [len(one.input_ids) for one in made("a b " * 500, tokenizer_of("smollm"), 10**6, seq_len=64, stride=8)]
    assert len(lengths) > 10 and set(lengths[:-1]) == {64}


def test_a_stride_for_longer_rows_does_not_make_a_block_of_every_token() -> None:
    """An audit may have shorter rows than the training: each block still brings half of its length."""
    text, tokenizer = "a b " * 500, byte_tokenizer(adds_bos=True)
    assert len(made(text, tokenizer, 10**6, seq_len=64, stride=512)) <= len(text) // 31 + 1
    # Where the start leaves room for one token, a text still comes to its end.
    assert made(text, tokenizer, 10**6, seq_len=2, stride=512)


def test_without_blocks_a_text_is_cut_and_that_is_said() -> None:
    said: list[str] = []
    rows = list(sections(PlainText("abcdefgh" * 40, 1), most=100))
    examples, report = encode_rows(rows, byte_tokenizer(), seq_len=16, blocks=False, warn=said.append)
    assert (
        [bytes(one.input_ids.tolist()) for one in examples] and len(examples) == 1 and len(examples[0].input_ids) == 16
    )
    assert report.cut == 1 and any("lose their end" in line for line in said)


def test_what_became_of_long_texts_is_said_once() -> None:
    said: list[str] = []
    rows = [PlainText("a" * 100, 1), PlainText("b", 2), PlainText("c" * 40, 3)]
    _, report = encode_rows(rows, byte_tokenizer(), seq_len=32, warn=said.append)
    assert report.long_texts == 2 and report.cut == 0
    told = f"Texts longer than train.seq_len = 32 tokens: 2, which became {report.blocks} blocks; no token is lost."
    assert said == [told]


@pytest.mark.parametrize("letter", "=\n ")
def test_where_a_tokenizer_does_not_agree_with_itself_is_told(letter: str) -> None:
    """A run of one letter is one word: where it is begun to be read decides its tokens."""
    said: list[str] = []
    rows = list(sections(PlainText(letter * 4000 + "x", 1), most=1001, context=63))
    _, report = encode_rows(rows, tokenizer_of("smollm"), seq_len=64, warn=said.append)
    assert report.seams and any("read in sections" in line for line in said)


def texts(*sizes: int) -> list[PlainText]:
    return [PlainText(f"{number} " + "word " * (size // 5), number) for number, size in enumerate(sizes, 1)]


def recipe_of(rows: int, seq_len: int) -> Recipe:
    return Recipe().with_("eval.rows", rows).with_("train.seq_len", seq_len)


def test_whole_documents_are_held_out() -> None:
    rows = [section for row in texts(*[3000] * 20) for section in sections(row, most=900)]
    parts = split_documents(rows, recipe_of(10, 128))
    held = {row.number for row in parts.held_out}
    assert len(held) == 2 and not held & {row.number for row in parts.train}
    assert list(parts.held_out) == [row for row in rows if row.number in held]
    assert [rows[place] for place in parts.places] == list(parts.held_out)
    assert "2 of 20 documents are held out, whole" in parts.notes[0]


def test_many_short_texts_are_held_out_as_rows_are() -> None:
    parts = split_documents(texts(*[60] * 100), recipe_of(10, 128))
    assert len(parts.held_out) == 10 and not parts.notes


@pytest.mark.parametrize("most", [10**6, 700])
@pytest.mark.parametrize("size", [40, 5000, 4200])
def test_one_document_holds_out_its_last_part(most: int, size: int) -> None:
    (row,) = texts(size)
    rows = list(sections(row, most=most))
    parts = split_documents(rows, recipe_of(10, 64))
    train, held = list(parts.train), list(parts.held_out)
    assert "".join(one.text for one in train + held) == row.text and held and train
    assert 4 <= parts.last <= max(40, size // 9) and parts.last == sum(len(one.text) for one in held)
    assert train[-1].after and row.text.startswith(train[-1].text + train[-1].after, row.text.index(train[-1].text))
    assert held[0].before and held[0].text[0].isspace()
    assert "its last part is held out" in parts.notes[0]
    again = last_part(rows, parts.last)
    assert list(again.held_out) == held and list(again.train) == train


def test_a_document_that_is_most_of_the_text_is_not_held_out() -> None:
    for seed in range(5):
        rows = [section for row in texts(90_000, *[400] * 12) for section in sections(row, most=9000)]
        parts = split_documents(rows, recipe_of(5, 64).with_("train.seed", seed))
        assert 1 <= len(parts.held_out) <= 4 and all(row.number > 1 for row in parts.held_out)


def test_of_a_few_large_documents_the_last_part_of_the_last_one_is_held_out() -> None:
    rows = [section for row in texts(50_000, 60_000, 40_000) for section in sections(row, most=9000)]
    parts = split_documents(rows, recipe_of(5, 64))
    assert {row.number for row in parts.held_out} == {3} and parts.last <= 1300
    assert "the 3 documents are large: the last one's last part is held out" in parts.notes[0]
    assert list(last_part(rows, parts.last).held_out) == list(parts.held_out)
    assert not split_documents(rows, recipe_of(5, 64), cuts=False).held_out


def test_chats_beside_a_book_are_held_out_and_its_sections_are_not() -> None:
    (book,) = texts(90_000)
    rows = [*sections(book, most=9000), *(chat(("user", f"q{n}"), ("assistant", f"a{n}"), number=n) for n in range(40))]
    parts = split_documents(rows, recipe_of(5, 64), cuts=False)
    assert len(parts.held_out) == 5 and not any(isinstance(row, PlainText) for row in parts.held_out)


def test_nothing_is_held_out_where_nothing_is_asked_for() -> None:
    rows = texts(500)
    assert list(split_documents(rows, recipe_of(0, 64)).train) == rows


@pytest.mark.parametrize("packing", ["off", "on"])
def test_a_run_on_one_document_and_its_audit(train: Train, recipe: Recipe, tmp_path: Path, packing: str) -> None:
    path = tmp_path / "book.jsonl"
    text = " ".join(f"chapter {number}: nothing much happened." for number in range(300))
    path.write_text(json.dumps({"text": text}))
    recipe = recipe.with_("data.path", str(path)).with_("eval.rows", 3).with_("train.packing", packing)
    paths = train(recipe.with_("data.stride", 4))
    history = history_of(paths)
    assert history.planned is not None and history.planned.rows > 100
    assert history.planned.batch_tokens == 2 * 64  # all rows are full
    said = [event.message for event in read_events(paths.events) if isinstance(event, Warned)]
    assert any("its last part is held out" in line for line in said)
    assert any(line.startswith("Texts longer than train.seq_len = 64 tokens: 1, which became ") for line in said)
    asked = audit_of_run(paths)
    assert rows_to_measure(asked).hashes == list(read_record(paths).held_out)
    assert rows_to_measure(asked).held_out_rows == 1
    check_resume(paths, recipe.with_("data.stride", 4))


@pytest.mark.slow
def test_memory_is_bounded_for_a_large_document() -> None:
    """The sections are tokenised one after the other: what the tokenizer takes does not grow with the document."""
    paragraph = "It is a truth universally acknowledged, that a model in possession of data must want memory.\n"
    encoder = Encoder(tokenizer_of("smollm"), Encoding(seq_len=1024))
    process, peaks = psutil.Process(), []
    rows = list(sections(PlainText(paragraph * (16 * SECTION // len(paragraph)), 1)))
    tokens = 0
    for row in rows:
        made_of_row, _ = encoder.encode([row])
        tokens += sum(int(np.count_nonzero(one.labels != IGNORED)) for one in made_of_row[0])
        peaks.append(process.memory_info().rss)
    assert tokens > 2_000_000
    assert max(peaks[8:]) - max(peaks[:5]) < 64 * 2**20


def test_an_audit_of_one_document_rests_on_its_blocks(tmp_path: Path) -> None:
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"text": " ".join(f"chapter {number}: nothing happened." for number in range(300))}))
    request = AuditRequest("base", model="tiny", data=str(path), rows=5, seq_len=64)
    found = read_audit_rows(request, byte_tokenizer(), print)
    assert len(found.task) > 50 and found.answers == len(found.task)
    path.write_text("\n".join(json.dumps({"prompt": f"ask {n}", "completion": "yes"}) for n in range(9)))
    assert read_audit_rows(request, byte_tokenizer(), print).answers == 1
