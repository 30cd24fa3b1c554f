import os
import time
from pathlib import Path

import psutil
import pytest

from studio.core.errors import BadInput
from studio.core.events import Evaluated, Finished, Planned, Started, StepDone
from studio.runs.layout import RunPaths
from studio.runs.status import Status
from studio.runs.store import find_run, list_runs, remove_run
from tests.fakes.runs import make_run, write_log

DAY = 86_400.0


def _step(step: int, loss: float) -> StepDone:
    return StepDone(at=2.0, step=step, loss=loss, learning_rate=1.0, grad_norm=1.0, tokens=1, seconds=1.0)


def _trained(root: Path, name: str, at: float, steps: int = 5) -> RunPaths:
    paths = make_run(root, name, now=at)
    write_log(
        paths,
        Started(at=at, job="train", method="lora", model="m"),
        Planned(
            at=at,
            total_steps=steps,
            trainable_parameters=1,
            rows=1,
            held_out_rows=1,
            device="cpu",
            dtype="bf16",
            loss_path="full",
        ),
        *(_step(step, 10.0 - step / steps) for step in range(1, steps + 1)),
        Evaluated(at=at, step=steps, loss=3.0, loss_tokens=1, rows=1, seconds=1.0),
        Finished(at=at, outcome="done", step=steps),
    )
    return paths


def test_runs_are_listed_newest_first_with_what_the_ends_of_their_logs_tell(tmp_path: Path) -> None:
    old, new = _trained(tmp_path, "old", DAY), _trained(tmp_path, "new", 2 * DAY)
    infos = list_runs(tmp_path / "runs")
    assert [info.paths for info in infos] == [new, old]
    info = infos[0]
    assert (info.status, info.job, info.method, info.model) == (Status.finished, "train", "lora", "m")
    assert (info.last_step, info.total, info.last_loss, info.eval_loss, info.started_at) == (5, 5, 9.0, 3.0, 2 * DAY)


def test_strangers_among_the_runs_are_passed_over(tmp_path: Path) -> None:
    _trained(tmp_path, "real", DAY)
    root = tmp_path / "runs"
    (root / "empty").mkdir()
    (root / "file").write_text("")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "recipe.toml").write_text("")
    damaged = root / "damaged"
    damaged.mkdir()
    (damaged / "events.jsonl").write_bytes(b"\xff\xfe\n{}\n[]\n")
    assert [info.name for info in list_runs(root)] == [
        "damaged",
        next(path.name for path in root.iterdir() if path.name.startswith("real")),
    ]
    assert list_runs(tmp_path / "missing") == []


def test_a_run_is_found_by_name_beginning_path_and_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _trained(tmp_path, "alpha", DAY), _trained(tmp_path, "beta", 2 * DAY)
    root = tmp_path / "runs"
    assert find_run(root, first.name) == first
    assert find_run(root, "alp") == first
    assert find_run(root, "last") == second
    assert find_run(tmp_path / "elsewhere", str(first.root)) == first
    monkeypatch.chdir(first.root)
    assert find_run(root, ".").root == first.root


@pytest.mark.parametrize("word", ["nosuch", "", "\x1b[31m", "../runs", "/", "a\0b", "..", "a/b\0"])
def test_a_word_that_is_no_run_is_refused(tmp_path: Path, word: str) -> None:
    _trained(tmp_path, "alpha", DAY)
    with pytest.raises(BadInput) as caught:
        find_run(tmp_path / "runs", word)
    assert "\x1b" not in str(caught.value)
    assert "\0" not in str(caught.value)


def test_a_beginning_of_several_names_is_refused_with_the_names(tmp_path: Path) -> None:
    one, two = _trained(tmp_path, "same", DAY), _trained(tmp_path, "same", 2 * DAY)
    with pytest.raises(BadInput, match=rf"2 runs.*{one.name}.*{two.name}"):
        find_run(tmp_path / "runs", "same")


def test_last_among_no_runs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no runs"):
        find_run(tmp_path / "runs", "last")


def test_removing_takes_the_whole_folder_and_nothing_else(tmp_path: Path) -> None:
    first, second = _trained(tmp_path, "alpha", DAY), _trained(tmp_path, "beta", DAY)
    remove_run(first)
    assert not first.root.exists()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == [second.name]
    with pytest.raises(BadInput, match="no run folder"):
        remove_run(first)


def test_a_link_or_a_folder_that_is_no_run_is_not_removed(tmp_path: Path) -> None:
    real = _trained(tmp_path, "alpha", DAY)
    link = tmp_path / "runs" / "link"
    link.symlink_to(real.root)
    with pytest.raises(BadInput):
        remove_run(RunPaths(link))
    with pytest.raises(BadInput):
        remove_run(RunPaths(tmp_path))
    assert real.recipe.is_file()


def test_somebodys_own_folder_with_a_recipe_in_it_is_not_removed(tmp_path: Path) -> None:
    own = tmp_path / "project"
    own.mkdir()
    (own / "recipe.toml").write_text("name = 'mine'\n")
    (own / "thesis.txt").touch()
    long_ago = time.time() - DAY  # a folder made a moment ago counts as a run that starts, which is refused anyway
    os.utime(own / "recipe.toml", (long_ago, long_ago))
    os.utime(own, (long_ago, long_ago))
    with pytest.raises(BadInput, match="no run folder"):
        remove_run(find_run(tmp_path / "runs", str(own)))
    assert (own / "thesis.txt").is_file()


def test_hundreds_of_long_runs_are_listed_without_reading_them_whole(tmp_path: Path) -> None:
    paths = _trained(tmp_path, "long", DAY, steps=20_000)
    text = paths.events.read_bytes()
    assert len(text) > 2 * 2**20
    for number in range(20):
        copy = make_run(tmp_path, f"copy{number}", now=DAY)
        copy.events.write_bytes(text)
    before = psutil.Process().io_counters().read_chars
    infos = list_runs(tmp_path / "runs")
    read = psutil.Process().io_counters().read_chars - before
    assert len(infos) == 21
    assert all(info.last_step == 20_000 and info.total == 20_000 for info in infos)
    assert read < 0.2 * 21 * len(text)


@pytest.mark.parametrize("name", ["events.jsonl", "recipe.toml", "note.txt", "process.json"])
@pytest.mark.parametrize("link", [False, True])
def test_a_pipe_or_device_among_the_files_of_a_run_does_not_hold_up_the_list(
    tmp_path: Path, name: str, link: bool
) -> None:
    _trained(tmp_path, "real", DAY)
    trap = _trained(tmp_path, "trap", DAY)
    place = trap.root / name
    place.unlink(missing_ok=True)
    if link:
        place.symlink_to("/dev/zero")
    else:
        os.mkfifo(place)
    assert [info.name[:4] for info in list_runs(tmp_path / "runs")] == ["real"]
