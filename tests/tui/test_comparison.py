"""What a comparison tells of runs: of a run on a CPU, of a resumed one and of one that trains nothing."""

from pathlib import Path

from studio.core.events import Finished, MemorySeen, Started, StepDone
from studio.core.recipe import Recipe
from studio.runs.job import write_job
from studio.runs.requests import MergeRequest
from studio.tui.screens.compare import difference_rows, outcome_rows, read_compared
from tests.fakes.runs import make_run, write_log


def test_a_run_on_a_cpu_has_a_peak_and_a_resumed_one_the_time_of_both_workers(tmp_path: Path) -> None:
    step = StepDone(at=70.0, step=1, loss=3.0, learning_rate=1.0, grad_norm=1.0, tokens=100, seconds=2.0)
    paths = make_run(tmp_path, "cpu")
    write_log(
        paths,
        Started(at=10.0, job="train", method="lora"),
        MemorySeen(at=20.0, step=1, stage="step", resident_peak_bytes=3 * 2**29),
        step,
        Started(at=5000.0, job="train", method="lora", resumed_from=1),
        Finished(at=5030.0, outcome="done", step=1, seconds=2.0),
    )
    rows = {row[0]: row[1:] for row in outcome_rows([read_compared(paths)])}
    assert rows["peak, GiB"] == ("1.5",)
    assert rows["tokens/s"] == ("50.00",)
    # Neither the two seconds of its step alone nor the hour in which nobody worked.
    assert rows["time"] == ("1 min 30 s",)


def test_what_trains_nothing_has_no_fields_that_could_differ(tmp_path: Path) -> None:
    trainings = [make_run(tmp_path, f"r{rank}", Recipe().with_("adapter.rank", rank)) for rank in (8, 64)]
    merge = make_run(tmp_path, "merge-x")
    write_job(merge, MergeRequest(adapter="/a", base="embedded", out="/o"))
    runs = [read_compared(paths) for paths in (*trainings, merge)]
    assert difference_rows(runs) == [("adapter.rank", "8", "64", "-")]
    assert difference_rows(runs[1:]) == []
