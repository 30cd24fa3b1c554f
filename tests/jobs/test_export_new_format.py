"""Another export format is a row, a writer and the writer's place: the verbs, the checks and the screen follow."""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from studio.commands import export as export_verb
from studio.commands import merge as merge_verb
from studio.core.errors import BadInput
from studio.core.export_formats import FORMATS, ExportFormat
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.export.__main__ import _body
from studio.jobs.export.job import WRITERS
from studio.jobs.export.work import Work
from studio.probe.export import check_export, check_exports, export_estimate
from studio.runs.chain import beside
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from studio.tui.merging import estimates_of
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import history_of


def write_signs(work: Work, made: Path) -> dict[str, Any]:
    """A toy: one bit a weight, its sign."""
    files = TensorFiles(work.merged())
    made.mkdir()
    for key in files.tensors:
        (made / f"{key}.signs").write_bytes((files.read(key) < 0).to(torch.uint8).numpy().tobytes())
    return {"tensors": len(files.tensors)}


@pytest.fixture(autouse=True)
def signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "signs", ExportFormat("folder of signs (toy)", bits=1.0, seconds_per_gb=2.0))
    monkeypatch.setitem(WRITERS, "signs", write_signs)


def test_the_job_writes_it(tmp_path: Path) -> None:
    merged = make_tiny_model(tmp_path / "merged", dtype=torch.bfloat16)
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_job(paths, ExportRequest(str(merged), str(tmp_path / "out"), "signs"))
    run_job(paths.root, _body)
    assert history_of(paths).finished is not None, history_of(paths).failed
    files = TensorFiles(merged)
    assert json.loads(paths.report.read_text())["tensors"] == len(files.tensors)
    key = "model.layers.0.mlp.up_proj.weight"
    written = (tmp_path / "out" / f"{key}.signs").read_bytes()
    assert written == (files.read(key) < 0).numpy().tobytes()


def test_the_verbs_offer_and_explain_it(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verbs = parser.add_subparsers()
    export_verb.add_parser(verbs)
    merge_verb.add_parser(verbs)
    assert parser.parse_args(["export", "m", "--format", "signs", "--out", "o"]).format == "signs"
    assert parser.parse_args(["merge", "a", "--out", "o", "--export", "signs"]).export == ["signs"]
    with pytest.raises(SystemExit):
        parser.parse_args(["export", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert said.index("its size as a share of the 16-bit model") < said.index("signs: folder of signs (toy), 6%")


def test_it_is_checked_before_it_starts(tmp_path: Path) -> None:
    merged = make_tiny_model(tmp_path / "merged", dtype=torch.bfloat16)
    check_export(ExportRequest(str(merged), str(tmp_path / "out"), "signs"))
    with pytest.raises(BadInput, match="signs is a folder"):
        check_export(ExportRequest(str(merged), str(tmp_path / "out.gguf"), "signs"))
    request = MergeRequest("/adapter", str(merged), str(tmp_path / "model"), then=("signs",))
    check_exports(request)
    beside(Path(request.out), "signs").mkdir()
    (beside(Path(request.out), "signs") / "mine.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty"):
        check_exports(request)
    assert export_estimate("signs", 16 * 10**9).out_bytes == 10**9


def test_the_screen_offers_it_with_its_size() -> None:
    (row,) = [row for row in estimates_of(16 * 10**9) if row.form == "signs"]
    assert (row.words, row.out_bytes) == ("folder of signs (toy)", 10**9)
