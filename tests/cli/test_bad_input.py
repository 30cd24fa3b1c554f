"""Whatever a user gives us that cannot be used: one message on stderr, exit 2, no traceback, no run folder."""

import errno
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from studio.cli import _told
from tests.cli.conftest import Cli, Outcome

ROW = '{"prompt": "a", "completion": "b"}\n'


def _refused(outcome: Outcome, home: Path, *words: str) -> None:
    assert outcome.code == 2, outcome
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert outcome.err.count("lora-studio") >= 1
    assert outcome.err.startswith("lora-studio")
    assert "\x1b" not in outcome.err
    for word in words:
        assert word in outcome.err
    assert not (home / "runs").exists() or list((home / "runs").iterdir()) == []


def _model(folder: Path, *, config: bool = True, weights: bytes | None = None) -> Path:
    folder.mkdir()
    if config:
        shape = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 16}
        (folder / "config.json").write_text(json.dumps(shape))
    if weights is not None:
        (folder / "model.safetensors").write_bytes(weights)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def _header(table: object, *, length: int | None = None) -> bytes:
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missing_recipe(cli: Cli, home: Path, as_json: bool) -> None:
    _refused(cli("train", "./nowhere.toml", *(["--json"] if as_json else [])), home, "nowhere.toml")
    _refused(cli("train", "dmo"), home, "dmo", "demo")


def test_a_recipe_that_is_a_folder_or_a_device(cli: Cli, home: Path) -> None:
    _refused(cli("train", "."), home, "is a folder")
    _refused(cli("train", "/dev/null"), home, "not a regular file")


def test_a_recipe_that_cannot_be_read(cli: Cli, home: Path) -> None:
    """A regular file whose bytes are refused, also to root: this process's memory."""
    if not Path("/proc/self/mem").is_file():
        pytest.skip("no file here that refuses root")
    _refused(cli("train", "/proc/self/mem"), home, "cannot be read", "Input/output error")


def test_bad_toml_shows_the_line(cli: Cli, home: Path, recipe: Path) -> None:
    recipe.write_text("name = 'x'\n[train\nsteps = 1\n")
    _refused(cli("train", str(recipe)), home, "line 2", "[train")


def test_a_recipe_that_is_not_utf8(cli: Cli, home: Path, recipe: Path) -> None:
    recipe.write_bytes(b"name = '\xe4'")
    _refused(cli("train", str(recipe)), home, "not UTF-8", "line 1")


def test_all_problems_of_a_recipe_in_one_message(cli: Cli, home: Path, recipe: Path) -> None:
    recipe.write_text("[train]\nlearning_rte = 1\nsteps = -1\n[adapter]\nrank = 'many'\n")
    _refused(cli("train", str(recipe)), home, "3 problems", "train.learning_rate", "train.steps", "adapter.rank")


def test_bad_settings(cli: Cli, home: Path, recipe: Path) -> None:
    _refused(cli("train", str(recipe), "--set", "train.learning_rate"), home, "no '='")
    _refused(cli("train", str(recipe), "--set", "adapter.rnk=4"), home, "adapter.rank")
    _refused(cli("train", str(recipe), "--set", "adapter.rank=\x1b[31m"), home, "adapter.rank")


def test_an_unknown_model(cli: Cli, home: Path, recipe: Path) -> None:
    _refused(cli("train", str(recipe), "--set", "model.base=./nowhere"), home, "nowhere")
    _refused(cli("train", str(recipe), "--set", "model.base=/no/such/folder"), home, "/no/such/folder")
    _refused(cli("train", str(recipe), "--set", "model.base=a b c"), home, "a b c")


