"""Checks an audit's request, finds the rows that it measures, and reads the report that it left."""

import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from studio.core.answers import checks_for
from studio.core.errors import BadInput
from studio.core.recipe import EMBEDDED, FIELDS, Recipe, choices_of
from studio.core.text import plain
from studio.probe.adapter_folder import find_adapter
from studio.probe.data import shipped_data
from studio.probe.data.places import absolute_word
from studio.probe.fingerprint import known_fingerprint, refuse_another_base
from studio.probe.held_out import RowsToMeasure, rows_of_base, rows_of_run
from studio.probe.models import find_base
from studio.runs.atomic import read_object
from studio.runs.held_out import read_record
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import WHAT, AuditRequest

_LEAST_ROWS = 2
_LEAST = {"rows": _LEAST_ROWS, "seq_len": 2, "seed": 0, "answers": 0, "answer_tokens": 0, "lm_eval_limit": 0}
"""The fields that are numbers, with the smallest value of each."""


def audit_of_run(paths: RunPaths, **changes: Any) -> AuditRequest:
    """Return the audit of a training run's adapter: its base, and all rows that its record says it held out.

    Args:
        paths: The run.
        changes: Fields of the request with values that the user has chosen.

    Raises:
        BadInput: It is no training run, has no adapter, or no record of its held-out rows.
    """
    job = audited_recipe(paths)
    record = read_record(paths)
    other_data = changes.get("data", record.held_from) != record.held_from
    fields: dict[str, Any] = {
        "model": job.model.base,
        "revision": job.model.revision,
        "data": record.held_from,
        "format": record.format,
        "rows": AuditRequest("run").rows if other_data else max(_LEAST_ROWS, len(record.held_out)),
        "seq_len": job.train.seq_len,
        "seed": job.train.seed,
        # A run that was told to train on the CPU is audited there too; any other has recorded which card it used.
        "device": "cpu" if job.device.device == "cpu" else "auto",
    }
    return AuditRequest("run", run=str(paths.root.absolute()), **{**fields, **changes})


def audited_recipe(paths: RunPaths) -> Recipe:
    """Return the recipe of a training run that has an adapter.

    Raises:
        BadInput: It is no training run, or has no adapter.
    """
    job = read_job(paths, Recipe)
    name = plain(paths.name, one_line=True)
    if job is None:
        raise BadInput(f"the run {name} is no training run: there is no adapter to audit.")
    if not paths.adapter.is_dir():
        raise BadInput(f"the run {name} has no adapter: it must be trained or stopped first.")
    return job


def audit_fields(said: Mapping[str, str]) -> dict[str, Any]:
    """Return fields of a request from the texts that a user typed; lists have commas between.

    Args:
        said: The texts by name of the field.

    Raises:
        BadInput: A text is not what its field wants.
    """
    return {name: _field(name, text) for name, text in said.items()}


def _field(name: str, text: str) -> Any:
    if name in _LEAST:
        return _whole(name, text)
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    if name in ("forms", "lanes", "lm_eval"):
        return words
    if name == "kept":
        if not all(word.isascii() and word.isdigit() for word in words):
            raise BadInput(f"keep: found {plain(text, one_line=True, limit=40)}; wanted numbers such as 1,2,4.")
        return tuple(int(word) for word in words)
    return text.strip() != "0" if name == "speed" else text


def _whole(name: str, text: str) -> int:
    least = _LEAST[name]
    if not text.isascii() or not text.isdigit() or not least <= int(text[:12]) <= 10**9:
        found = plain(text, one_line=True, limit=40) or "nothing"
        shown = name.removesuffix("_len").replace("_", "-")
        raise BadInput(f"{shown}: found {found}; wanted a whole number, {least} or more.")
    return int(text)


def rows_to_measure(request: AuditRequest) -> RowsToMeasure:
    """Read the data and return the rows that an audit of a base or a run measures.

    Raises:
        BadInput: They cannot be used, the run has no record, or no row may be called held out.
    """
    data, wanted, seed = Path(request.data), request.rows, request.seed
    if not request.run:
        return rows_of_base(data, format=request.format, wanted=wanted, seed=seed)
    paths = RunPaths(Path(request.run))
    name = f"the run {paths.name}"
    return rows_of_run(read_record(paths), name, data, format=request.format, wanted=wanted, seed=seed)


