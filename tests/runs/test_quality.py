"""The file of races: what is kept, what is replaced, and that no rubbish in it breaks a reader."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from studio.core.intervals import Interval
from studio.runs.quality import LaneResult, read_results, remember_results

LORA = LaneResult("m1", "d1", "lora", "run-1", Interval(2.0, 1.9, 2.1), Interval(0.0, 0.0, 0.0), 400, 30, 120.5)
QLORA = replace(
    LORA, lane="qlora", run="run-2", loss=Interval(2.1, 2.0, 2.2), more=Interval(0.1), tokens_per_second=None
)


def test_kept_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "home" / "quality.json"
    remember_results((LORA, QLORA), path)
    assert read_results(path) == (LORA, QLORA)


def test_a_newer_race_takes_the_place_of_the_older_one_of_its_model_and_data(tmp_path: Path) -> None:
    path = tmp_path / "quality.json"
    remember_results((LORA, QLORA), path)
    other, again = replace(LORA, data="d2"), replace(LORA, run="run-3", steps=60)
    remember_results((other, again), path)
    assert read_results(path) == (QLORA, other, again)


def test_it_lies_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    assert read_results() == ()
    remember_results((LORA,))
    assert read_results() == read_results(tmp_path / "home" / "quality.json") == (LORA,)


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe rubbish",
        b"[]",
        b'{"schema": 99, "outcomes": []}',
        b'{"schema": 1, "outcomes": {}}',
        b'{"schema": 1, "outcomes": [1, null, {}, {"model": 3}]}',
        b"[" * 100_000,
    ],
)
def test_rubbish_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "quality.json"
    path.write_bytes(content)
    assert read_results(path) == ()
    remember_results((LORA,), path)
    assert read_results(path) == (LORA,)


@pytest.mark.parametrize(
    "change",
    [
        {"loss": {"value": float("nan"), "low": 1.0, "high": 2.0}},
        {"loss": {"value": "2", "low": None, "high": None}},
        {"tokens": -1},
        {"tokens": True},
        {"steps": 1e300},
        {"tokens_per_second": float("inf")},
        {"tokens_per_second": 10**400},
        {"lane": "x" * 10_000},
    ],
)
def test_an_unsound_result_is_passed_over_and_the_others_are_kept(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "quality.json"
    remember_results((LORA, QLORA), path)
    document = json.loads(path.read_text())
    document["outcomes"][0] |= change
    path.write_text(json.dumps(document))
    assert read_results(path) == (QLORA,)
