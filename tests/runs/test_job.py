from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.runs.job import TRAIN, Job, MergeRequest, kind_of, kind_of_run, read_job, write_job
from studio.runs.layout import RunPaths

MERGE = MergeRequest(adapter="/a 'quoted'", base="owner/name", out="/o", revision="main", dtype="bf16", run="/r")


@pytest.mark.parametrize(("job", "kind"), [(Recipe(name="x"), "train"), (MERGE, "merge")])
def test_a_job_comes_back_as_it_was(tmp_path: Path, job: Job, kind: str) -> None:
    paths = RunPaths(tmp_path)
    write_job(paths, job)
    assert read_job(paths, type(job)) == job
    assert read_job(paths, MergeRequest if kind == TRAIN else Recipe) is None
    assert kind_of(job) == kind_of_run(paths) == kind


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("job = 'merge'", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 3", "damaged"),
        ("job = 'merge'\n[merge]\nadapter = 'a'\nbase = 'b'\nout = 'c'\nnew = 'd'", "damaged"),
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