def test_an_unknown_hub_model_without_a_connection(recipe: Path, home: Path) -> None:
    command = [sys.executable, "-m", "studio", "train", str(recipe), "--set", "model.base=nobody/nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    _refused(Outcome(done.returncode, done.stdout, done.stderr), home, "nobody/nothing")


def test_a_model_folder_without_config(cli: Cli, home: Path, recipe: Path, tmp_path: Path) -> None:
    folder = _model(tmp_path / "model", config=False)
    _refused(cli("train", str(recipe), "--set", f"model.base={folder}"), home, "config.json")


@pytest.mark.parametrize(
    "weights",
    [
        b"",
        b"\x00" * 7,
        b"not a safetensors file at all",
        struct.pack("<Q", 2**60),
        _header({"a": {}}, length=5000),
        _header("no table"),
        _header({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}),
    ],
    ids=["empty", "short", "text", "huge", "cut", "string", "missing-data"],
)
def test_corrupt_safetensors(cli: Cli, home: Path, recipe: Path, tmp_path: Path, weights: bytes) -> None:
    folder = _model(tmp_path / "model", weights=weights)
    _refused(cli("train", str(recipe), "--set", f"model.base={folder}"), home, "model.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["rows.jsonl"]),
        (b"", ["rows.jsonl"]),
        (b"\n\n", ["rows.jsonl"]),
        (b'{"colour": "red", "size": 1}\n', ["colour"]),
        (ROW.encode() * 3 + b'{"prompt": "a", \n', ["line 4"]),
        (ROW.encode() + b"\xff\xfe\n", ["line 2"]),
        (ROW.encode() + b"[1, 2]\n", ["2"]),
    ],
    ids=["missing", "empty", "blank", "columns", "json", "utf8", "no-object"],
)
def test_data_that_cannot_be_used(cli: Cli, home: Path, recipe: Path, content: bytes | None, words: list[str]) -> None:
    path = Path("rows.jsonl")
    path.unlink() if content is None else path.write_bytes(content)
    _refused(cli("train", str(recipe)), home, "data.path", *words)


def test_a_damaged_parquet_file(cli: Cli, home: Path, recipe: Path) -> None:
    Path("rows.parquet").write_bytes(b"PAR1 and then nothing PAR1")
    _refused(cli("train", str(recipe), "--set", "data.path=rows.parquet"), home, "rows.parquet")


def test_a_runs_folder_that_cannot_be(cli: Cli, home: Path, recipe: Path) -> None:
    _refused(cli("train", str(recipe), "--runs-dir", str(recipe)), home, "--runs-dir")


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["runs"],
        ["runs", "nonsense"],
        ["runs", "show"],
        ["train"],
        ["merge", "x"],
        ["data"],
        ["data", "check"],
        ["--nonsense"],
        ["train", "demo", "--nonsense\x1b[31m"],
        ["data", "check", "embedded", "--seq", "0"],
        ["data", "check", "embedded", "--seq", "many"],
        ["data", "check", "embedded", "--seq", "5"],
        ["data", "check", "embedded", "--format", "sharegpt"],
        ["runs", "stop", "last", "--wait", "long"],
    ],
)
def test_a_command_line_that_makes_no_sense(cli: Cli, home: Path, words: list[str]) -> None:
    outcome = cli(*words)
    _refused(outcome, home)
    assert len(outcome.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["fit", "demo", "--data", "x"],
            "lora-studio fit: unrecognized arguments: --data x; see: lora-studio fit -",
        ),
        (["plan", "demo", "--jsn"], "lora-studio plan: unrecognized arguments: --jsn; perhaps --json; see: "),
        (["runs", "list", "all"], "lora-studio runs list: unrecognized arguments: all; see: lora-studio runs list --"),
        (["--jsno"], "lora-studio: unrecognized arguments: --jsno; see: lora-studio --help"),
    ],
)
def test_a_word_that_the_verb_does_not_know_is_answered_with_the_verbs_help(
    cli: Cli, home: Path, words: list[str], said: str
) -> None:
    _refused(cli(*words), home, said)


