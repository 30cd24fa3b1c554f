import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers

from studio import __version__
from studio.cli import VERBS
from studio.commands import demo, terminal
from studio.commands import gpus as gpus_verb
from studio.commands.loss_plot import loss_plot, thinned, ticks
from studio.core.events import Evaluated, Sampled, StepDone
from studio.probe.cards import Card, Driver
from studio.probe.device import Sight
from studio.probe.torch_cards import TorchBuild
from studio.runs.history import History
from studio.runs.store import list_runs
from tests.cli.conftest import Cli


def test_version_and_help(cli: Cli) -> None:
    assert cli("--version").out == f"lora-studio {__version__}\n"
    outcome = cli("--help")
    assert outcome.code == 0
    for verb, about in VERBS.items():
        assert verb in outcome.out
        assert about in outcome.out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "plan"])
def test_every_verb_has_help(cli: Cli, verb: str) -> None:
    outcome = cli(verb, "--help")
    assert outcome.code == 0
    assert f"usage: lora-studio {verb}" in outcome.out


def test_without_a_terminal_the_runs_are_plain_text_and_it_says_why(cli: Cli) -> None:
    outcome = cli()
    assert outcome.code == 0
    assert "no runs in" in outcome.out
    assert "needs a terminal" in outcome.err
    assert "--help" in outcome.err


class _Terminal(io.StringIO):
    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("term", "encoding", "reason"),
    [
        ("xterm-256color", "utf-8", ""),
        ("dumb", "utf-8", "TERM is 'dumb'"),
        ("", "utf-8", "TERM is ''"),
        ("xterm", "ascii", ""),
    ],
)
def test_the_studio_opens_only_where_it_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, term: str, encoding: str, reason: str
) -> None:
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, _Terminal(encoding))
    found = terminal.why_no_studio({"TERM": term})
    assert reason in found if reason else found == ""
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.StringIO())
        assert "needs a terminal" in terminal.why_no_studio({"TERM": "xterm"})
        monkeypatch.setattr(sys, stream, _Terminal(encoding))


def test_colours_only_where_they_are_welcome() -> None:
    assert terminal.is_rich(_Terminal("utf-8"), {"TERM": "xterm"})
    assert not terminal.is_rich(_Terminal("utf-8"), {"TERM": "xterm", "NO_COLOR": "1"})
    assert not terminal.is_rich(_Terminal("utf-8"), {"TERM": "dumb"})
    assert not terminal.is_rich(_Terminal("ascii"), {"TERM": "xterm"})
    assert not terminal.is_rich(io.StringIO(), {"TERM": "xterm"})


