"""How the training job reads its rows: it refuses what the check before it refuses, and tells what is left out."""

import json
from pathlib import Path
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.train.phase import PhaseTeller
from studio.jobs.train.read_rows import read_rows
from studio.runs.layout import RunPaths
from tests.fakes.misreads import ANSWER, ASKED, MISREADS
from tests.fakes.tokenizers import CHATML, byte_tokenizer


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


def read(worker: Any, path: Path, *rows: dict[str, Any], eval_rows: int = 0) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe().with_("data.path", str(path)).with_("eval.rows", eval_rows).with_("eval.samples", 0)
    return read_rows(worker, PhaseTeller(worker.emit), recipe, byte_tokenizer(CHATML), lambda train, held: None)


@pytest.mark.parametrize("name", MISREADS)
def test_the_job_itself_refuses(tmp_path: Path, name: str) -> None:
    row, _, field = MISREADS[name]
    with pytest.raises(BadInput) as caught:
        read(Listener(tmp_path), tmp_path / "rows.jsonl", row)
    assert str(caught.value).startswith(f"rows.jsonl, line 1, {field}: found ")


def test_the_run_keeps_what_is_left_out_and_not_used(tmp_path: Path) -> None:
    worker = Listener(tmp_path)
    good = {"messages": [ASKED | {"name": "Ann"}, ANSWER], "id": 7}
    rows = read(worker, tmp_path / "rows.jsonl", good, good, {"messages": [ASKED]})
    assert len(rows.train) == 2
    assert "rows.jsonl: 1 row is left out, 2 rows kept: 1 without an answer (the first: row 3)." in worker.warnings
    assert "rows.jsonl: columns not used: id, messages[].name." in worker.warnings
