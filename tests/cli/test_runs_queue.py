"""`lora-studio runs queue` and `train --queue`: what each says, and what is asked where the card is busy."""

import io
import json
from pathlib import Path

import pytest

from studio.launch.kinds import Checked
from studio.probe.cards import Card
from studio.probe.device import Place
from studio.runs.control import request
from studio.runs.queue import Queue
from studio.runs.status import Status, run_status
from tests.cli.conftest import Cli
from tests.fakes.runs import LiveWorker, make_run, wait_for


def test_the_queue_is_listed_changed_and_emptied(cli: Cli, home: Path) -> None:
    assert cli("runs", "queue", "list").out == "no run waits\n"
    runs = [make_run(home, name) for name in ("one", "two", "three")]
    for paths in runs:
        request(paths, "queued")
        Queue().add(paths, {"GPU-1": {}})
    with LiveWorker(runs[0]):
        (first, *_) = cli("runs", "queue", "list", "--json").document["waiting"]
    assert first == {
        "place": 1, "run": runs[0].name, "path": str(runs[0].root), "alive": True, "cards": ["GPU-1"], "at_work": []
    }  # fmt: skip
    lines = cli("runs", "queue", "move", "three", "first").out.splitlines()
    assert [line.split()[1].split("-")[0] for line in lines[1:]] == ["three", "one", "two"]
    assert "its process has ended: lora-studio runs queue resume" in lines[1]
    refused = cli("runs", "queue", "move", "three", "0")
    assert (refused.code, "wanted first, last or a number from 1" in refused.err) == (2, True)
    assert cli("runs", "queue", "cancel", "one", "two", "--json").document == {
        "cancelled": [runs[0].name, runs[1].name]
    }
    refused = cli("runs", "queue", "cancel", "one")
    assert (refused.code, "does not wait in the queue" in refused.err) == (2, True)
    assert [entry.run for entry in Queue().waiting()] == [runs[2]]


def test_a_run_that_waited_when_the_machine_went_down_is_served(cli: Cli, home: Path) -> None:
    paths = make_run(home, "one")
    request(paths, "queued")
    Queue().add(paths, {"cpu": {}})
    assert cli("runs", "queue", "resume", "--json").document == {"resumed": [paths.name], "refused": []}
    wait_for(lambda: run_status(paths) is Status.finished)
    assert cli("runs", "queue", "resume").out == "no run in the queue needs a new process\n"


def test_training_by_way_of_the_queue(cli: Cli, home: Path, tmp_path: Path) -> None:
    rows = ({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = cli("train", "demo", "--data", str(tmp_path / "rows.jsonl"), "--queue", "--json")
    assert (done.code, done.document["status"]) == (0, "finished")


@pytest.mark.parametrize(
    ("answer", "waits"), [("\n", True), ("q\n", True), ("s\n", False), ("c\n", None), ("", True), (None, False)]
)
def test_a_person_at_a_busy_card_is_asked_and_a_script_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str | None, waits: bool
) -> None:
    from studio.commands import train
    from studio.core.errors import StudioError

    place = Place(Card(0, "X", uuid="GPU-1"), "GPU-1")
    report = Checked(object(), place)
    assert train._wait_for_card(report, may_ask=True) is False
    held = Queue().take(make_run(home, "busy"), "GPU-1")
    assert held is not None
    typed = io.StringIO(answer or "")
    monkeypatch.setattr(typed, "isatty", lambda: answer is not None)
    monkeypatch.setattr("sys.stdin", typed)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    if waits is None:
        with pytest.raises(StudioError, match="no run was made"):
            train._wait_for_card(report, may_ask=True)
    else:
        assert train._wait_for_card(report, may_ask=True) is waits
    assert "at work on this card: busy-" in capsys.readouterr().err