@pytest.mark.parametrize(
    "words",
    [
        ["runs", "list", "--runs-dir", "~nobody.here/runs"],
        ["train", "~nobody.here/r.toml"],
        ["merge", "~nobody.here/adapter", "--out", "x"],
        ["export", "~nobody.here/adapter", "--format", "peft", "--out", "x"],
        ["chat", "~nobody.here/model"],
        ["data", "check", "~nobody.here/rows.jsonl"],
    ],
)
def test_the_home_of_somebody_who_is_not_here(cli: Cli, home: Path, words: list[str]) -> None:
    _refused(cli(*words), home, "no home folder is known")


@pytest.mark.parametrize("verb", ["show", "attach", "stop", "pause", "resume", "rm"])
@pytest.mark.parametrize("word", ["last", "nosuch", "../..", "\x1b]0;title\x07", ""])
def test_a_run_that_is_not_there(cli: Cli, home: Path, verb: str, word: str) -> None:
    _refused(cli("runs", verb, word), home)


def test_merging_what_is_no_adapter(cli: Cli, home: Path, tmp_path: Path) -> None:
    _refused(cli("merge", str(tmp_path), "--out", "x"), home)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = adapter / "adapter_config.json"
    for text in ("", "{}", "[]", '{"base_model_name_or_path": 7}', "[" * 100_000):
        config.write_text(text)
        _refused(cli("merge", str(adapter), "--out", "x"), home, "adapter_config.json")
    config.write_text('{"base_model_name_or_path": "./gone"}')
    _refused(cli("merge", str(adapter), "--out", "x"), home, "gone")
    Path("full").mkdir()
    (Path("full") / "file").write_text("")
    _refused(cli("merge", str(adapter), "--out", "full", "--base", "embedded"), home, "not empty")


def test_checking_a_file_that_is_not_there(cli: Cli, home: Path) -> None:
    _refused(cli("data", "check", "nowhere.jsonl"), home, "nowhere.jsonl")


def test_the_traceback_is_there_for_who_asks(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_DEBUG", "1")
    outcome = cli("train", "./nowhere.toml")
    assert outcome.code == 2
    assert "Traceback" in outcome.err


@pytest.mark.parametrize(
    "words", [("plan", ""), ("plan", "--model", ""), ("plan", "--gpu", ""), ("train", ""), ("fit", "demo", "--gpu", "")]
)
def test_an_empty_name_is_a_slip_and_no_default(cli: Cli, words: tuple[str, ...]) -> None:
    outcome = cli(*words)
    assert outcome.code == 2
    assert "is empty" in outcome.err


@pytest.mark.parametrize(
    ("shell", "code", "out", "err"),
    [
        ('exec "$@" plan nope --json 2>&-', 2, "", ""),
        ('exec "$@" setup --json <&- >&-', 0, "", ""),
        ('exec "$@" chat embedded --json <&-', 2, "", "the question is empty"),
        ('exec "$@" recipes >/dev/full', 1, "", "is full"),
        ('exec "$@" <&-', 0, "no runs", ""),
        ('mkdir gone; cd gone; rmdir ../gone; exec "$@" plan demo --json', 2, "", "the current folder was deleted"),
    ],
)
def test_closed_streams_and_a_deleted_current_folder(home: Path, shell: str, code: int, out: str, err: str) -> None:
    words = ["sh", "-c", shell, "sh", sys.executable, "-m", "tests.fakes.cli"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert out in done.stdout
    assert bool(out) == bool(done.stdout)
    assert err in done.stderr


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.EROFS, 2, "/home/x/setup.json is read-only"),
        (errno.EACCES, 2, "permission denied"),
        (errno.ENAMETOOLONG, 2, "too long a name"),
        (errno.EDQUOT, 1, "quota"),
        (errno.EIO, 2, "read or write error"),
        (errno.EBADF, 1, "unexpected OSError"),
    ],
)
def test_a_disk_that_refuses_is_told_in_words(number: int, code: int, said: str) -> None:
    told, exit_code = _told(OSError(number, os.strerror(number), "/home/x/setup.json"))
    assert said in told
    assert exit_code == code
