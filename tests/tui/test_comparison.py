"""What a comparison tells of runs: of a run on a CPU, of a resumed one and of one that trains nothing."""

from pathlib import Path

from studio.core.events import Evaluated, Finished, MemorySeen, Started, StepDone
from studio.core.recipe import Recipe
from studio.runs.job import write_job
from studio.runs.layout import RunPaths
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


def preference_run(folder: Path, name: str, objective: str, *, pairs: bool) -> Path:
    paths = make_run(folder, name, Recipe().with_("train.objective", objective))
    figures = {"margin": 0.5, "accuracy": 0.75, "chosen_logp": -9.0, "rejected_logp": -12.0} if pairs else {}
    write_log(
        paths,
        Started(at=10.0, job="train", method="lora", recipe={"train": {"objective": objective}}),
        StepDone(at=70.0, step=1, loss=0.5, learning_rate=1.0, grad_norm=1.0, tokens=9, seconds=2.0, **figures),
        Evaluated(at=71.0, step=1, loss=0.6, loss_tokens=9, rows=3, seconds=1.0, **figures),
    )
    return paths.root


def test_losses_of_different_objectives_stand_in_rows_of_their_own(tmp_path: Path) -> None:
    runs = [
        read_compared(RunPaths(preference_run(tmp_path, name, name, pairs=name != "sft"))) for name in ("sft", "dpo")
    ]
    rows = {row[0]: row[1:] for row in outcome_rows(runs)}
    assert rows["held-out loss (sft)"] == ("0.6000", "-")
    assert rows["held-out loss (dpo)"] == ("-", "0.6000")
    assert rows["training loss (sft)"] == ("0.5000", "-")
    assert rows["held-out accuracy"] == ("-", "0.7500")
    alike = {row[0]: row[1:] for row in outcome_rows([runs[1], runs[1]])}
    assert alike["held-out loss"] == ("0.6000", "0.6000")
