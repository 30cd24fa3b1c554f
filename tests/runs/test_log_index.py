"""A log with an index reads as the same log without one, whoever made the index and whatever became of it."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio import cli
from studio.core.events import (
    PAIR_FIGURES,
    SILENT,
    Evaluated,
    Failed,
    Finished,
    MemorySeen,
    Paused,
    Phase,
    Planned,
    RunEvent,
    Sampled,
    Saved,
    Shrunk,
    Started,
    StepDone,
    Warned,
)
from studio.runs import log, log_index, series, watch
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import EventWriter, read_events
from studio.runs.series import RECENT_STEPS
from studio.runs.watch import RunWatch, read_history
from tests.fakes.runs import make_run

_LOSSES = (math.nan, math.inf, 1.0, 0.5, 2.5)
_WORKERS = st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=4)
_SAME = (
    *("started", "planned", "phase", "samples", "saved", "warnings", "paused", "paused_for", "failed", "finished"),
    *("unknown", "last_at", "earlier_seconds", "last_step", "total_steps", "seconds", "tokens_per_second"),
    *("seconds_per_step", "eta_seconds", "evals", "shrunk"),
)
_RISES = (1, 1, 1, 1, 2, -2)


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Blocks of a few lines, so that short logs have many."""
    sizes = {(log_index, "BLOCK_BYTES"): 900, (log_index, "_LEAST_BYTES"): 300, (watch, "BLOCK_BYTES"): 900}
    with mock.patch.object(watch, "POLL_BYTES", 1):
        patches = [mock.patch.object(module, name, size) for (module, name), size in sizes.items()]
        for patch in patches:
            patch.start()
        try:
            yield
        finally:
            for patch in patches:
                patch.stop()


def _step(step: int, loss: float = 1.0, margin: float | None = None) -> StepDone:
    pairs: dict[str, Any] = {} if margin is None else dict.fromkeys(PAIR_FIGURES, margin)
    return StepDone(
        at=100.0 + step, step=step, loss=loss, learning_rate=1e-4, grad_norm=0.5, tokens=7 * step, seconds=0.1 * step,
        **pairs,
    )  # fmt: skip


def _told(worker: bytes) -> list[RunEvent | bytes]:
    """What one worker tells, made of any bytes: steps from where it goes on, and everything else in between.

    Bytes among the events are lines that are none of ours.
    """
    step = worker[0] if worker else 0
    lines: list[RunEvent | bytes] = []
    if step % 4:
        lines.append(Started(at=float(step), job="train", resumed_from=step, total_steps=100))
    for number in worker[1:]:
        step = max(0, step + _RISES[number % len(_RISES)])
        at = float(number)
        loss = _LOSSES[number % len(_LOSSES)]
        lines.append(_step(step, loss, None if worker[0] % 3 else at))
        read = number % 7 * 10 if number % 5 else None
        choices: list[RunEvent | bytes] = [
            Evaluated(at=at, step=step, loss=loss, loss_tokens=9, rows=2, seconds=0.1),
            Sampled(at=at, step=step, index=number % 2, prompt="p", answer="a", expected="e"),
            Saved(at=at, what="merged" if number % 2 else "checkpoint", path="p", step=step),
            Warned(at=at, message="m", topic=SILENT if number % 2 else ""),
            Phase(at=at, name="n", detail="waits"),
            Paused(at=at, step=step, paused=number % 2 == 0, reason="r"),
            Planned(at=at, total_steps=number, trainable_parameters=1, rows=1, held_out_rows=1, device="cpu",
                    dtype="fp32", loss_path="full"),
            Failed(at=at, failure="f", message="m", advice="a"),
            Finished(at=at, outcome="done"),
            Shrunk(at=at, step=step, stage="work", words="w", batch_tokens=number),
            b"not one of ours",
            b'{"kind": "StepDone", "at": 1.0, "step": "many"}',
            b"",
        ]  # fmt: skip
        reading = MemorySeen(at=at, step=number % 60, stage="step" if number % 2 else "backward", peak_bytes=read,
                             resident_peak_bytes=number)  # fmt: skip
        kind = number // 2 % 20
        lines.append(choices[kind] if kind < len(choices) else reading)
    return lines


def _write(paths: RunPaths, workers: list[list[RunEvent | bytes]], torn: bytes) -> None:
    """Write a log as several workers do, one after the other; each may leave a torn line."""
    for lines in workers:
        writer = EventWriter(paths.events)
        for line in lines:
            if isinstance(line, bytes):
                writer._append(line + b"\n")
            else:
                writer.write(line)
        writer.close()
        with paths.events.open("ab") as file:
            file.write(torn)


