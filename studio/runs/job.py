"""What a run was asked to do. `recipe.toml` of a training run is the recipe; other jobs name themselves in it."""

import math
import tomllib
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import tomlkit

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths
from studio.runs.measure_request import MeasureRequest
from studio.runs.recipe_file import dump_recipe

MODULES = {kind: f"studio.jobs.{kind}" for kind in ("train", "merge", "export", "audit", "measure")}
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
        checkpoint: Absolute path of a checkpoint of that run, whose weights take the place of the adapter's.
        weight: What the adapter's delta is multiplied by, a number.
        more: Further adapters, each as `WEIGHT=FOLDER`; their deltas are added one after another.
        then: Formats that the merged model is exported to afterwards, each as a run of its own, one after another.
    """

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
EXPORT_FORMATS = (*ADAPTER_FORMATS, "nf4", "int8", *GGUF_FORMATS)
"""Besides those, bitsandbytes' 4-bit NormalFloat with double quantisation, and its 8-bit integers, outliers apart."""


def _weight(word: str) -> float:
    try:
        weight = float(word)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise BadInput(f"the weight {plain(word, one_line=True, limit=40)} of an adapter: wanted a number such as 0.5.")
    return weight


Request = MergeRequest | ExportRequest | AuditRequest | MeasureRequest
Job = Recipe | Request
_REQUESTS: dict[str, type[Request]] = {
    "merge": MergeRequest,
    "export": ExportRequest,
    "audit": AuditRequest,
    "measure": MeasureRequest,
}


def kind_of(job: Job) -> str:
    """Return the short name of a job's kind, a key of `MODULES`."""
    if isinstance(job, Recipe):
        return "train"
    return next(kind for kind, request in _REQUESTS.items() if isinstance(job, request))


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
    if not isinstance(kind, str) or kind not in _REQUESTS:
        raise BadInput(f"the run {name} is a job of the kind {kind!r}, which this version does not know: update it.")
    return _request(_REQUESTS[kind], name, table.get(kind))


def _request(kind: type[Request], name: str, table: object) -> Request:
    found = table if isinstance(table, dict) else {}
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    lists = {item.name for item in fields(kind) if isinstance(item.default, tuple)}
    values = {key: value for key, value in values.items() if _is_text(value, several=key in lists)}
    known = {item.name for item in fields(kind)}
    needed = {item.name for item in fields(kind) if item.default is MISSING}
    if not needed <= values.keys() <= known:
        wanted = ", ".join(sorted(known))
        raise BadInput(
            f"the table of the job in recipe.toml of the run {name} is damaged: wanted texts named {wanted}."
        )
    return kind(**values)


def _is_text(value: object, *, several: bool) -> bool:
    if several:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, str)
