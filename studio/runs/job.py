"""What a run was asked to do. `recipe.toml` of a training run is the recipe; other jobs name themselves in it."""

import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from typing import TypeVar

import tomlkit

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe

MODULES = {"train": "studio.jobs.train", "merge": "studio.jobs.merge", "export": "studio.jobs.export"}
"""The module that does each kind of job, started as `python -m MODULE RUN`."""

ONTO = ("original", "dequantized")
"""What an adapter can be merged into: the base's weights, or those after quantising to 4 bits and back."""


@dataclass(frozen=True, slots=True)
class MergeRequest:
    """A merge of an adapter into its base.

    Attributes:
        adapter: Absolute path of the PEFT folder.
        base: A model folder, a hub id or `embedded`; empty means the one that the adapter names.
        revision: Of a hub model; empty means the newest.
        out: Absolute path of the folder that the merged model gets.
        dtype: Of the merged weights; `auto` keeps that of the base.
        onto: `original`, the base's own weights; `dequantized`, those after quantising to 4 bits and back, which a
            QLoRA adapter was trained against.
        run: Absolute path of the training run that the adapter comes from; empty when there is none.
    """

    adapter: str
    base: str
    out: str
    revision: str = ""
    dtype: str = "auto"
    onto: str = "original"
    run: str = ""


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """A merged model in fewer bits, or an adapter with its card.

    Attributes:
        source: Absolute path of the merged model's folder; for `peft` of the adapter's.
        out: Absolute path of the folder that it gets.
        format: One of `EXPORT_FORMATS`.
        run: Absolute path of the training run of an adapter; empty when there is none.
    """

    source: str
    out: str
    format: str
    run: str = ""


EXPORT_FORMATS = ("peft", "nf4", "int8")
"""The adapter alone; bitsandbytes' 4-bit NormalFloat with double quantisation; its 8-bit integers, outliers apart."""

Job = Recipe | MergeRequest | ExportRequest
_Request = TypeVar("_Request", MergeRequest, ExportRequest)


def kind_of(job: Job) -> str:
    """Return the short name of a job's kind, a key of `MODULES`."""
    if isinstance(job, Recipe):
        return "train"
    return "merge" if isinstance(job, MergeRequest) else "export"


def write_job(paths: RunPaths, job: Job) -> None:
    """Write `recipe.toml` of a new run, whole.

    Raises:
        OSError: The folder cannot be written.
    """
    kind = kind_of(job)
    text = dump_recipe(job) if isinstance(job, Recipe) else tomlkit.dumps({"job": kind, kind: asdict(job)})
    write_whole(paths.recipe, text)


def read_job(paths: RunPaths) -> Job:
    """Return what the run was asked to do.

    Raises:
        BadInput: `recipe.toml` is missing, damaged or of an unknown kind of job.
    """
    name = plain(paths.name, one_line=True)
    try:
        table = tomllib.loads(paths.recipe.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"the run {name} has no readable recipe.toml: {error.strerror}. Is it a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"recipe.toml of the run {name} is damaged: {plain(str(error), one_line=True)}") from error
    kind = table.get("job", "train")
    if kind == "train":
        return recipe_from_dict(table)
    if kind == "export":
        return _request(ExportRequest, name, table.get("export"))
    if kind != "merge":
        raise BadInput(f"the run {name} is a job of the kind {kind!r}, which this version does not know: update it.")
    return _request(MergeRequest, name, table.get("merge"))


def _request(kind: type[_Request], name: str, table: object) -> _Request:
    values = {key: value for key, value in table.items() if isinstance(value, str)} if isinstance(table, dict) else {}
    known = {item.name for item in fields(kind)}
    needed = {item.name for item in fields(kind) if item.default is MISSING}
    if not needed <= values.keys() <= known:
        wanted = ", ".join(sorted(known))
        raise BadInput(
            f"the table of the job in recipe.toml of the run {name} is damaged: wanted texts named {wanted}."
        )
    return kind(**values)
