"""Many rows are encoded as few are: by other processes, from the cache, whatever is killed or damaged in between."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from studio.core.errors import BadInput, JobFailed
from studio.jobs.base.data import encode, encode_pool
from studio.jobs.base.data.bounded import freeze_date, set_variables
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.base.data.encode_pool import encoded_chunks
from studio.jobs.base.data.row_report import RowReport
from studio.jobs.base.data.rows import Encoder, Encoding, Example
from studio.jobs.base.data.stored_examples import StoredExamples
from studio.probe.data import Conversation, Message, PlainText, Preference, Row, read_data, row_cache, stored_rows
from studio.probe.data.views import Chain
from studio.runs import data_cache, spool
from studio.runs.home import HOME_VARIABLE
from tests.fakes.runs import CHECKOUT
from tests.fakes.tokenizers import CHATML, byte_tokenizer

RAISES = "{% if messages[0].content == 'no' %}{{ raise_exception('I refuse') }}{% endif %}"
DATED = "{{ strftime_now('%d %b %Y') }}" + CHATML


def row(n: int, asked: str = "", answer: str = "") -> Conversation:
    return Conversation((Message("user", asked or f"question {n}"), Message("assistant", answer or f"answer {n}")), n)


ROWS: list[Row] = [
    *(row(n) for n in range(1, 60)),
    row(60, asked="no"),  # refused
    row(61, answer="<|im_end|> in a text"),
    Conversation((Message("system", "S"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"),
                  Message("assistant", "d")), 62),
    PlainText("a text", 63),
    Preference((Message("user", "q"),), (Message("assistant", "good"),), (Message("assistant", "bad"),), 64),
    row(65, asked="long " * 50),  # its answer is cut away
    *(row(n, answer=f"é {n} 漢字") for n in range(66, 90)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def few_count_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.setattr(encode, "KEPT_BYTES", 0)
    monkeypatch.setattr(encode_pool, "CHUNK_ROWS", 7)
    monkeypatch.setattr(spool, "_BLOCK_BYTES", 500)


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Encode in two processes, however few the rows and cores are."""
    monkeypatch.setattr(encode_pool, "ALONE_BYTES", 10)
    monkeypatch.setattr(encode_pool, "cores", lambda: 2)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of each time that rows were really encoded."""
    seen: list[int] = []
    chunks = encode.encoded_chunks

    def spied(rows: Sequence[Row], *rest: Any, **more: Any) -> Any:
        seen.append(len(rows))
        return chunks(rows, *rest, **more)

    monkeypatch.setattr(encode, "encoded_chunks", spied)
    return seen


def tokenizer() -> Any:
    return byte_tokenizer(RAISES + CHATML)


def encoded(rows: Sequence[Row], made: Any = None, **how: Any) -> tuple[Sequence[Example], RowReport, list[str]]:
    said: list[str] = []
    examples, report = encode_rows(rows, made or tokenizer(), warn=said.append, **{"seq_len": 200} | how)
    return examples, report, said


def same(one: Sequence[Example], other: Sequence[Example]) -> bool:
    return len(one) == len(other) and all(
        np.array_equal(a.input_ids, b.input_ids)
        and np.array_equal(a.labels, b.labels)
        and (a.input_ids.dtype, a.labels.dtype) == (b.input_ids.dtype, b.labels.dtype)
        for a, b in zip(one, other, strict=True)
    )


def entries() -> list[Path]:
    return sorted(data_cache.data_cache().glob("tokens-*"))


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> tuple[Sequence[Example], RowReport, list[str]]:
    """The same rows encoded in one process and in memory."""
    with monkeypatch.context() as patched:
        patched.setattr(encode, "KEPT_BYTES", 10**9)
        examples, report, said = encoded(ROWS)
    assert isinstance(examples, list)
    assert report.refused == report.dropped == 1
    assert report.special == 1
    return examples, report, said


def test_kept_examples_are_those_in_memory(plainly: Any, encodings: list[int]) -> None:
    for _ in range(2):
        examples, report, said = encoded(ROWS)
        assert isinstance(examples, StoredExamples)
        assert same(examples, plainly[0])
        assert list(examples.lengths) == [len(example.input_ids) for example in plainly[0]]
        assert examples.largest == max(int(example.input_ids.max()) for example in plainly[0])
        assert same(examples[-3:], plainly[0][-3:])
        assert same([examples[-1]], plainly[0][-1:])
        assert asdict(report) == asdict(plainly[1])
        assert said == plainly[2] != []
    assert examples.recalled
    assert encodings == [len(ROWS)]


def test_several_processes_make_the_same(plainly: Any, several: None) -> None:
    told: list[float] = []
    said: list[str] = []
    examples, report = encode_rows(ROWS, tokenizer(), warn=said.append, progress=told.append, seq_len=200)
    assert same(examples, plainly[0])
    assert asdict(report) == asdict(plainly[1])
    assert said == plainly[2]
    assert told == sorted(told)
    assert told[-1] == 1.0
    assert children() == []


def test_other_processes_tell_the_template_the_same(several: None) -> None:
    made = byte_tokenizer("{{ strftime_now('%d %b %Y') + thoughts }}" + CHATML)
    freeze_date(made, datetime(2001, 2, 3))
    set_variables(made, {"thoughts": "none"})
    examples, _, _ = encoded([row(1), row(2)], made)
    assert made.decode(examples[1].input_ids).startswith("03 Feb 2001none<|im_start|>user")


def children() -> list[psutil.Process]:
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # ended just now
            found += [child] if "encode_worker" in " ".join(child.cmdline()) else []
    return found


def with_variables(made: Any) -> Any:
    set_variables(made, {"enable_thinking": False})
    return made


OTHERS: dict[str, Callable[[], tuple[Sequence[Row], Any, dict[str, Any]]]] = {
    "another row": lambda: ([*ROWS[:-1], row(89, answer="another")], tokenizer(), {}),
    "another order": lambda: ([*ROWS[1:], ROWS[0]], tokenizer(), {}),
    "fewer rows": lambda: (ROWS[:-1], tokenizer(), {}),
    "another length": lambda: (ROWS, tokenizer(), {"seq_len": 100}),
    "all tokens": lambda: (ROWS, tokenizer(), {"answers_only": False}),
    "another template": lambda: (ROWS, byte_tokenizer(RAISES + "{{ bos_token }}" + CHATML), {}),
    "another tokenizer": lambda: (ROWS, byte_tokenizer(RAISES + CHATML, adds_bos=True), {}),
    "a variable of the template": lambda: (ROWS, with_variables(tokenizer()), {}),
    "another end token": lambda: (ROWS, byte_tokenizer(RAISES + CHATML, eos_token="</s>"), {}),
}


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_changes_tokens_makes_another_entry(encodings: list[int], other: str) -> None:
    encoded(ROWS)
    rows, made, how = OTHERS[other]()
    examples, _, _ = encoded(rows, made, **how)
    assert not getattr(examples, "recalled", False)
    assert len(encodings) == 2
    assert len(entries()) == 2


def test_every_setting_of_an_encoding_is_in_the_key() -> None:
    keys = set()
    made = tokenizer()
    changed = [Encoding(200)]
    for name, value in asdict(Encoding(200)).items():
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else None
        if other is not None:
            changed.append(Encoding(**asdict(Encoding(200)) | {name: other}))
    for how in changed:
        keys.add(encode._sum_of_encoder(Encoder(made, how)))
    assert len(keys) == len(changed) > 2


@pytest.mark.parametrize(
    ("template", "other_day", "other_hour"),
    [
        (CHATML, True, True),
        (DATED, False, True),
        ("{{ strftime_now('%d %H') }}" + CHATML, False, False),
        (
            "{% set form = '%d' %}{% if strftime_now is defined %}{{ strftime_now(form) }}{% endif %}" + CHATML,
            False,
            False,
        ),
    ],
)
def test_the_date_of_a_template_is_part_of_what_was_made(
    encodings: list[int], template: str, other_day: bool, other_hour: bool
) -> None:
    made = byte_tokenizer(template)
    for date, known in (
        (datetime(2026, 3, 1, 10), False), (datetime(2026, 3, 1, 10), True), (datetime(2026, 3, 1, 11), other_hour),
        (datetime(2026, 3, 2, 10), other_day),
    ):  # fmt: skip
        freeze_date(made, date)
        examples, _, _ = encoded(ROWS[:20], made)
        assert isinstance(examples, StoredExamples)
        assert examples.recalled == known


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda entry: os.truncate(entry / "tokens.bin", 100),
    "a flipped bit": lambda entry: flip(entry / "tokens.bin"),
    "other lengths": lambda entry: flip(entry / "lengths.bin"),
    "no facts": lambda entry: (entry / "facts.json").unlink(),
    "empty": lambda entry: [path.unlink() for path in entry.iterdir()],
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_unsound_entry_is_noticed_and_made_anew(plainly: Any, encodings: list[int], damage: str) -> None:
    encoded(ROWS)
    DAMAGES[damage](entries()[0])
    for _ in range(2):
        assert same(encoded(ROWS)[0], plainly[0])
    assert len(encodings) == 2


@pytest.mark.parametrize("refused", ["scratch_entry", "keep_entry"])
def test_a_full_disk_is_no_obstacle(plainly: Any, monkeypatch: pytest.MonkeyPatch, refused: str) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encode, refused, full)
    examples, _, _ = encoded(ROWS)
    assert same(examples, plainly[0])
    assert entries() == []
    assert not list(data_cache.data_cache().glob(".*"))


def test_a_stop_ends_the_processes_and_leaves_nothing(several: None) -> None:
    def stop(fraction: float) -> None:
        if fraction > 0.3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode_rows(ROWS, tokenizer(), warn=print, progress=stop, seq_len=200)
    assert children() == []
    assert not list(data_cache.data_cache().iterdir())


def test_a_stop_is_heard_while_the_first_chunk_is_encoded(several: None) -> None:
    slow = byte_tokenizer("{% for i in range(20000000) %}{% endfor %}" + CHATML)
    encoder = Encoder(tokenizer(), Encoding(200))
    encoder.tokenizer.chat_template = slow.chat_template
    began = time.monotonic()

    def stop(fraction: float) -> None:
        assert fraction == 0.0
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(encoded_chunks(ROWS, 10**6, encoder, progress=stop))
    assert time.monotonic() - began < 10
    assert children() == []


def test_what_the_encoder_refuses_is_said_as_it_says_it(several: None) -> None:
    endless = "{% if messages[0].content == 'question 50' %}{{ 'x' * 3000000 }}{% endif %}" + CHATML
    with pytest.raises(BadInput, match=r"makes 3,000,0.. characters of a conversation"):
        encoded(ROWS, byte_tokenizer(endless))
    assert children() == []


def test_a_process_that_dies_is_said(several: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_pool, "_WORKER", "studio.no_such_module")
    with pytest.raises(JobFailed, match="exit code"):
        encoded(ROWS)


_RUN = """
import sys, time
from studio.jobs.base.data import encode, encode_pool
from tests.jobs import test_encode
encode.KEPT_BYTES, encode_pool.ALONE_BYTES, encode_pool.CHUNK_ROWS = 0, 10, 7
encode_pool.cores = lambda: 2
def wait(fraction):
    if fraction > 0.3:
        print("encoding", flush=True)
        time.sleep(float(sys.argv[1]))
