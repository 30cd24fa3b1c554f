"""What a run was asked to do. `recipe.toml` of a training run is the recipe; other jobs name themselves in it."""

import math
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, dataclass, fields
from typing import Any, ClassVar, Protocol, TypeVar, cast

import tomlkit

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe

TRAIN = "train"
"""The kind of job whose request is a recipe."""
_KIND = "job"


class Request(Protocol):
    """What a job other than a training is asked to do: a frozen dataclass.

    Attributes:
        kind: The short name of its kind of job, and of its table in `recipe.toml`.
    """

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Job = Recipe | Request
"""What any run was asked to do."""

J = TypeVar("J", bound=Job)
R = TypeVar("R", bound=Request)

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
        checkpoint: Absolute path of a checkpoint of that run, whose weights take the place of the adapter's.
        weight: What the adapter's delta is multiplied by, a number.
        more: Further adapters, each as `WEIGHT=FOLDER`; their deltas are added one after another.
        then: Formats that the merged model is exported to afterwards, each as a run of its own, one after another.
    """

    kind: ClassVar[str] = "merge"
    adapter: str
    base: str
    out: str
    revision: str = ""
    dtype: str = "auto"
    onto: str = "original"
    run: str = ""
    checkpoint: str = ""
    weight: str = "1"
    more: tuple[str, ...] = ()
    then: tuple[str, ...] = ()

    @property
    def weighted(self) -> tuple[tuple[str, float], ...]:
        """Folder and weight of every adapter, in the order in which they are added.

        Raises:
            BadInput: A weight is no finite number.
        """
        words = [(self.weight, self.adapter), *((item.partition("=")[0], item.partition("=")[2]) for item in self.more)]
        return tuple((folder, _weight(word)) for word, folder in words)


@dataclass(frozen=True, slots=True)
class ExportRequest:
    """A model in another format, or an adapter with its card.

    Attributes:
        source: Absolute path of a merged model's folder, or of an adapter's, which is merged first where the format
            wants a whole model.
        out: Absolute path of the folder that it gets, or of the file where it ends in `.gguf`.
        format: One of `EXPORT_FORMATS`.
        run: Absolute path of the training run of an adapter; empty when there is none.
        base: Of an adapter: a model folder, a hub id or `embedded`; empty means the one that it names.
        revision: Of a hub model; empty means the newest.
        onto: What an adapter is merged into, one of `ONTO`.
        push: Hub repository that the result is uploaded to as well; empty for none.
        then: Formats that the same model is exported to afterwards, as for a merge.
    """

    kind: ClassVar[str] = "export"
    source: str
    out: str
    format: str
    run: str = ""
    base: str = ""
    revision: str = ""
    onto: str = "original"
    push: str = ""
    then: tuple[str, ...] = ()


GGUF_FORMATS = ("f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
"""llama.cpp's file types for whole models, by size."""
ADAPTER_FORMATS = ("peft", "lora-gguf")
"""Formats of an adapter alone: transformers' and llama.cpp's."""
WHOLE_FORMATS = ("nf4", "int8", *GGUF_FORMATS)
"""What a merged model can be exported to: besides llama.cpp's types bitsandbytes' 4-bit NormalFloat with double
quantisation, and its 8-bit integers, outliers apart."""
EXPORT_FORMATS = (*ADAPTER_FORMATS, *WHOLE_FORMATS)
"""What a run's adapter can be exported to, merged first where the format is of a whole model."""


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise BadInput(f"the weight {plain(word, one_line=True, limit=40)} of an adapter: wanted a number such as 0.5.")
    return weight


def kind_of(job: Job) -> str:
    """Return the short name of a job's kind."""
    return TRAIN if isinstance(job, Recipe) else job.kind


def kind_in(table: Mapping[str, Any]) -> str:
    """Return the short name of the kind of job that is asked for in TOML which `job_text` made, known or not."""
    return str(table.get(_KIND, TRAIN))


def kind_of_run(paths: RunPaths) -> str:
    """Return the short name of the kind of job that a run is; of any kind, also one that this version does not know.

    Raises:
        BadInput: `recipe.toml` is missing or no TOML.
    """
    return kind_in(_table_of(paths))


def write_job(paths: RunPaths, job: Job) -> None:
    """Write `recipe.toml` of a new run, whole.

    Raises:
        OSError: The folder cannot be written.
    """
    write_whole(paths.recipe, job_text(job))


def job_text(job: Job) -> str:
    """Return a job as TOML: a recipe as it is, a request as a table named by its kind."""
    return dump_recipe(job) if isinstance(job, Recipe) else tomlkit.dumps({_KIND: job.kind, job.kind: asdict(job)})


def read_job(paths: RunPaths, wanted: type[J]) -> J | None:
    """Return what the run was asked to do; None where it is another kind of job.

    Args:
        paths: The run.
        wanted: `Recipe` for a training, or the request of another kind.

    Raises:
        BadInput: `recipe.toml` is missing or damaged.
    """
    table = _table_of(paths)
    if kind_in(table) != (TRAIN if issubclass(wanted, Recipe) else wanted.kind):
        return None
    return job_from_table(table, wanted, f"recipe.toml of the run {plain(paths.name, one_line=True)}")


def job_table(paths: RunPaths) -> dict[str, Any]:
    """Return what a run of any kind was asked to do, ready for JSON: every field of a recipe, or the request's table.

    Raises:
        BadInput: `recipe.toml` is missing or damaged.
    """
    table = _table_of(paths)
    kind = kind_in(table)
    if kind == TRAIN:
        return recipe_from_dict(table).to_dict()
    asked = table.get(kind)
    return asked if isinstance(asked, dict) else {}


def job_from_table(table: Mapping[str, Any], wanted: type[J], where: str) -> J:
    """Return a job from TOML that `job_text` made.

    Args:
        table: The whole text's.
        wanted: What its kind is asked by: `Recipe`, or a request.
        where: Where it was read, for messages.

    Raises:
        BadInput: It is damaged.
    """
    if issubclass(wanted, Recipe):
        return cast("J", recipe_from_dict(table))
    return _request(wanted, table.get(wanted.kind), where)


def _table_of(paths: RunPaths) -> dict[str, Any]:
    name = plain(paths.name, one_line=True)
    try:
        return tomllib.loads(paths.recipe.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"the run {name} has no readable recipe.toml: {error.strerror}. Is it a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"recipe.toml of the run {name} is damaged: {plain(str(error), one_line=True)}") from error


def _request(wanted: type[R], table: object, where: str) -> R:
    declared = fields(wanted)
    found = table if isinstance(table, dict) else {}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    lists = {item.name for item in declared if isinstance(item.default, tuple)}
    values = {key: value for key, value in values.items() if _is_text(value, several=key in lists)}
    known = {item.name for item in declared}
    needed = {item.name for item in declared if item.default is MISSING}
    if not needed <= values.keys() <= known:
        raise BadInput(f"the table of the job in {where} is damaged: wanted texts named {', '.join(sorted(known))}.")
    return wanted(**values)


def _is_text(value: object, *, several: bool) -> bool:
    if several:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)
