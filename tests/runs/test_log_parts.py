"""Whatever is written is read, by everyone who reads a log: in order, from its ends, and as a run's status."""

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.events import KINDS, Failed, Finished, Phase, RunEvent, Started, StepDone, Unknown, Warned
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import MOST_LINE_BYTES, EventTail, EventWriter, read_events
from studio.runs.log_parts import log_head, log_tail
from studio.runs.status import Status, run_status
from tests.examples import examples

_WORDS = st.text(max_size=30) | st.sampled_from(["\x1b[31m\0", "\ud800", "\n\r\u2028", '"\\', "日本語", "x"])
_TEXTS = st.builds(lambda word, times: word * times, _WORDS, st.sampled_from([1, 1, 1, 300, 5_000, 60_000]))
_NUMBERS = st.integers(-(2**53), 2**53) | st.floats()
_LEAVES = st.none() | st.booleans() | _NUMBERS | _TEXTS
_RESULTS = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXTS, inner, max_size=4), max_leaves=8
)


def _values(kind: type[RunEvent]) -> dict[str, st.SearchStrategy[Any]]:
    """How each field of an event is drawn, by its declared type."""
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for item in fields(kind):
        declared = str(item.type).removeprefix("<class '")
        if item.name == "at":
            drawn[item.name] = st.floats(0, 2e9)
        elif item.name == "versions":
            drawn[item.name] = st.dictionaries(_TEXTS, _TEXTS, max_size=3)
        elif declared.startswith("dict"):
            drawn[item.name] = st.dictionaries(_TEXTS, _RESULTS, max_size=4)
        elif declared.startswith("list"):
            drawn[item.name] = st.lists(_RESULTS, max_size=4)
        elif declared.startswith("bool"):
            drawn[item.name] = st.booleans()
        elif declared.startswith("int"):
            drawn[item.name] = st.integers(-(2**53), 2**53)
        elif declared.startswith("float"):
            drawn[item.name] = st.floats()
        else:
            drawn[item.name] = _TEXTS
    return drawn


_EVENTS = st.one_of([st.builds(kind, **_values(kind)) for kind in KINDS.values()])
_ENDS = st.one_of([st.builds(kind, **_values(kind)) for kind in (Failed, Finished)])


def _write(folder: Path, events: list[RunEvent]) -> RunPaths:
    paths = RunPaths(folder)
    writer = EventWriter(paths.events)
    for event in events:
        writer.write(event)
    writer.close()
    return paths


@settings(max_examples=examples(60))
@given(before=st.lists(_EVENTS, max_size=4), end=_ENDS)
def test_any_event_is_read_by_every_reader(
    tmp_path_factory: pytest.TempPathFactory, before: list[RunEvent], end: RunEvent
) -> None:
    written = [*before, end]
    paths = _write(tmp_path_factory.mktemp("log"), written)
    lines = paths.events.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(written)
    assert max(map(len, lines)) <= 2**19
    in_order = read_events(paths.events)
    assert [event.kind for event in in_order] == [event.kind for event in written]
    tail, followed = EventTail(paths.events), []
    while some := tail.poll(limit=512):
        followed += some
    assert [event.kind for event in followed] == [event.kind for event in written]
    assert isinstance(log_tail(paths.events).last(type(end)), type(end))
    assert isinstance(log_tail(paths.events, 16).last(type(end)), type(end))
    assert isinstance(log_head(paths.events, 16).first(type(written[0])), type(written[0]))
    status = run_status(paths)
    if isinstance(end, Finished):
        assert status is (Status.stopped if end.outcome == "stopped" else Status.finished)
    else:
        assert status is Status.failed
    History().fold(in_order)


def test_a_terminal_event_above_the_tails_width_is_an_end(tmp_path: Path) -> None:
    """As a merge of long prompts left it, before events were bounded."""
    paths = RunPaths(tmp_path)
    table = {"schema": 1, "kind": "Finished", "at": 1.0, "outcome": "done", "result": {"prompt": "x" * 200_000}}
    paths.events.write_text(json.dumps({"schema": 1, "kind": "Started", "at": 1.0, "job": "merge"}) + "\n"
                            + json.dumps(table) + "\n")  # fmt: skip
    assert run_status(paths) is Status.finished
    last = log_tail(paths.events).last(Finished)
    assert last is not None
    assert len(last.result["prompt"]) == 200_000


def test_a_torn_end_does_not_hide_the_line_before(tmp_path: Path) -> None:
    paths = _write(tmp_path, [Failed(at=1.0, failure="f", message="m", advice="a")])
    with paths.events.open("a") as log:
        log.write("x" * 100_000)
    assert isinstance(log_tail(paths.events).last(Failed), Failed)


def test_long_texts_are_cut_and_say_so_and_short_ones_stay_whole(tmp_path: Path) -> None:
    result = {"closeness": {"mean_kl": 0.1}, "side_by_side": [{"prompt": "p" * 39_000, "merged": "m" * 39_000}]}
    whole = {"sha256": "0" * 64, "files": [{"name": f"model-{number}.safetensors"} for number in range(300)]}
    end = Finished(at=1.0, outcome="done", result={**result, "base": whole})
    (event,) = read_events(_write(tmp_path, [end]).events)
    assert isinstance(event, Finished)
    assert event.result["base"] == whole
    assert event.result["closeness"] == result["closeness"]
    assert event.result["side_by_side"][0]["prompt"].startswith("pppp")
    assert event.result["side_by_side"][0]["prompt"].endswith("more characters)")
    assert (tmp_path / "events.jsonl").stat().st_size <= MOST_LINE_BYTES


def test_what_is_as_long_as_it_may_be_is_not_touched(tmp_path: Path) -> None:
    event = Warned(at=1.0, message="m" * (MOST_LINE_BYTES - 200))
    assert read_events(_write(tmp_path, [event]).events) == [event]


def test_more_things_than_a_log_can_hold_leave_the_event_itself(tmp_path: Path) -> None:
    end = Finished(at=1.0, outcome="done", step=7, result={str(number): [number] * 10 for number in range(14_000)})
    assert read_events(_write(tmp_path, [end]).events) == [replace(end, result={})]


def test_a_log_without_a_line_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * (9 * 2**20))
    assert log_tail(path).data == b""
    assert log_head(path).data == b""


def test_the_first_event_may_be_long(tmp_path: Path) -> None:
    start = Started(at=1.0, job="train", model="m" * 20_000)
    paths = _write(tmp_path, [start, Phase(at=2.0, name="load")])
    assert log_head(paths.events).first(Started) == start
    assert not any(isinstance(event, Unknown | StepDone) for event in read_events(paths.events))
