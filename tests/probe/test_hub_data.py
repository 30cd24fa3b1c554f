"""Data sets of the hub, against a stand-in for the hub on this machine: each case in a process of its own, as the
client reads its settings when it is imported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.probe.data import Reading
from studio.probe.data.places import absolute_word, find_files, full_word, hub_word, known_bytes, same_place
from studio.probe.data.sampled import guess_rows
from tests.fakes.hub import COMMIT, hub
from tests.probe.test_data_folders import TWO, parquet, put, rows

ASK = """
import json, sys
from pathlib import Path
from studio.core.errors import BadInput
from studio.probe.data import Reading, read_data
from studio.probe.data.places import known_bytes
class Enough(Exception): pass
said, told = json.loads(sys.argv[1]), []
stop = said.pop("stop", 0)
def progress(done, total):
    told.append((done, total))
    if stop and done >= stop:
        raise Enough
try:
    word = said.pop("word")
    before = known_bytes(word, Reading(**said))
    data = read_data(Path(word), Reading(**said), progress=progress)
    found = {"answers": [row.answer for row in data.rows], "notes": data.notes(), "word": data.word, "told": told}
    print(json.dumps(found | {"commit": data.commit, "before": before, "after": known_bytes(word, Reading(**said))}))
except BadInput as error:
    print(json.dumps({"error": str(error)}))
except Enough:
    print(json.dumps({"told": told}))