def _documents(paths: RunPaths, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    """What `runs show` and `runs list` print of a run."""
    found = []
    for verb in (["show", paths.name], ["list"]):
        cli.main(["runs", *verb, "--json", "--runs-dir", str(paths.root.parent)])
        found.append(json.loads(capsys.readouterr().out))
    return found


def _plain(paths: RunPaths) -> History:
    history = History()
    history.fold(read_events(paths.events))
    return history


@given(
    workers=st.lists(st.binary(min_size=1, max_size=80), min_size=1, max_size=4), torn=st.booleans(), cut=st.integers(0)
)
@settings(max_examples=60, deadline=None)
def test_a_history_is_the_same_with_any_index_and_without(
    workers: list[bytes], torn: bool, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    paths = make_run(tmp_path_factory.mktemp("run"))
    with _small_blocks():
        _write(paths, [_told(worker) for worker in workers], b'{"kind": "St' if torn else b"")
        plain = _plain(paths)
        found = {"written": read_history(paths)}
        paths.index.unlink(missing_ok=True)
        found["made"] = read_history(paths)
        if paths.index.exists():
            made = paths.index.read_bytes()
            paths.index.write_bytes(made[: cut % (len(made) + 1)])
            found["torn"] = read_history(paths)
            place = cut % len(made)
            paths.index.write_bytes(made[:place] + bytes([made[place] ^ 1]) + made[place + 1 :])
            found["flipped"] = read_history(paths)
            # Of this log only a part is left, as after a loss of power; and the index knows more.
            paths.index.write_bytes(made)
            whole = paths.events.read_bytes()
            paths.events.write_bytes(whole[: cut % (len(whole) + 1)])
            _assert_same(read_history(paths), _plain(paths))
    for history in found.values():
        _assert_same(history, plain)


def _assert_same(history: History, plain: History) -> None:
    for name in _SAME:
        assert repr(getattr(history, name)) == repr(getattr(plain, name)), name  # a NaN equals itself here
    train, all_steps = history.train, plain.train
    assert train.all_tokens == sum(all_steps.tokens)
    for name in ("steps", "losses", "lrs", "grad_norms", "tokens", "seconds", "at"):
        ours, theirs = list(getattr(train, name)), list(getattr(all_steps, name))
        assert repr(ours[-RECENT_STEPS:]) == repr(theirs[-RECENT_STEPS:])
        assert repr(ours[:1]) == repr(theirs[:1])
    ours, theirs = (list(filter(math.isfinite, series.losses)) for series in (train, all_steps))
    assert (ours[:1], ours[-3:], min(ours, default=0), max(ours, default=0)) == (
        theirs[:1], theirs[-3:], min(theirs, default=0), max(theirs, default=0),
    )  # fmt: skip
    assert train.pairs.keys() == all_steps.pairs.keys()
    for name, figures in train.pairs.items():
        assert len(figures) == len(train.steps)
        assert repr(figures[-1:]) == repr(all_steps.pairs[name][-1:])
    for name in ("peak_bytes", "resident_peak_bytes"):
        ours, theirs = (
            [value for value in getattr(one.memory, name) if not math.isnan(value)] for one in (history, plain)
        )
        assert max(ours, default=0) == max(theirs, default=0)
    assert repr(history.memory.resident_bytes[-1:]) == repr(plain.memory.resident_bytes[-1:])
    assert history.memory.stages[-1:] == plain.memory.stages[-1:]


@pytest.fixture
def blocks() -> Iterator[None]:
    with _small_blocks():
        yield


def _long(paths: RunPaths, loss: float = 3.0) -> EventWriter:
    """A log of 2000 steps and hundreds of small blocks, from a worker that still has it open."""
    writer = EventWriter(paths.events)
    writer.emit(Started, job="train")
    writer.write_all(_step(step, loss - step / 2000) for step in range(1, 2001))
    return writer


@pytest.mark.usefixtures("blocks")
def test_shown_documents_are_the_same_and_most_of_the_log_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = make_run(tmp_path)
    _long(paths).close()
    reader = mock.patch.object(log, "event_from_line", wraps=log.event_from_line)
    folder = mock.patch.object(series, "event_from_line", wraps=log.event_from_line)
    with reader as in_log, folder as in_history:
        with_index = _documents(paths, capsys)
    assert 1 < in_log.call_count + in_history.call_count < 100
    paths.index.unlink()
    assert _documents(paths, capsys) == with_index
    assert paths.index.exists()  # made anew, since the run is not live
    assert _documents(paths, capsys) == with_index


@pytest.mark.usefixtures("blocks")
def test_a_live_run_is_read_by_the_index_that_its_worker_keeps(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    writer = _long(paths)
    follower = RunWatch(paths)
    follower.take_index()
    assert follower.history.train.steps[-1] > 1900
    assert follower.behind < 2000
    follower.catch_up()
    writer.write(_step(2001, 0.5))
    assert [event.step for event in follower.poll() if isinstance(event, StepDone)] == [2001]
    _assert_same(follower.history, _plain(paths))


@pytest.mark.usefixtures("blocks")
def test_losses_are_smoothed_over_the_mean_of_a_block_and_not_over_its_spikes(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    _long(paths).close()
    train = read_history(paths).train
    assert len(train.steps) < 1900
    levels, place = train.levels(), train.blocks[3].place
    inside = list(range(train.steps[place], train.steps[train.blocks[3].behind - 1] + 1))
    assert levels[place] == pytest.approx(sum(3.0 - step / 2000 for step in inside) / len(inside))
    assert levels[-1] == train.losses[-1]
    assert list(train.levels(place + 1)) == list(levels[place + 1 :])


@pytest.mark.usefixtures("blocks")
def test_a_disk_that_refuses_the_index_keeps_no_run_from_going_on(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    paths.index.mkdir()
    _long(paths).close()
    _assert_same(read_history(paths), _plain(paths))


@pytest.mark.usefixtures("blocks")
def test_an_index_of_another_log_is_not_believed(tmp_path: Path) -> None:
    one, other = make_run(tmp_path, "one"), make_run(tmp_path, "other")
    _long(one).close()
    _long(other, loss=9.0).close()
    other.index.write_bytes(one.index.read_bytes())
    _assert_same(read_history(other), _plain(other))


def test_a_short_log_has_no_index(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    _long(paths).close()
    assert not paths.index.exists()
