"""What merges and exports leave beside their output when they are killed: found, named, and given back."""

import os
from pathlib import Path

import pytest
from filelock import FileLock

from studio.core.errors import BadInput
from studio.core.events import Finished, Started
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.requests import ExportRequest, MergeRequest
from studio.runs.scratch import Scratch, export_scratch, left_by, merge_scratch, only_writer
from studio.runs.status import Status
from studio.runs.store import left_over, remove_run
from studio.runs.summary import summary_of
from tests.fakes.runs import make_run, write_log

DAY = 1_750_000_000.0


def _killed(root: Path, job: MergeRequest | ExportRequest, name: str = "job") -> RunPaths:
    """A run whose log ends in the middle and whose lock nobody holds."""
    paths = new_run(root / "runs", name, DAY)
    write_job(paths, job)
    write_log(paths, Started(at=DAY, job=name))
    return paths


def _fill(scratch: Scratch, size_bytes: int = 1000) -> None:
    for folder in (scratch.folder, scratch.merged, merge_scratch(scratch.merged).folder if scratch.merged else None):
        if folder is not None:
            (folder / "deep").mkdir(parents=True)
            (folder / "deep" / "weights").write_bytes(bytes(size_bytes))
    scratch.lock.touch()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "models" / "tuned"


@pytest.fixture
def export(tmp_path: Path, out: Path) -> RunPaths:
    paths = _killed(tmp_path, ExportRequest("/adapter", str(out), "q8_0"))
    _fill(export_scratch(out))
    return paths


def test_what_a_killed_export_left_is_found_with_its_run_and_size(tmp_path: Path, export: RunPaths, out: Path) -> None:
    (found,) = left_over(tmp_path / "runs")
    assert found.run == export
    assert found.size_bytes == 3000
    assert {folder.name for folder in found.folders} == {
        ".writing-tuned",
        ".merged-for-tuned",
        ".merging-.merged-for-tuned",
    }
    assert f"0.00 GB in {out.parent}/.writing-tuned and 2 more hidden beside it, of {export.name}" == found.words
    assert f"runs resume {export.name}" in found.advice
    assert f"runs rm {export.name}" in found.advice
    crashed = summary_of(export, History(), Status.crashed)["failure"]
    assert f"or runs rm {export.name}, which deletes also what lies half-made" in crashed["advice"]


def test_a_killed_merge_is_found_too(tmp_path: Path, out: Path) -> None:
    paths = _killed(tmp_path, MergeRequest("/adapter", "", str(out)))
    assert left_over(tmp_path / "runs") == []
    assert "half-made" not in summary_of(paths, History(), Status.crashed)["failure"]["advice"]
    _fill(merge_scratch(out))
    (found,) = left_over(tmp_path / "runs")
    assert (found.run, found.size_bytes, len(found.folders)) == (paths, 1000, 1)


@pytest.mark.parametrize("out", ["/", "", ".", "/folder/" + "x" * 250, "/folder/x\0y"])
def test_an_output_that_can_have_nothing_beside_it_breaks_no_list_and_no_removal(tmp_path: Path, out: str) -> None:
    for request in (MergeRequest("/adapter", "", out), ExportRequest("/adapter", out, "q8_0")):
        paths = _killed(tmp_path, request)
        assert left_by(paths) is None
        assert left_over(tmp_path / "runs") == []
        remove_run(paths)
        assert not paths.root.exists()


def test_what_a_living_job_writes_is_no_left_over(tmp_path: Path, export: RunPaths, out: Path) -> None:
    scratch = export_scratch(out)
    merging = merge_scratch(out.with_name(".merged-for-tuned"))
    for lock in (scratch.lock, merging.lock):  # another export to the same place; the merge that outlived this one
        with FileLock(lock):
            assert left_by(export) is None
    with FileLock(export.lock):
        assert left_by(export) is None
    write_log(export, Started(at=DAY, job="export"), Finished(at=DAY, outcome="done"))
    assert left_by(export) is None, "it belongs to a later one"


def test_several_runs_to_one_place_count_it_once(tmp_path: Path, export: RunPaths, out: Path) -> None:
    newer = _killed(tmp_path, ExportRequest("/adapter", str(out), "f16"), "again")
    os.utime(export.root, (DAY, DAY))
    (found,) = left_over(tmp_path / "runs")
    assert found.run == newer


def test_other_runs_and_damaged_ones_have_left_nothing(tmp_path: Path) -> None:
    make_run(tmp_path)
    broken = new_run(tmp_path / "runs", "broken", DAY)
    broken.recipe.write_text("job = 'export'\n[export]\nout = 3\n")
    assert left_over(tmp_path / "runs") == []
    assert left_over(tmp_path / "none") == []


def test_removing_the_run_gives_the_room_back_and_touches_nothing_else(
    tmp_path: Path, export: RunPaths, out: Path
) -> None:
    out.mkdir()
    (out / "kept").touch()
    other = export_scratch(out.with_name("other"))
    _fill(other)
    remove_run(export)
    assert not export.root.exists()
    kept = {folder.name for folder in out.parent.iterdir()}
    assert kept == {"tuned", other.lock.name, *(folder.name for folder in other.folders)}


def test_removing_a_run_leaves_alone_what_another_job_has_taken_up(tmp_path: Path, export: RunPaths, out: Path) -> None:
    scratch = export_scratch(out)
    with FileLock(scratch.lock):
        remove_run(export)
        assert len(scratch.folders) == 3


@pytest.mark.parametrize("kind", ["merge", "export"])
def test_a_run_that_was_killed_takes_along_only_what_it_wrote_last(tmp_path: Path, out: Path, kind: str) -> None:
    merges = kind == "merge"
    request = MergeRequest("/adapter", "", str(out)) if merges else ExportRequest("/adapter", str(out), "q8_0")
    scratch = merge_scratch(out) if merges else export_scratch(out)
    first, second = (_killed(tmp_path, request, name) for name in ("first", "second"))
    _fill(scratch)
    scratch.claim(first)
    scratch.claim(second)
    assert left_by(first) is None
    remove_run(first)
    assert len(scratch.folders) == (1 if merges else 3)
    assert [found.run for found in left_over(tmp_path / "runs")] == [second]
    remove_run(second)
    assert list(out.parent.iterdir()) == []


def test_nobody_owns_a_folder_that_is_gone_or_became_the_result(tmp_path: Path, out: Path) -> None:
    scratch = merge_scratch(out)
    scratch.folder.mkdir(parents=True)
    with only_writer(scratch, out):
        scratch.claim(new_run(tmp_path / "runs", "merge", DAY))
        assert scratch.owner
        scratch.folder.replace(out)
    assert list(out.parent.iterdir()) == [out]


def test_only_one_writes_at_a_time_and_no_lock_is_left(out: Path) -> None:
    out.parent.mkdir()
    scratch = merge_scratch(out)
    with only_writer(scratch, out):
        assert scratch.held
        with pytest.raises(BadInput, match="another job is writing tuned"), only_writer(scratch, out):
            raise AssertionError
    assert not scratch.held
    assert list(out.parent.iterdir()) == []