"""


def ask(
    tmp_path: Path,
    word: str = "owner/chats",
    *,
    endpoint: str = "http://127.0.0.1:9",
    offline: bool = False,
    **said: Any,
) -> dict[str, Any]:
    settings = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "LORA_STUDIO_HOME": str(tmp_path / "studio"),
    }
    command = [sys.executable, "-c", ASK, json.dumps({"word": word, **said})]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def fetched(asked: list[str]) -> list[str]:
    """The files whose content was asked for."""
    return [
        request.rpartition("/resolve/")[2].partition("/")[2]
        for request in asked
        if request.startswith("GET") and "/resolve/" in request
    ]


SPLITS = {
    "README.md": b"---\nlicense: mit\n---\n# Chats",
    "data/train-00000-of-00002.parquet": parquet(1, 2),
    "data/train-00001-of-00002.parquet": parquet(3),
    "data/test-00000-of-00001.parquet": parquet(9),
    ".gitattributes": b"",
    "plot.png": b"",
}


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return put(tmp_path / "repository", SPLITS)


@pytest.mark.slow
def test_the_split_that_is_meant_is_downloaded_and_found_again_offline(tmp_path: Path, chats: Path) -> None:
    with hub("owner/chats", chats, kind="datasets") as (endpoint, asked):
        found = ask(tmp_path, endpoint=endpoint)
        files = fetched(asked)
        asked.clear()
        again = ask(tmp_path, endpoint=endpoint)
    assert found["answers"] == again["answers"] == ["1", "2", "3"]
    assert files == ["README.md", "data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
    assert fetched(asked) == []
    sizes = sum((chats / name).stat().st_size for name in files[1:])
    assert (found["before"], found["after"]) == (None, sizes)
    downloaded = [pair for pair in found["told"] if pair[1] == sizes]
    assert downloaded[0][0] == 0
    assert [done for done, _ in downloaded[:-2]] == sorted(done for done, _ in downloaded[:-2])
    assert found["commit"] == COMMIT
    assert found["word"] == f"owner/chats@{COMMIT}:train"
    assert "chats: of the splits train, test train is read." in found["notes"]
    offline = ask(tmp_path, offline=True)
    assert offline["answers"] == ["1", "2", "3"]
    assert "offline mode is" in offline["notes"][0]
    assert f"commit {COMMIT[:8]} from the cache is read" in offline["notes"][0]
    exact = ask(tmp_path, found["word"])
    assert (exact["answers"], exact["notes"][0]) == (
        ["1", "2", "3"],
        "chats@" + found["word"].partition("@")[2] + ": " + found["notes"][0].partition(": ")[2],
    )
    missing = ask(tmp_path, "owner/chats:test", offline=True)["error"]
    assert "data/test-00000-of-00001.parquet of the data set owner/chats is not in the cache" in missing


@pytest.mark.slow
@pytest.mark.parametrize(("said", "answers"), [
    ({"word": "owner/chats:test"}, ["9"]),
    ({"split": "test"}, ["9"]),
    ({"split": "all"}, ["1", "2", "3", "9"]),
    ({"prefer": ["validation", "test", "train"]}, ["9"]),
    ({"revision": "v2"}, ["5"]),
    ({"word": "owner/chats@v2"}, ["5"]),
])  # fmt: skip
def test_split_and_revision(tmp_path: Path, chats: Path, said: dict[str, Any], answers: list[str]) -> None:
    other = put(tmp_path / "v2", {"rows.jsonl": rows(5)})
    with hub("owner/chats", chats, kind="datasets", branches={"v2": other}) as (endpoint, _):
        assert ask(tmp_path, endpoint=endpoint, **said)["answers"] == answers


LARGE = json.dumps({"prompt": "Why?", "completion": "a" * 35_000_000}).encode()


@pytest.mark.slow
def test_a_stopped_download_goes_on_where_it_stopped(tmp_path: Path) -> None:
    chats = put(tmp_path / "repository", {"rows.jsonl": LARGE})
    with hub("owner/chats", chats, kind="datasets") as (endpoint, asked):
        stopped = ask(tmp_path, endpoint=endpoint, stop=25_000_000)
        assert stopped.keys() == {"told"}
        (part,) = (tmp_path / "hf").rglob("*.part")
        there = part.stat().st_size
        assert there >= 20_000_000
        asked.clear()
        found = ask(tmp_path, endpoint=endpoint)
        assert [len(answer) for answer in found["answers"]] == [35_000_000]
        assert any(request.endswith(f"bytes={there}-") for request in asked)
        assert [done for done, total in found["told"] if total][1] >= there
        assert not list((tmp_path / "hf").rglob("*.part*"))
        asked.clear()
        assert ask(tmp_path, endpoint=endpoint)["answers"] == found["answers"]
        assert fetched(asked) == []


@pytest.mark.slow
def test_a_part_of_something_else_is_not_used(tmp_path: Path) -> None:
    chats = put(tmp_path / "repository", {"rows.jsonl": LARGE})
    with hub("owner/chats", chats, kind="datasets") as (endpoint, _):
        ask(tmp_path, endpoint=endpoint, stop=25_000_000)
        (part,) = (tmp_path / "hf").rglob("*.part")
        part.write_bytes(b"b" * 1000)
        assert (
            "is not what its checksum says; what was downloaded of it is removed"
            in ask(tmp_path, endpoint=endpoint)["error"]
        )
        assert len(ask(tmp_path, endpoint=endpoint)["answers"]) == 1


@pytest.mark.slow
def test_a_lost_connection_is_taken_up_again(tmp_path: Path) -> None:
    chats = put(tmp_path / "repository", {"rows.jsonl": LARGE})
    with hub("owner/chats", chats, kind="datasets", breaks_after=25_000_000) as (endpoint, asked):
        found = ask(tmp_path, endpoint=endpoint)
    assert len(found["answers"]) == 1
    assert any(request.endswith("bytes=20971520-") for request in asked)


@pytest.mark.slow
def test_configurations_are_those_of_the_card(tmp_path: Path) -> None:
    files = {"README.md": TWO, "data/short-1.jsonl": rows(1), "test/ab.jsonl": rows(2), "long/a.jsonl": rows(4)}
    chats = put(tmp_path / "repository", files)
    with hub("owner/chats", chats, kind="datasets") as (endpoint, _):
        message = ask(tmp_path, endpoint=endpoint)["error"]
        assert 'has the configurations short, long: say which one is meant, with data.config = "short"' in message
        assert ask(tmp_path, endpoint=endpoint, config="long")["answers"] == ["4"]
        found = ask(tmp_path, "owner/chats#short:test_sft", endpoint=endpoint)
        assert (found["answers"], found["word"]) == (["2"], f"owner/chats#short@{COMMIT}:test_sft")


@pytest.mark.slow
@pytest.mark.parametrize("files", [{"chats.py": b"import os"}, {"README.md": b"#", "rows.zip": b"PK"}])
def test_what_is_made_by_a_script_is_read_from_the_hubs_own_copy(tmp_path: Path, files: dict[str, bytes]) -> None:
    chats = put(tmp_path / "repository", files)
    parts = {"default/partial-train/0000.parquet": 1, "default/test/0000.parquet": 2, "other/train/0000.parquet": 3}
    copy = put(tmp_path / "copy", {name: parquet(place) for name, place in parts.items()})
    with hub("owner/chats", chats, kind="datasets", branches={"refs/convert/parquet": copy}) as (endpoint, _):
        found = ask(tmp_path, endpoint=endpoint)
    assert found["answers"] == ["1"]
    assert any(
        "the hub's own copy in Parquet is read, which holds only the first gigabytes" in note for note in found["notes"]
    )
    assert ask(tmp_path, offline=True)["answers"] == ["1"]
    for again in ({"revision": found["commit"]}, {"word": found["word"]}):  # as a run and its resume name it
        assert ask(tmp_path, offline=True, **again)["answers"] == ["1"]


def test_a_script_without_a_copy_is_refused(tmp_path: Path) -> None:
    chats = put(tmp_path / "repository", {"chats.py": b"import os", "README.md": b"#"})
    with hub("owner/chats", chats, kind="datasets") as (endpoint, asked):
        assert "is made by a script of its own, which is not run here" in ask(tmp_path, endpoint=endpoint)["error"]
    assert fetched(asked) == ["README.md"]


@pytest.mark.slow
def test_a_copy_that_was_downloaded_by_other_means_is_read_offline(tmp_path: Path) -> None:
    inside = tmp_path / "hf" / "hub" / "datasets--owner--chats"
    put(inside / "snapshots" / COMMIT, {"train-00000-of-00002.jsonl": rows(1, 2)})
    put(inside, {"refs/main": COMMIT.encode()})
    assert "train-00001-of-00002.jsonl is missing; 1 of its 2 parts are there" in ask(tmp_path, offline=True)["error"]
    put(inside / "snapshots" / COMMIT, {"train-00001-of-00002.jsonl": rows(3)})
    assert ask(tmp_path, offline=True)["answers"] == ["1", "2", "3"]


def test_offline_and_never_seen(tmp_path: Path) -> None:
    message = ask(tmp_path, offline=True)["error"]
    assert "offline mode is on" in message
    assert "hf download owner/chats --repo-type dataset --local-dir FOLDER" in message
    assert "the hub cannot be asked (" in ask(tmp_path)["error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "is not on the hub, or it is private"),
        (401, "RepoNotFound", "hf auth login"),
        (403, "GatedRepo", "is gated: accept its terms at https://huggingface.co/datasets/owner/chats"),
        (404, "RevisionNotFound", "not this revision"),
        (500, "", "the hub cannot be asked"),
    ],
)
def test_refusals_of_the_hub(tmp_path: Path, chats: Path, status: int, code: str, expected: str) -> None:
    with hub("owner/chats", chats, kind="datasets", status=status, error_code=code) as (endpoint, _):
        assert expected in ask(tmp_path, endpoint=endpoint, revision="v2")["error"]


@pytest.mark.slow
def test_what_is_gated_now_is_not_read_from_the_cache(tmp_path: Path, chats: Path) -> None:
    with hub("owner/chats", chats, kind="datasets") as (endpoint, _):
        ask(tmp_path, endpoint=endpoint)
    with hub("owner/chats", chats, kind="datasets", status=403, error_code="GatedRepo") as (endpoint, _):
        assert "is gated" in ask(tmp_path, endpoint=endpoint)["error"]


def test_a_disk_without_room(tmp_path: Path, chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.probe.data import hub_data

    monkeypatch.setattr(hub_data.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10})())
    with pytest.raises(BadInput, match=r"needs 5\.0 GB on the disk of"):
        hub_data._require_room("owner/chats", 5 * 10**9)


def test_a_word_may_say_all_that_a_recipe_says_of_its_place(tmp_path: Path) -> None:
    how = Reading(config="small", split="test", revision="v2")
    assert full_word("owner/name", how) == "owner/name#small@v2:test"
    assert full_word("owner/name:train", how) == "owner/name#small@v2:train"
    put(tmp_path, {"train.jsonl": rows(1), "test.jsonl": rows(2)})
    assert full_word(str(tmp_path), Reading(split="test")) == f"{tmp_path}:test"
    assert full_word(f"{tmp_path}:train", Reading(split="test")) == f"{tmp_path}:train"
    assert full_word("embedded", Reading()) == "embedded"


@pytest.mark.parametrize("word", ["owner/name", "owner/name:test", "owner/name@v1.0", "o/n#a.b@refs/pr/1:x"])
def test_words_for_the_hub(word: str) -> None:
    assert hub_word(word)
    assert absolute_word(word) == word
    assert known_bytes(word) is None
    assert guess_rows(word) is None
    assert same_place(word, word.partition(":")[0])


@pytest.mark.parametrize(
    "word",
    ["embedded", "name", "data/rows.jsonl", "data/rows.csv.gz", "/a/b", "./a/b", "a/b/c", "a--b/c", "a/..b", "a/b:c:d"],
)  # fmt: skip
def test_words_for_places_here(word: str) -> None:
    assert hub_word(word) is None


def test_a_folder_of_the_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "owner" / "name", {"train.jsonl": rows(1), "test.jsonl": rows(2)})
    monkeypatch.chdir(tmp_path)
    assert hub_word("owner/name") is None
    assert find_files(Path("owner/name:test"), Reading()).names == ("test.jsonl",)
    assert same_place("owner/name:test", str(tmp_path / "owner" / "name"))