encode.encode_rows(test_encode.ROWS, test_encode.tokenizer(), warn=print, progress=wait, seq_len=200)
print("done", flush=True)
"""


def started(seconds: float) -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    command = [sys.executable, "-c", _RUN, str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=CHECKOUT)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_outlives_a_killed_run(plainly: Any, number: int) -> None:
    with started(60) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "encoding\n"
        workers = children()
        assert len(workers) == 2
        run.send_signal(number)
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert len(gone) == 2
    left = list(data_cache.data_cache().iterdir())
    assert len(left) == (number == signal.SIGKILL)  # removed when nothing has been written there for an hour
    assert all(path.name.startswith(".tokens-") for path in left)
    assert same(encoded(ROWS)[0], plainly[0])


@pytest.mark.slow
def test_two_runs_at_once_share_one_entry(plainly: Any, encodings: list[int]) -> None:
    with started(0) as one, started(0) as other:
        for run in (one, other):
            assert run.stdout is not None
            assert run.stdout.read().endswith("done\n")
    assert [one.returncode, other.returncode] == [0, 0]
    assert len(list(data_cache.data_cache().iterdir())) == 1
    assert same(encoded(ROWS)[0], plainly[0])
    assert encodings == []


def test_rows_of_a_kept_file_are_known_without_being_read(
    tmp_path: Path, encodings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_rows, "IN_MEMORY_CHARACTERS", 100)
    monkeypatch.setattr(row_cache, "LEAST_BYTES", 100)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    lines = [json.dumps({"messages": [*turns[:1], {**turns[1], "content": f"answer {n}"}]}) for n in range(50)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = read_data(tmp_path / "data.jsonl")
    wanted = encoded(list(data.rows[10:]))[0]
    for rows in (data.rows[10:], Chain([data.rows[10:30], data.rows[30:]])):
        assert same(encoded(rows)[0], wanted)
    assert len(encodings) == 3
    monkeypatch.setattr(stored_rows, "unpacked", lambda line: pytest.fail("a row was made"))
    again = encoded(read_data(tmp_path / "data.jsonl").rows[10:])[0]
    assert len(encodings) == 3
    assert same(again, wanted)
