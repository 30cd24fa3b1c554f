"""How the training job reads its rows: it refuses what the check before it refuses, and tells what is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput, JobFailed
from studio.core.recipe import Recipe
from studio.jobs.base.progress import PhaseTeller
from studio.jobs.train.objectives.supervised import SUPERVISED
from studio.jobs.train.read_rows import read_rows
from studio.probe.data import read_data, row_keys
from studio.runs.held_out import RowLosses, keep_losses_before, keep_record, read_record
from studio.runs.layout import RunPaths
from tests.fakes.misreads import ANSWER, ASKED, MISREADS
from tests.fakes.tokenizers import CHATML, byte_tokenizer
from tests.jobs.test_templates import ALTERNATING


class Listener:
    """A worker that keeps what it is told."""

    def __init__(self, root: Path) -> None:
        self.paths = RunPaths(root)
        self.warnings: list[str] = []

    def emit(self, kind: type, **fields: Any) -> None:
        if kind.__name__ == "Warned":
            self.warnings.append(fields["message"])

    def requested(self, what: str) -> bool:
        return False


def read(
    worker: Any, path: Path, *rows: dict[str, Any], eval_rows: int = 0, eval_path: str = "", template: str = CHATML
) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe().with_("data.path", str(path)).with_("eval.rows", eval_rows).with_("eval.samples", 0)
    recipe = recipe.with_("data.eval_path", eval_path)
    tell, tokenizer = PhaseTeller(worker.emit), byte_tokenizer(template)
    return read_rows(worker, tell, recipe, tokenizer, objective=SUPERVISED, identify=lambda train, held: None)


@pytest.mark.parametrize("name", MISREADS)
def test_the_job_itself_refuses(tmp_path: Path, name: str) -> None:
    row, _, field = MISREADS[name]
    with pytest.raises(BadInput) as caught:
        read(Listener(tmp_path), tmp_path / "rows.jsonl", row)
    assert str(caught.value).startswith(f"data.path: rows.jsonl, line 1, {field}: found ")


def test_the_run_keeps_what_is_left_out_and_not_used(tmp_path: Path) -> None:
    worker = Listener(tmp_path)
    good = {"messages": [ASKED | {"mood": "calm"}, ANSWER], "id": 7}
    rows = read(worker, tmp_path / "rows.jsonl", good, good, {"messages": [ASKED]})
    assert len(rows.train) == 2
    assert "rows.jsonl: 1 row is left out, 2 rows kept: 1 without an answer (the first: row 3)." in worker.warnings
    assert "rows.jsonl: columns not used: id, messages[].mood." in worker.warnings


def test_rows_are_counted_by_the_reason_for_which_they_are_left_out(tmp_path: Path) -> None:
    """Of the file and of the encoding, of the rows to train on and of those held out."""
    worker = Listener(tmp_path)
    good = [{"messages": [ASKED | {"content": f"Why {n}?"}, ANSWER | {"content": f"Because {n}."}]} for n in range(12)]
    long = [{"messages": [ASKED | {"content": f"{n} " * 1500}, ANSWER]} for n in range(3)]
    refused = [{"messages": [ASKED, ASKED, ANSWER | {"content": f"So {n}."}]} for n in range(4)]
    empty = {"messages": [ASKED, ANSWER | {"content": " "}]}
    path, rows = tmp_path / "rows.jsonl", [*good, *long, *refused, {"messages": [ASKED]}, empty, empty]
    found = read(worker, path, *rows, eval_rows=3, template=ALTERNATING + CHATML)
    assert found.left_out == {"no_answer": 1, "empty_answer": 2, "refused_by_template": 4, "nothing_to_learn": 3}
    assert len(found.train) + len(found.held_out) == len(good)
    assert read(worker, path, *good).left_out == {}


def test_it_is_said_where_only_the_held_out_rows_leave_nothing(tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text(json.dumps({"messages": [ASKED | {"content": "long " * 1500}, ANSWER]}))
    with pytest.raises(JobFailed, match=r"^Of the rows that are held out: No row has .* 1 of 1 are cut") as caught:
        read(Listener(tmp_path), tmp_path / "rows.jsonl", {"messages": [ASKED, ANSWER]}, eval_path=str(held))
    assert caught.value.kind == "all_labels_masked" and "seq_len" in caught.value.advice


def test_a_resumed_run_keeps_the_rows_that_it_held_out_when_it_began(tmp_path: Path) -> None:
    worker = Listener(tmp_path)
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    read(worker, tmp_path / "rows.jsonl", *rows, eval_rows=2)
    found = read_data(tmp_path / "rows.jsonl").rows
    chosen_now = read_record(worker.paths)
    others = [key for row in found if (key := row_keys(row).content.hex()) not in chosen_now.held_out][:2]
    keep_record(worker.paths, replace(chosen_now, held_out=tuple(others), before=RowLosses((1.0, 2.0), (3, 4))))
    read(worker, tmp_path / "rows.jsonl", *rows, eval_rows=2)
    record = read_record(worker.paths)
    assert record.held_out == tuple(others) and record.before == RowLosses((1.0, 2.0), (3, 4))
    assert not {bytes.fromhex(key)[:8] for key in others} & record.trained.contents
    assert "the rows held out are those of the run's first start" in worker.warnings


def test_losses_from_before_the_training_outlive_a_move_of_the_data(tmp_path: Path) -> None:
    worker = Listener(tmp_path)
    rows = [{"prompt": f"question {n}", "completion": f"answer {n}"} for n in range(20)]
    read(worker, tmp_path / "rows.jsonl", *rows, eval_rows=2)
    keep_losses_before(worker.paths, RowLosses((1.0, 2.0), (3, 4)))
    read(worker, tmp_path / "moved.jsonl", *rows, eval_rows=2)
    record = read_record(worker.paths)
    assert record.before == RowLosses((1.0, 2.0), (3, 4))
    assert record.held_from == str(tmp_path / "moved.jsonl")
    other = [{"prompt": f"another {n}", "completion": f"one {n}"} for n in range(20)]
    read(worker, tmp_path / "moved.jsonl", *other, eval_rows=2)
    assert read_record(worker.paths).before is None
