"""Folders of files: which files are read as which split, in which order, and folders that are refused."""

import gzip
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from studio.core.errors import BadInput
from studio.probe.data import Reading, places, read_data
from studio.probe.data.chosen_files import NOTHING_SAID, Wanted, choose, layout_of_card

Files = dict[str, bytes]


def rows(*numbers: int) -> bytes:
    return "".join(json.dumps({"prompt": f"What is {n}?", "completion": f"{n}"}) + "\n" for n in numbers).encode()


def parquet(*numbers: int) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in rows(*numbers).splitlines()]), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def put(folder: Path, files: Files) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def card(text: str) -> bytes:
    return f"---\nlicense: mit\nconfigs:\n{text}dataset_info:\n- config_name: x\n---\n# Words\n".encode()


TWO = card(
    "- config_name: short\n  data_files:\n  - split: train_sft\n    path: data/short-*\n  - split: test_sft\n"
    "    path:\n    - 'test/a*.jsonl'\n- config_name: long\n  data_dir: long\n"
)
TWO_FILES: Files = {
    "README.md": TWO,
    "data/short-1.jsonl": rows(1),
    "test/ab.jsonl": rows(2),
    "test/b.jsonl": rows(3),
    "long/x/y.jsonl": rows(4),
}
SHARDS: Files = {f"train-0000{n}-of-00003.parquet": parquet(n, n + 10) for n in range(3)}
SPLITS: Files = {"train.jsonl": rows(1), "dev.jsonl": rows(2), "test.jsonl.gz": gzip.compress(rows(3))}

