from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.runs.job import TRAIN, Job, kind_of, kind_of_run, read_job, write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest, ExportRequest, MeasureRequest, MergeRequest, Weighted

MERGE = MergeRequest(
    adapter="/a 'quoted'",
    base="owner/name",
    out="/o",
    run="/r",
    weight=2.0,
    more=(Weighted("/b", -0.5), Weighted("/c")),
    then=("nf4", "q8_0"),
)
EXPORT = ExportRequest("/m", "/o", "q8_0", then=())
AUDIT = AuditRequest("race", recipe=Recipe(name="x"), rows=7, kept=(), lanes=("lora", "qlora"), speed=False)
MEASURE = MeasureRequest(Recipe(name="y").with_("adapter.dropout", 0.25), capability=(12, 0))


@pytest.mark.parametrize(
    ("job", "kind"),
    [(Recipe(name="x"), "train"), (MERGE, "merge"), (EXPORT, "export"), (AUDIT, "audit"), (MEASURE, "measure")],
)
def test_a_job_comes_back_as_it_was(tmp_path: Path, job: Job, kind: str) -> None:
    paths = RunPaths(tmp_path)
    write_job(paths, job)
    assert read_job(paths, type(job)) == job
    assert read_job(paths, MergeRequest if kind == TRAIN else Recipe) is None
    assert kind_of(job) == kind_of_run(paths) == kind
    assert repr(read_job(paths, type(job))) == repr(job), "2.0 does not come back as 2"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("job = 'merge'", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 3", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nnew = 'd'", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nweight = 'much'", "weight in .* damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nweight = true", "weight in .* damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nmore = [{weight = 1.0}]", "more in .* damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nthen = 'nf4'", "then in .* damaged"),
        ("[", "damaged"),
        ("a = " + "[" * 20_000, "damaged"),
        ("nonsense = 1", "nonsense"),
    ],
)
def test_a_damaged_job_is_refused(tmp_path: Path, text: str, word: str) -> None:
    paths = RunPaths(tmp_path)
    paths.recipe.write_text(text)
    with pytest.raises(BadInput, match=word):
        read_job(paths, MergeRequest if text.startswith("job") else Recipe)


def test_a_folder_without_a_recipe_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no readable"):
        read_job(RunPaths(tmp_path), Recipe)


@pytest.mark.parametrize(
    "wrong",
    ["rows = '7'", "rows = 7.0", "speed = 1", "kept = ['1']", "recipe = 'text'", "recipe = {adapter = {rank = 'r'}}"],
)
def test_a_request_is_read_by_its_types(tmp_path: Path, wrong: str) -> None:
    paths = RunPaths(tmp_path)
    paths.recipe.write_text(f"job = 'audit'\n[audit]\nwhat = 'base'\n{wrong}")
    with pytest.raises(BadInput):
        read_job(paths, AuditRequest)
    paths.recipe.write_text("job = 'audit'\n[audit]\nwhat = 'base'\nrows = 7\nspeed = false\nkept = [1]")
    assert read_job(paths, AuditRequest) == AuditRequest("base", rows=7, speed=False, kept=(1,))
