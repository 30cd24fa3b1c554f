"""A run that the system's out-of-memory killer has really ended, in a control group with little memory."""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from studio.runs import supervise
from studio.runs.layout import RunPaths
from studio.runs.memory_kills import kill_counts, kills_since
from studio.runs.process import read_mark
from studio.runs.status import Status, run_status
from studio.runs.store import list_runs
from studio.runs.summary import summary_of
from studio.runs.supervise import how_it_ended
from studio.runs.watch import read_history
from tests.fakes.runs import launch_fake, make_run, wait_for

_GROUPS = Path("/sys/fs/cgroup")
_LIMIT_BYTES = 150 * 2**20


@pytest.fixture
def small_group() -> Iterator[Path]:
    """A control group of 150 MiB, version 1 or 2; the file that takes a process in. Needs root on Linux."""
    first = (_GROUPS / "memory" / "memory.limit_in_bytes").exists()
    group = (_GROUPS / "memory" if first else _GROUPS) / f"lora-studio-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"a control group needs root on Linux: {error}")
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(_LIMIT_BYTES))
    except OSError as error:
        group.rmdir()
        pytest.skip(f"memory cannot be limited here: {error}")
    with suppress(OSError):  # no swap, or no account of it
        (group / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")).write_text(
            str(_LIMIT_BYTES) if first else "0"
        )
    yield group / "cgroup.procs"
    wait_for(lambda: _removed(group))


def _removed(group: Path) -> bool:
    with suppress(OSError):
        group.rmdir()
    return not group.exists()


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    return make_run(tmp_path)


def test_a_run_that_the_system_ended_for_its_memory_says_so_to_everyone(
    paths: RunPaths, small_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = launch_fake(paths, group=small_group, steps=5, hoard_at=3)
    assert handle.process.wait(60) == -9
    assert run_status(paths) is Status.crashed
    assert "counted such a kill" in how_it_ended(paths)
    monkeypatch.setattr(supervise, "_CHILDREN", {})  # as a studio that is not the parent sees it
    assert not how_it_ended(paths)
    failure = summary_of(paths, read_history(paths), Status.crashed)["failure"]
    assert failure["kind"] == "out_of_memory"
    assert "out-of-memory killer" in failure["message"]
    assert "more memory" in failure["advice"]
    assert "train.micro_batch" in failure["advice"]
    assert [info.status for info in list_runs(paths.root.parent)] == [Status.crashed]


def test_a_run_that_somebody_killed_is_not_blamed_on_the_memory(paths: RunPaths) -> None:
    if not kill_counts():
        pytest.skip("this system counts no kills")
    handle = launch_fake(paths, steps=5, die_at=3, killed=1)
    assert handle.process.wait(60) == -9
    assert "but has counted no such kill" in how_it_ended(paths)
    assert summary_of(paths, read_history(paths), Status.crashed)["failure"]["kind"] == "crashed"


def test_a_run_of_another_boot_is_not_compared(paths: RunPaths) -> None:
    handle = launch_fake(paths, steps=5, die_at=3, killed=1)
    handle.process.wait(60)
    mark = read_mark(paths.process)
    assert mark is not None
    text = paths.process.read_text().replace(mark[0].boot, "another")
    paths.process.write_text(text.replace('"oom_kill": 0', '"oom_kill": -1'))
    assert summary_of(paths, read_history(paths), Status.crashed)["failure"]["kind"] == "crashed"


def test_counts_that_are_gone_or_forged_are_not_known() -> None:
    assert kills_since({"/sys/fs/cgroup/gone/memory.events": 1}) is None
    assert kills_since({"/etc/passwd": 0, "/proc/vmstat": "none"}) is None
    assert kills_since({}) is None