def test_what_a_recipe_calls_each_card_and_which_cannot_be_used(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    cards = [Card(0, "NVIDIA T400", "GPU-a"), Card(1, "NVIDIA A10", "GPU-b"), Card(2, "NVIDIA A10", "GPU-c")]
    build = TorchBuild("2.13.0", (13, 0))
    masked = {"CUDA_VISIBLE_DEVICES": "GPU-c,GPU-a"}
    monkeypatch.setattr(gpus_verb, "look", lambda: Sight(cards, Driver("560.35.03", (12, 6)), build, masked))
    rows = cli("gpus", "--json").document["gpus"]
    assert [row["devices"] for row in rows] == [["cuda:1"], [], ["cuda:0"]]
    assert all("580 or newer" in row["unusable"] for row in rows)
    out = cli("gpus").out
    assert "gpu 1: CUDA_VISIBLE_DEVICES hides it" in out
    assert "gpu 0: NVIDIA T400 cannot be used" in out
    monkeypatch.setattr(gpus_verb, "look", lambda: Sight(cards, Driver("580.65.06", (13, 0)), build))
    rows = cli("gpus", "--json").document["gpus"]
    assert [(row["devices"], row["unusable"]) for row in rows] == [([f"cuda:{index}"], None) for index in range(3)]


def test_cards_recipes_and_models_are_listed(cli: Cli) -> None:
    cards = cli("gpus", "--json")
    assert cards.code == 0
    assert set(cards.document) == {"driver", "gpus"}
    assert cli("gpus").code == 0
    recipes = cli("recipes", "--json").document
    assert "demo" in [recipe["name"] for recipe in recipes]
    assert all(recipe["about"] for recipe in recipes)
    assert cli("recipes").out.startswith("recipe ")
    models = cli("models", "--json").document
    assert models[0]["word"] == "embedded"
    assert models[0]["size_bytes"] > 2**27
    assert cli("models").code == 0


def test_checking_data(cli: Cli, recipe: Path) -> None:
    outcome = cli("data", "check", "rows.jsonl", "--json")
    assert outcome.code == 0
    document = outcome.document
    assert (document["ok"], document["rows"], document["format"]) == (True, 20, "prompt_completion")
    lengths = document["lengths"]["characters"]
    assert lengths["min"] == len("question 0answer 0")
    assert lengths["max"] == len("question 19answer 19")
    assert lengths["total"] == 10 * 18 + 10 * 20
    assert document["lengths"]["tokens"] is None
    assert "it can be trained on" in cli("data", "check", "rows.jsonl").out


def test_data_to_be_corrected_is_a_no_with_findings(cli: Cli, home: Path) -> None:
    rows = '{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n{"prompt": "a", \n'
    Path("bad.jsonl").write_text(rows)
    outcome = cli("data", "check", "bad.jsonl", "--json")
    assert outcome.code == 1
    assert outcome.document["ok"] is False
    assert {finding["row"] for finding in outcome.document["findings"]} == {2, 3}
    assert all({"kind", "row", "field", "message"} <= set(finding) for finding in outcome.document["findings"])
    told = cli("data", "check", "bad.jsonl")
    assert told.code == 1
    assert "error: row 3" in told.out
    assert "must be corrected" in told.out


def test_lengths_of_many_characters_are_written_out(cli: Cli, home: Path) -> None:
    Path("long.jsonl").write_text('{"text": "' + "a" * 1_034_567 + '"}\n{"text": "ab"}\n')
    told = cli("data", "check", "long.jsonl").out
    assert "min 2, median 517,284.5, p95 1,034,567, max 1,034,567, in all 1,034,569" in told
    assert "text (text), 2 rows\n" in told


def test_tokens_are_counted_by_the_models_own_tokenizer(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    words = {"question": 0, "answer": 1, "[UNK]": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(1)
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 3}
    (folder / "config.json").write_text(json.dumps(config))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "model.safetensors").write_bytes(weights)
    document = cli("data", "check", "rows.jsonl", "--model", str(folder), "--seq", "3", "--json").document
    assert document["lengths"]["tokens"] == {"min": 4, "median": 4, "p95": 4, "max": 4, "total": 80}
    assert document["counts"]["longer_than_seq"] == 20
    assert document["ok"] is True
    (folder / "tokenizer.json").write_text("{}")
    outcome = cli("data", "check", "rows.jsonl", "--model", str(folder))
    assert outcome.code == 2
    assert "tokenizer.json is damaged" in outcome.err


def test_merging_a_run_into_its_base(cli: Cli, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    out = tmp_path / "merged"
    outcome = cli("merge", run, "--out", str(out), "--json")
    assert outcome.code == 0
    assert (outcome.document["status"], outcome.document["job"]) == ("finished", "merge")
    assert outcome.document["out"] == str(out)
    assert (out / "config.json").is_file()
    assert outcome.document["run"].startswith("merge-mine-20")
    assert cli("merge", run, "--out", str(out)).code == 2
    assert f"merged model: {tmp_path / 'again'}" in cli("merge", run, "--out", str(tmp_path / "again")).out
    monkeypatch.setenv("FAKE_MERGE_FAILS", "1")
    failed = cli("merge", run, "--out", str(tmp_path / "other"))
    assert failed.code == 1
    assert "no room for the merged model" in failed.err
    merge_run = next(info for info in list_runs(Path(outcome.document["path"]).parent) if info.job == "merge")
    assert cli("merge", merge_run.name, "--out", str(tmp_path / "third")).code == 2


def test_the_demo_in_plain_lines(cli: Cli, home: Path) -> None:
    outcome = cli("demo")
    assert outcome.code == 0, outcome.err
    for word in ("run demo-", "before: no idea", "after: this", "in the data: this", "everything lies here"):
        assert word in outcome.out
    (merged,) = home.glob("runs/demo-*/merged")
    assert str(merged) in outcome.out


def test_the_demo_is_the_shipped_one_wherever_it_is_started(cli: Cli, home: Path) -> None:
    Path("demo").write_text("name = 'mine'\n")
    assert cli("demo", "--json").document["run"].startswith("demo-")


def test_the_demo_in_json(cli: Cli) -> None:
    outcome = cli("demo", "--json")
    assert outcome.code == 0
    document = outcome.document
    assert document["samples"] == [{"prompt": "what?", "expected": "this", "before": "no idea", "after": "this"}]
    assert Path(document["merged"], "model.safetensors").is_file()
    assert document["merge"]["status"] == "finished"
    assert document["train_loss"]["last"] < document["train_loss"]["first"]


@pytest.mark.parametrize("setting", ["FAKE_FAIL_AT", "FAKE_DIE_AT", "FAKE_MERGE_FAILS", "FAKE_MERGE_LIES"])
def test_a_demo_that_fails_anywhere_does_not_pass(cli: Cli, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    monkeypatch.setenv(setting, "3")
    outcome = cli("demo")
    assert outcome.code == 1
    assert outcome.err
    assert "everything lies here" not in outcome.out


def test_before_and_after_are_the_first_and_the_last_answer() -> None:
    history = History()
    for step, words in ((0, "ab"), (5, "cd"), (9, "ef")):
        history.fold(
            Sampled(at=1.0, step=step, index=index, prompt=f"p{index}", answer=word, expected="x")
            for index, word in enumerate(words)
        )
    answers = demo.before_and_after(history)
    assert [(answer["before"], answer["after"]) for answer in answers] == [("a", "e"), ("b", "f")]


def test_in_a_real_terminal_the_plain_demo_has_colours_and_fits(home: Path) -> None:
    """80 columns on a pseudo terminal: what a person sees who asks for `--no-tui`."""
    reader, writer = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONUTF8": "1"}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.cli", "demo", "--no-tui"],
        stdin=writer,
        stdout=writer,
        stderr=writer,
        env=environment,
    )
    os.close(writer)
    shown = b""
    while chunk := _read(reader):
        shown += chunk
    assert process.wait(60) == 0, shown.decode()
    assert b"\x1b[38;5;" in shown
    assert "●" in shown.decode()
    assert any(0x2800 < ord(character) <= 0x28FF for character in shown.decode())


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def _history(*losses: float) -> History:
    history = History()
    history.fold(
        StepDone(at=1.0, step=step, loss=loss, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)
        for step, loss in enumerate(losses, start=1)
    )
    return history


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("rich", [True, False])
def test_a_plot_fits_its_width(width: int, rich: bool) -> None:
    history = _history(*(3.0 / step for step in range(1, 500)))
    history.fold([Evaluated(at=1.0, step=250, loss=2.0, loss_tokens=1, rows=1, seconds=1.0)])
    text = loss_plot(history, width=width, rich=rich)
    bare = text if not rich else re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in bare.splitlines()) <= width
    assert text.isascii() is not rich