def recipe_of_race(request: AuditRequest) -> Recipe:
    """Return the recipe whose methods race.

    Raises:
        BadInput: There is none, or it holds out no rows to compare the lanes on.
    """
    recipe = request.recipe
    if recipe is None:
        raise BadInput("a race needs the recipe whose methods race.")
    if not recipe.eval.rows and not recipe.data.eval_path:
        raise BadInput(
            "a race compares its lanes on rows that none of them was trained on; this recipe holds out none. Set "
            "eval.rows above 0, or name a file of such rows in data.eval_path."
        )
    return recipe


def data_path(word: str) -> str:
    """Return a word for data that means the same in any folder.

    Raises:
        BadInput: The shipped data are missing from this installation.
    """
    return str(shipped_data()) if word == EMBEDDED else absolute_word(word)


def check_audit(request: AuditRequest) -> None:
    """Check that an audit can be made as requested.

    Raises:
        BadInput: Its kind is unknown, a model is not whole, data cannot be read, or a number makes no sense.
    """
    if request.what not in WHAT:
        raise BadInput(f"audit {plain(request.what, one_line=True, limit=40)}? Wanted one of {', '.join(WHAT)}.")
    checks_for([], request.check_regex)
    if request.lm_eval and find_spec("lm_eval") is None:
        raise BadInput(
            "lm-eval: it is not installed in this Python. Install it (pip install lm-eval), or leave it out."
        )
    for name in _LEAST:
        _whole(name, str(getattr(request, name)))
    table = FIELDS["model.precision"].kind.read(request.precision) if request.precision else ()
    if problem := next(FIELDS["model.precision"].problems(table), None):
        raise BadInput(f"precision: found {problem.found}; wanted {problem.allowed}.")
    if any(size < 0 for size in request.kept):
        raise BadInput(f"keep: found {','.join(map(str, request.kept))}; wanted numbers such as 1,2,4.")
    if request.format not in choices_of("data.format"):
        raise BadInput(f"format: wanted one of {', '.join(choices_of('data.format'))}.")
    if request.what == "race":
        request.check_lanes()
        recipe_of_race(request)
        return  # the recipe's own checks come when its runs are started
    base = find_base(request.model, request.revision)
    if how := plain(base.quantization, one_line=True, limit=40):
        word = plain(base.word, one_line=True)
        raise BadInput(f"{word} is quantised already ({how}): there is nothing to compare with. Name the original.")
    if request.run:
        find_adapter(RunPaths(Path(request.run)).adapter)
        if base.path is not None:
            refuse_another_base(request.run, base.path, known_fingerprint)
    rows_to_measure(request)


def read_report(paths: RunPaths) -> dict[str, Any] | None:
    """Return the report of a finished audit; None where there is none, or it cannot be read."""
    report = read_object(paths.report)
    return report if report.get("what") in WHAT else None


def copy_report(paths: RunPaths, folder: Path) -> list[Path]:
    """Copy the files of a finished audit's report to a folder: the page, its figures, its pictures.

    Raises:
        BadInput: There is no report, the folder cannot be written, or holds such a file already.
    """
    files = [path for path in (paths.report_text, paths.report, *sorted(paths.root.glob("*.svg"))) if path.is_file()]
    name, shown = plain(paths.name, one_line=True), plain(str(folder), one_line=True)
    if not files:
        raise BadInput(f"the audit {name} has no report yet.")
    targets = [folder / path.name for path in files]
    if there := next((path for path in targets if path.exists()), None):
        raise BadInput(f"{shown} holds {plain(there.name, one_line=True)} already: name another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, target in zip(files, targets, strict=True):
            shutil.copyfile(path, target)
    except OSError as error:
        raise BadInput(f"the report cannot be written to {shown}: {error.strerror}.") from error
    return targets
