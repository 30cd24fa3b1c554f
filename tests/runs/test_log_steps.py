"""A long log at a glance: steps from all of it, in order, whatever lies between them."""

from pathlib import Path

from studio.core.events import Finished, Started, StepDone
from studio.runs.log_parts import sample_steps
from tests.fakes.runs import make_run, write_log


def step(number: int) -> StepDone:
    return StepDone(at=1.0, step=number, loss=float(number), learning_rate=1e-4, grad_norm=1.0, tokens=9, seconds=1.0)


def test_steps_come_from_all_of_the_log_in_order(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    write_log(paths, Started(at=1.0, job="train"), *map(step, range(1, 5001)), Finished(at=2.0, outcome="done"))
    found = [event.step for event in sample_steps(paths.events, 100)]
    assert found == sorted(set(found))
    assert len(found) > 90
    assert found[0] < 60
    assert found[-1] > 4900
    assert all(event.loss == event.step for event in sample_steps(paths.events, 20))


def test_a_missing_a_short_and_a_damaged_log(tmp_path: Path) -> None:
    paths = make_run(tmp_path)
    assert sample_steps(paths.events) == []
    write_log(paths, Started(at=1.0, job="train"), step(1), step(2))
    assert [event.step for event in sample_steps(paths.events)] in ([1], [1, 2])
    paths.events.write_bytes(b"\xff\x00\n" * 100_000)
    assert sample_steps(paths.events) == []
