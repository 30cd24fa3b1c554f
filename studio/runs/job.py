"""What a run was asked to do. `recipe.toml` of a training run is the recipe; other jobs name themselves in it."""

import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import UnionType
from typing import Any, ClassVar, Protocol, TypeVar, cast, get_args, get_origin, get_type_hints

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
    if isinstance(job, Recipe):
        return dump_recipe(job)
    import tomlkit  # noqa: PLC0415  7 ms that reading does not need

    return tomlkit.dumps({_KIND: job.kind, job.kind: _table_to_write(job)})


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
    return cast("J", _read_fields(wanted, table.get(wanted.kind), where))


def _table_of(paths: RunPaths) -> dict[str, Any]:
    name = plain(paths.name, one_line=True)
    try:
        return tomllib.loads(paths.recipe.read_text("utf-8"))
    except OSError as error:
        raise BadInput(f"the run {name} has no readable recipe.toml: {error.strerror}. Is it a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise BadInput(f"recipe.toml of the run {name} is damaged: {plain(str(error), one_line=True)}") from error


def _table_to_write(request: Request) -> dict[str, Any]:
    """Return the fields of a request as TOML has them; None is left out, as TOML has no word for it."""
    values = {item.name: getattr(request, item.name) for item in fields(request)}
    return {name: _to_write(value) for name, value in values.items() if value is not None}


def _to_write(value: Any) -> Any:
    if isinstance(value, Recipe):
        return value.to_dict()
    if is_dataclass(value):
        return {item.name: _to_write(getattr(value, item.name)) for item in fields(value)}
    return [_to_write(item) for item in value] if isinstance(value, tuple) else value


def _read_as(wanted: Any, value: object, where: str) -> Any:
    """Return a value from TOML as the type that a field has.

    Args:
        wanted: str, int, float, bool, a tuple of these, a recipe, another dataclass, or one of them or None.
        value: As TOML has it.
        where: Names the field, for messages.

    Raises:
        BadInput: It is of another type.
    """
    if get_origin(wanted) is tuple and isinstance(value, list):
        items = get_args(wanted)
        kinds = items[:1] * len(value) if items[-1] is ... else items
        if len(value) == len(kinds):
            return tuple(_read_as(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    elif get_origin(wanted) is UnionType:
        return _read_as(get_args(wanted)[0], value, where)
    elif wanted is Recipe and isinstance(value, dict):
        return recipe_from_dict(value)
    elif is_dataclass(wanted) and isinstance(value, dict):
        return _read_fields(wanted, value, where)
    elif wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    elif type(value) is wanted:
        return value
    raise BadInput(f"{where} is damaged: found {plain(str(value), one_line=True, limit=40)!r}.")


def _read_fields(wanted: Any, table: object, where: str) -> Any:
    found = table if isinstance(table, dict) else {}
    needed = {item.name for item in fields(wanted) if item.default is MISSING}
    known = {item.name for item in fields(wanted)}
    if not needed <= found.keys() <= known:
        raise BadInput(f"{where} is damaged: wanted fields named {', '.join(sorted(known))}.")
    types = get_type_hints(wanted)
    return wanted(**{name: _read_as(types[name], value, f"{name} in {where}") for name, value in found.items()})
