"""The file of observations: whole, bounded, and harmless whatever lies in its place."""

import json
import multiprocessing
from pathlib import Path

import pytest

from studio.core.calibration import Observation, Setting
from studio.runs.calibration import calibration_path, read_observations, remember

SETTING = Setting("NVIDIA A100", "studio 0.1.0", "lora", (("peft", "0.21.2"), ("torch", "2.13.0")))


def observation(run: str = "run-1", at: float = 1.0, **more: object) -> Observation:
    fields: dict[str, object] = {"run": run, "at": at, "setting": SETTING, "predicted": (1, 2, 3)}
    fields |= {"allocated_bytes": 10, "speed_factor": 0.9, "stages": (("load", 5, 6),)}
    return Observation(**(fields | more))  # type: ignore[arg-type]


def test_what_was_remembered_is_read_again(tmp_path: Path):
    path = tmp_path / "new" / "calibration.json"
    assert read_observations(path) == ()
    remember(observation(), path)
    remember(observation("run-2", 2.0, resident_bytes=7), path)
    assert read_observations(path) == (observation(), observation("run-2", 2.0, resident_bytes=7))


def test_a_run_that_ends_again_replaces_what_it_said(tmp_path: Path):
    path = tmp_path / "calibration.json"
    remember(observation(), path)
    remember(observation(at=5.0, allocated_bytes=11), path)
    assert read_observations(path) == (observation(at=5.0, allocated_bytes=11),)


def test_the_newest_of_each_setting_stay(tmp_path: Path):
    path = tmp_path / "calibration.json"
    other = Setting("cpu: x", "studio 0.1.0", "lora", ())
    remember(observation("other", 0.5, setting=other), path)
    for number in range(20):
        remember(observation(f"run-{number}", float(number + 1)), path)
    found = read_observations(path)
    assert [item.run for item in found] == ["other", *(f"run-{number}" for number in range(8, 20))]


def test_it_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    remember(observation())
    assert calibration_path() == tmp_path / "home" / "calibration.json"
    assert read_observations() == (observation(),)


SOUND = {
    "run": "a",
    "at": 1.0,
    "device": "cpu: x",
    "engine": "studio 0.1.0",
    "method": "lora",
    "versions": {"torch": "2"},
    "predicted": [1, 2, 3],
    "stages": [],
}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00\xff\xfe garbage \x1b]52;c;AAAA\x07",
        b"[]",
        b"null",
        b"{}",
        b'{"schema": 1}',
        b'{"schema": 99, "observations": []}',
        b'{"schema": 1, "observations": {"a": 1}}',
        b'{"schema": 1, "observations": [1, null, "x", [], {}]}',
        b"[" * 100_000,
        b'{"schema": 1, "observations": [' + b" " * 2**21 + b"]}",
        json.dumps({"schema": 2, "observations": [SOUND]}).encode(),
    ],
)
def test_what_is_no_calibration_is_none(tmp_path: Path, content: bytes):
    path = tmp_path / "calibration.json"
    path.write_bytes(content)
    assert read_observations(path) == ()


@pytest.mark.parametrize(
    "change",
    [
        {"at": "NaN"},
        {"at": float("nan")},
        {"at": float("inf")},
        {"at": -1},
        {"at": 10**400},
        {"predicted": [1, 2]},
        {"predicted": [1, 2, -3]},
        {"predicted": [1, 2, 10**30]},
        {"predicted": [1, 2, True]},
        {"predicted": [1, 2, 3.5]},
        {"device": ""},
        {"device": "x" * 5000},
        {"device": 5},
        {"versions": {"torch": 2}},
        {"versions": {str(number): "1" for number in range(100)}},
        {"versions": []},
        {"stages": [["load", 1]]},
        {"stages": 7},
        {"speed_factor": float("nan")},
        {"speed_factor": 0},
        {"speed_factor": "fast"},
        {"allocated_bytes": 1e308},
        {"allocated_bytes": -1},
    ],
)
def test_an_unsound_observation_is_passed_over_and_its_neighbours_are_not(tmp_path: Path, change: dict[str, object]):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"schema": 1, "observations": [SOUND, {**SOUND, **change}, SOUND]}))
    assert [item.run for item in read_observations(path)] == ["a", "a"]


def test_words_of_the_file_reach_no_terminal_raw(tmp_path: Path):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps({"schema": 1, "observations": [{**SOUND, "device": "x\x1b]0;owned\x07y"}]}))
    (found,) = read_observations(path)
    assert "\x1b" not in found.setting.device


def test_a_folder_in_its_place_is_none(tmp_path: Path):
    (tmp_path / "calibration.json").mkdir()
    assert read_observations(tmp_path / "calibration.json") == ()


def test_a_garbled_file_is_replaced_by_the_next_run(tmp_path: Path):
    path = tmp_path / "calibration.json"
    path.write_bytes(b"\xffgarbage")
    remember(observation(), path)
    assert read_observations(path) == (observation(),)


def _remember(path: Path, number: int) -> None:
    remember(observation(f"run-{number}", float(number)), path)


def test_two_runs_that_end_at_once_are_both_kept(tmp_path: Path):
    path = tmp_path / "calibration.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_remember, args=(path, number)) for number in range(1, 7)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert {item.run for item in read_observations(path)} == {f"run-{number}" for number in range(1, 7)}