@pytest.mark.parametrize(
    "losses", [[], [1.0], [float("nan")] * 5, [1.0, float("nan"), float("inf"), 2.0], [2.0, 2.0], [1e30, 1e-30]]
)
def test_a_plot_of_anything_is_a_plot_or_nothing(losses: list[float]) -> None:
    text = loss_plot(_history(*losses), width=80, rich=False)
    assert bool(text) == (sum(loss == loss and abs(loss) < float("inf") for loss in losses) > 1)


def test_thinning_keeps_every_spike() -> None:
    points = [(step, 1.0) for step in range(10_000)]
    points[5003] = (5003, 99.0)
    points[7001] = (7001, -99.0)
    kept = thinned(points, 70)
    assert len(kept) <= 140
    assert (5003, 99.0) in kept
    assert (7001, -99.0) in kept
    assert kept == sorted(kept)


@pytest.mark.parametrize(("low", "high", "most"), [(0, 120, 5), (1, 3, 5), (7, 7, 5), (0, 99_999, 5), (5, 1234, 8)])
def test_ticks_are_round_and_few(low: int, high: int, most: int) -> None:
    found = ticks(low, high, most)
    assert 1 <= len(found) <= most + 1
    assert all(low <= tick <= high for tick in found)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.9, "9.9 s"), (59.4, "59 s"), (60, "1 min 00 s"), (3725, "1 h 02 min"), (None, "?")],
)
def test_durations(seconds: float | None, words: str) -> None:
    assert terminal.duration(seconds) == words
    assert terminal.duration(float("inf")) == "?"


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 B"), (1536, "2 KiB"), (5 * 2**20, "5.0 MiB"), (3 * 2**40, "3072.0 GiB")]
)
def test_sizes(count: int, words: str) -> None:
    assert terminal.size(count) == words
