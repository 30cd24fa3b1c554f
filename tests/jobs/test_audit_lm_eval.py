"""Tasks of lm-eval: a point for each document and form; the harness itself only where it is installed."""

import json
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from studio.core.audit_tables import task_table
from studio.core.audit_text import note_lines
from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.audit import lm_eval as tasks_job
from studio.jobs.audit.lm_eval import rows_of
from studio.probe.audit import audit_of_run, check_audit
from studio.runs.layout import RunPaths
from tests.fakes.audit_job import run_report
from tests.jobs.audit_cases import audit
from tests.jobs.conftest import QUESTIONS, Train, history_of

FORMS = ["base", "tuned, 16-bit", "tuned, nf4+dq", "merged, 16-bit"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty-two short chats."""
    path = tmp_path / "data.jsonl"
    turns = [(f"{question} {n}", f"{reply} {n}") for n in range(7) for question, reply in QUESTIONS]
    path.write_text("\n".join(json.dumps({"prompt": q, "completion": a}) for q, a in turns))
    return path


@pytest.fixture
def trained(recipe: Recipe, train: Train) -> RunPaths:
    return train(recipe.with_("method", "qlora").with_("eval.rows", 6))


def harness_result(points: list[float], value: float) -> dict[str, Any]:
    """What the harness returns, as far as it is read here."""
    samples = [{"filter": "none", "acc": point, "bleu": (point, 1)} for point in points]
    return {
        "results": {"sums": {"alias": "sums", "acc,none": value, "acc_stderr,none": "N/A", "bleu,none": 3.5}},
        "samples": {"sums": samples},
        "higher_is_better": {"sums": {"acc": True, "bleu": True}},
    }


def test_points_of_documents_are_taken_from_the_harness() -> None:
    acc, bleu = rows_of(harness_result([1.0, 0.0, 1.0], 2 / 3))
    assert (acc["task"], acc["metric"], acc["documents"]) == ("sums", "acc", 3)
    assert acc["points"] == [1.0, 0.0, 1.0] and acc["higher_is_better"] is True
    assert bleu["points"] == [] and bleu["value"] == 3.5, "a corpus figure has no points that are numbers"


def test_forms_are_compared_document_by_document(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong = [1.0] * 16, [0.0] * 14 + [1.0, 1.0]
    found = {"base": rows_of(harness_result(wrong, 0.125)), "tuned": rows_of(harness_result(right, 1.0))}
    acc, bleu = tasks_job._rows(found, "tuned")
    assert acc["scores"]["base"]["mean"]["value"] == 0.125
    assert acc["scores"]["base"]["more"]["high"] < 0
    assert acc["scores"]["tuned"]["mean"]["low"] < 1.0
    assert bleu["scores"] == {} and bleu["values"] == {"base": 3.5, "tuned": 3.5}
    weighted = {"a": rows_of(harness_result([1.0, 0.0], 0.9))}
    assert tasks_job._rows(weighted, "a")[0]["scores"] == {}, "no mean of the points: no interval is claimed"
    forms = [{"name": name, "title": name, "why_not": ""} for name in ("base", "tuned")]
    report = {**run_report(), "lm_eval": {"version": "0.4", "reference": "tuned", "forms": forms, "rows": [acc, bleu]}}
    table = task_table(report)
    assert table[1][0] == "sums acc (16 documents, higher is better)" and table[1][1].startswith("0.1250 (")
    assert table[2][1].startswith("-0.8750") and table[3][1] == "3.5000, no interval"
    assert any("lm-eval 0.4" in line for line in note_lines(report))


def test_without_the_harness_it_is_refused_before_there_is_a_run(
    trained: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.probe.audit.find_spec", lambda name: None)
    with pytest.raises(BadInput, match="pip install lm-eval"):
        check_audit(audit_of_run(trained, lm_eval=("arc_easy",)))


@pytest.mark.slow
def test_a_form_whose_process_dies_is_left_out(
    trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks_job, "find_spec", lambda name: True)
    monkeypatch.setattr(tasks_job, "CHILD", "tests.fakes.no_such_module")
    request = audit_of_run(trained, lm_eval=("sums",), rows=4, speed=False)
    paths, report = audit(tmp_path / "audit", request)
    assert report["variants"], "the figures are there all the same"
    assert "it ran on no form" in report["lm_eval"]["why_not"]
    assert "No tasks of lm-eval" in "\n".join(note_lines(report))
    assert any("lm-eval left out" in warned.message for warned in history_of(paths).warnings)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")
def test_a_local_task_runs_on_every_form(trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [{"q": f"{a} + {b}", "choices": [str(a + b), "no"], "answer": 0} for a in range(3) for b in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "sums.yaml"
    task.write_text(
        f"""task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{q}}}} ="
doc_to_target: answer
doc_to_choice: choices
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    real, started = subprocess.Popen, []

    def popen(command: list[str], **more: Any) -> Any:
        started.append(command)
        return real(command, **more)

    monkeypatch.setattr(tasks_job.subprocess, "Popen", popen)
    request = audit_of_run(trained, lm_eval=(str(task),), lm_eval_limit=5, rows=4, speed=False)
    _, report = audit(tmp_path / "audit", request)
    found = report["lm_eval"]
    assert [form["name"] for form in found["forms"]] == FORMS and len(started) == len(FORMS)
    (row,) = found["rows"]
    assert (row["task"], row["metric"], row["documents"]) == ("sums", "acc", 5)
    assert set(row["scores"]) == set(FORMS)