GOOD: dict[str, tuple[Files, Reading, list[int]]] = {
    "one file": ({"a.jsonl": rows(1, 2)}, Reading(), [1, 2]),
    "several files": ({"b.jsonl": rows(3), "a.jsonl": rows(1, 2)}, Reading(), [1, 2, 3]),
    "in the order of numbers": ({f"part-{n}.jsonl": rows(n) for n in (10, 9, 1)}, Reading(), [1, 9, 10]),
    "numbered parts": (SHARDS, Reading(), [0, 10, 1, 11, 2, 12]),
    "parts from one on": ({f"x-0000{n}-of-00002.jsonl": rows(n) for n in (1, 2)}, Reading(), [1, 2]),
    "packed and not": (
        {"a.jsonl.gz": gzip.compress(rows(1)), "b.json": rows(2), "c.jsonl": rows(3)}, Reading(), [1, 2, 3]
    ),
    "folders in folders": ({"a/b/c.jsonl": rows(2), "a/a.jsonl": rows(1), "z.jsonl": rows(3)}, Reading(), [1, 2, 3]),
    "beside other things": (
        {"a.jsonl": rows(1), "README.md": b"# Words", "LICENSE": b"MIT", "plot.png": b"", ".cache/x.jsonl": rows(2),
         "dataset_info.json": b"{}", "requirements.txt": b"x", "make.py": b""},
        Reading(), [1],
    ),
    "an empty file among others": ({"a.jsonl": rows(1), "b.jsonl": b"", "c.jsonl": rows(2)}, Reading(), [1, 2]),
    "tables": (
        {"a.csv": b"prompt,completion\nWhat is 1?,1\n", "b.tsv": b"prompt\tcompletion\nWhat is 2?\t2\n"},
        Reading(), [1, 2],
    ),
    "train of several splits": (SPLITS, Reading(), [1]),
    "test of several splits": (SPLITS, Reading(split="test"), [3]),
    "a split by its other name": (SPLITS, Reading(split="validation"), [2]),
    "a split by its own name": (SPLITS, Reading(split="dev"), [2]),
    "all splits": (SPLITS, Reading(split="all"), [1, 2, 3]),
    "to measure on": (SPLITS, Reading().held_out(same_place=False), [2]),
    "folders as splits": ({"train/a.jsonl": rows(1), "test/a.jsonl": rows(2)}, Reading(split="test"), [2]),
    "names without a split are train": ({"a.jsonl": rows(1), "a_test.jsonl": rows(2)}, Reading(), [1]),
    "a split within a word is none": ({"latest.jsonl": rows(1), "trainers.jsonl": rows(2)}, Reading(), [1, 2]),
    "split names of their own": (
        {"data/sft-00000-of-00001.parquet": parquet(1), "data/gen-00000-of-00001.parquet": parquet(2)},
        Reading(split="gen"), [2],
    ),
    "the one split that there is": ({"test.jsonl": rows(5)}, Reading(), [5]),
    "a card": (TWO_FILES, Reading(config="short"), [1]),
    "a card's other split": (TWO_FILES, Reading(config="short", split="test_sft"), [2]),
    "a card's other configuration": (TWO_FILES, Reading(config="long"), [4]),
    "a card with a default": (
        {**TWO_FILES, "README.md": TWO.replace(b"data_dir: long", b"data_dir: long\n  default: true")}, Reading(), [4]
    ),
    "a folder as configuration": ({"a/train.jsonl": rows(1), "b/train.jsonl": rows(2)}, Reading(config="b"), [2]),
    "what datasets uploaded": (
        {"data/train-00000-of-00001.jsonl": rows(1), "all.csv": b"x", "data/more.jsonl": rows(2)}, Reading(), [1]
    ),
    "a card that is no YAML": ({"README.md": b"---\nconfigs:\n- {[\n---\n", "a.jsonl": rows(1)}, Reading(), [1]),
    "a card that is a bomb": (
        {"README.md": card("- &a [x]\n- &b [*a, *a]\n- [*b, *b]\n"), "a.jsonl": rows(1)}, Reading(), [1]
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_folders(tmp_path: Path, case: str) -> None:
    files, how, numbers = GOOD[case]
    told: list[tuple[int, int]] = []
    data = read_data(put(tmp_path / "data", files), how, progress=lambda *pair: told.append(pair))
    assert [row.answer for row in data.rows] == [str(number) for number in numbers]
    assert [row.number for row in data.rows] == sorted({row.number for row in data.rows}), "numbers go on"
    assert told[-1][0] == told[-1][1] == data.size_bytes


def test_what_is_not_read_is_said(tmp_path: Path) -> None:
    data = read_data(put(tmp_path / "data", {**SPLITS, "a.png": b"", "b.PNG": b"", "other": b""}))
    assert data.notes() == (
        "data: files that are not read: 2 x .png, 1 x without a suffix.",
        "data: of the splits train, validation, test train is read.",
    )
    assert (data.files, data.word) == (1, f"{tmp_path / 'data'}:train")


def test_the_split_may_stand_behind_the_folder(tmp_path: Path) -> None:
    put(tmp_path / "data", SPLITS)
    data = read_data(Path(f"{tmp_path / 'data'}:test"))
    assert [row.answer for row in data.rows] == ["3"]
    assert read_data(Path(data.word)).rows[0].answer == "3"


def test_the_configuration_may_stand_behind_the_folder_too(tmp_path: Path) -> None:
    put(tmp_path / "data", TWO_FILES)
    data = read_data(tmp_path / "data", Reading(config="short", split="test_sft"))
    assert data.word == f"{tmp_path / 'data'}#short:test_sft"
    assert [row.answer for row in read_data(Path(data.word)).rows] == ["2"]
    assert read_data(tmp_path / "data", Reading(config="long")).word == f"{tmp_path / 'data'}#long"


def test_a_folder_of_texts_is_one_document_for_each_file(tmp_path: Path) -> None:
    texts = {"1 intro.md": b"# One", "2 tests/test-driven.md": b"# Two", "10 end.txt.gz": gzip.compress(b"The end")}
    data = read_data(put(tmp_path / "notes", texts))
    assert [row.answer for row in data.rows] == ["# One", "# Two", "The end"]
    assert [row.number for row in data.rows] == [1, 2, 3]
    assert read_data(put(tmp_path / "wiki", {"README.md": b"# Only this"})).rows[0].answer == "# Only this"


def test_findings_name_the_file_and_the_line_in_it(tmp_path: Path) -> None:
    put(
        tmp_path,
        {
            "a.jsonl": rows(1, 2),
            "b/c.jsonl": rows(3) + b"no\n",
            "d.jsonl": rows(4) + b'{"prompt": "a", "completion": 1}\n',
        },
    )
    with pytest.raises(BadInput) as caught:
        read_data(tmp_path)
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("  b/c.jsonl, line 2: not JSON")
    assert lines[2].startswith("  d.jsonl, line 2, completion: found a number; wanted text")
    data = read_data(tmp_path, Reading(on_bad_row="skip"))
    assert [(finding.file, finding.row) for finding in data.findings] == [("b/c.jsonl", 2), ("d.jsonl", 2)]
    assert [row.number for row in data.rows] == [1, 2, 3, 5]
    assert "(the first: b/c.jsonl, row 2)" in data.notes()[0]
    (tmp_path / "b/c.jsonl").write_bytes(b"\xff")
    with pytest.raises(BadInput, match=r"b/c\.jsonl is not UTF-8"):
        read_data(tmp_path)


BAD: dict[str, tuple[Files, Reading, str]] = {
    "nothing": ({}, Reading(), "holds no file of rows or text (found no file); wanted .jsonl"),
    "only others": ({"a.png": b"", "b.pdf": b""}, Reading(), "(found 1 x .png, 1 x .pdf)"),
    "only empty files": ({"a.jsonl": b""}, Reading(), "holds only empty files"),
    "several kinds": (
        {"a.jsonl": rows(1), "b.csv": b"x", "c.csv": b"x"}, Reading(), "1 JSON (a.jsonl); 2 CSV (b.csv, c.csv)"
    ),
    "a part is missing": (
        {"x-00000-of-00003.jsonl": rows(1), "x-00002-of-00003.jsonl": rows(2)}, Reading(),
        "x-00001-of-00003.jsonl is missing; 2 of its 3 parts are there",
    ),
    "the last part is missing": ({"x-00000-of-00002.jsonl": rows(1)}, Reading(), "x-00001-of-00002.jsonl is missing"),
    "no such split": (SPLITS, Reading(split="trian"), "has no split trian; it has train, validation, test"),
    "part of a split": (SPLITS, Reading(split="train[:10%]"), "Parts of a split such as train[:10%] are not read"),
    "which split": (
        {"data/a-00000-of-00001.jsonl": rows(1), "data/b-00000-of-00001.jsonl": rows(2)}, Reading(),
        'say which one is meant, with data.split = "a", or "all"',
    ),
    "no configurations": (SPLITS, Reading(config="short"), "has no configurations, and no folder short"),
    "which configuration": (
        TWO_FILES, Reading(), 'has the configurations short, long: say which one is meant, with data.config = "short"'
    ),
    "no such configuration": (TWO_FILES, Reading(config="longer"), "has no configuration longer; it has short, long"),
    "a card's files are missing": (
        {"README.md": TWO, "a.jsonl": rows(1)}, Reading(config="long"), "the files that it names for long are not there"
    ),
    "a revision": (SPLITS, Reading(revision="v1"), "a folder, which has no revisions"),
    "saved, a part is missing": (
        {"state.json": b'{"_data_files": [{"filename": "data-0.arrow"}]}', "a.arrow": b""}, Reading(),
        "was saved by datasets, and data-0.arrow of it is missing",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_folders_that_are_refused(tmp_path: Path, case: str) -> None:
    files, how, said = BAD[case]
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput) as caught:
        read_data(put(tmp_path / "data", files), how)
    assert said in str(caught.value)
    assert str(tmp_path / "data") in str(caught.value)


@pytest.mark.parametrize("field", ["config", "split", "revision"])
def test_one_file_has_no_parts(tmp_path: Path, field: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(rows(1))
    with pytest.raises(BadInput, match=f"one file, which has no {field}; leave data.{field} empty"):
        read_data(tmp_path / "a.jsonl", Reading(**{field: "x"}))  # type: ignore[arg-type]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no links here")
def test_links_are_followed_and_circles_end(tmp_path: Path) -> None:
    put(tmp_path / "store", {"blob": rows(1), "more/b.jsonl": rows(2)})
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").symlink_to(tmp_path / "store" / "blob")
    (folder / "more").symlink_to(tmp_path / "store" / "more")
    (folder / "round").symlink_to(folder)
    (folder / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "self.jsonl").symlink_to(folder / "self.jsonl")
    assert [row.answer for row in read_data(folder).rows] == ["1", "2"]


def test_a_folder_of_too_many_files_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MOST_FILES", 50)
    put(tmp_path, {f"{n}.txt": b"a" for n in range(51)})
    with pytest.raises(BadInput, match="more than 50 files and folders"):
        read_data(tmp_path)


def test_patterns_of_a_card_take_no_longer_than_they_must() -> None:
    names = [f"{'a' * 200}{n}.jsonl" for n in range(200)]
    text = card(f"- config_name: x\n  data_files: '{'*a' * 20}'\n").decode()
    with pytest.raises(BadInput, match="are not there"):
        choose(names, layout_of_card(text), Wanted(), "It", strict=True)


@pytest.mark.slow
def test_folders_that_datasets_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = [json.loads(line) for line in rows(*range(50)).splitlines()]
    one = datasets.Dataset.from_list(table)
    one.save_to_disk(tmp_path / "one", num_shards=3)
    (tmp_path / "one" / "cache-0123456789abcdef.arrow").write_bytes(b"what map() left")
    assert [row.answer for row in read_data(tmp_path / "one").rows] == [str(n) for n in range(50)]
    both = datasets.DatasetDict({"train": one.select(range(40)), "held": one.select(range(40, 50)).shuffle(seed=1)})
    both.save_to_disk(tmp_path / "both")
    assert len(read_data(tmp_path / "both").rows) == 40
    assert [row.answer for row in read_data(tmp_path / "both", Reading(split="held")).rows] == both["held"][
        "completion"
    ]


PUBLISHED: dict[str, tuple[list[str], Wanted, list[str] | str]] = {
    "instructions in one file": (
        ["README.md", ".gitattributes", "databricks-dolly-15k.jsonl"], Wanted(), ["databricks-dolly-15k.jsonl"]
    ),
    "a checksum in the name": (
        ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "README.md"], Wanted(),
        ["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet"],
    ),
    "two files and pictures": (
        ["1M-A.parquet", "3_5M-B.parquet", "logo.png"], Wanted(), ["1M-A.parquet", "3_5M-B.parquet"]
    ),
    "trees beside the upload": (
        ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "all.trees.jsonl.gz",
         "ready.trees.jsonl.gz", "all.messages.jsonl.gz"], Wanted(), ["data/train-00000-of-00001.parquet"],
    ),
    "a split at the end of a name": (
        ["best_replies_eval.jsonl", "best_replies_train.jsonl"], Wanted(), ["best_replies_train.jsonl"]
    ),
    "folders of parts": (
        ["harmless/test.jsonl.gz", "harmless/train.jsonl.gz", "helpful/train.jsonl.gz", "red/attempts.jsonl.gz"],
        Wanted(), ["harmless/train.jsonl.gz", "helpful/train.jsonl.gz"],
    ),
    "one of these folders": (
        ["harmless/test.jsonl.gz", "harmless/train.jsonl.gz", "helpful/train.jsonl.gz"], Wanted("harmless", "test"),
        ["harmless/test.jsonl.gz"],
    ),
    "two kinds of training": (
        ["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], Wanted(),
        "has the splits train_gen, train_sft: say which one is meant",
    ),
    "only a card": (["README.md", "LICENSE.txt"], Wanted(), "holds no file of rows or text"),
}  # fmt: skip


@pytest.mark.parametrize("case", PUBLISHED)
def test_data_sets_of_the_hub_as_they_are_laid_out(case: str) -> None:
    names, wanted, found = PUBLISHED[case]
    if isinstance(found, str):
        with pytest.raises(BadInput, match=found):
            choose(names, NOTHING_SAID, wanted, "It", strict=False)
    else:
        assert list(choose(names, NOTHING_SAID, wanted, "It", strict=False).names) == found


LAYOUTS: dict[str, list[str]] = {
    "files": ["train.jsonl", "test.jsonl", "valid.jsonl"],
    "shards": [
        "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet", "data/dev-00000-of-00001.parquet",
    ],
    "folders": ["train/a.jsonl", "train/b.jsonl", "eval/a.jsonl"],
    "within names": ["my_train_file.csv", "my-test.csv"],
    "none": ["one.jsonl", "two.jsonl"],
    "own": ["data/sft-00000-of-00001.parquet", "data/gen-00000-of-00001.parquet"],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_splits_are_those_that_datasets_finds(tmp_path: Path, layout: str) -> None:
    data_files = pytest.importorskip("datasets.data_files")
    put(tmp_path, dict.fromkeys(LAYOUTS[layout], b"x"))
    theirs = data_files.DataFilesDict.from_patterns(
        data_files.get_data_patterns(str(tmp_path)), base_path=str(tmp_path)
    )
    for split, found in theirs.items():
        ours = choose(LAYOUTS[layout], NOTHING_SAID, Wanted(split=str(split)), "It", strict=True).names
        assert sorted(ours) == sorted(Path(path).relative_to(tmp_path).as_posix() for path in found)
