"""What can be chosen before an audit is started from the studio, and the audit that the choices mean."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.runs.audit_request import AuditRequest
from studio.runs.layout import RunPaths

_DEFAULT = AuditRequest("base")
_ANSWERS = "6"
"""Prompts answered unless something else is typed: enough to read, too few to prove much."""


@dataclass(frozen=True, slots=True)
class Wish:
    """One choice.

    Attributes:
        key: A field of the request, or `steps`.
        label: What it is.
        value: What it is unless something else is typed.
        hint: More words, shown while it is empty.
    """

    key: str
    label: str
    value: str = ""
    hint: str = ""


def base_wishes() -> tuple[Wish, ...]:
    """Return what can be chosen of an audit of a base."""
    return (
        Wish("rows", "Rows, at most", str(_DEFAULT.rows)),
        Wish("forms", "Roundings", ",".join(_DEFAULT.forms)),
        Wish("kept", "Plans that keep the N worst blocks", ",".join(map(str, _DEFAULT.kept)), "none"),
    )


def run_wishes() -> tuple[Wish, ...]:
    """Return what can be chosen of an audit of a run's adapter."""
    there = find_spec("lm_eval") is not None
    return (
        Wish("rows", "Held-out rows, at most", "", "all that the run held out"),
        Wish("answers", "Prompts answered side by side", _ANSWERS, "none"),
        Wish("check_regex", "Pattern of a good answer", "", "a regular expression; not needed"),
        Wish("speed", "Measure tokens/s (1 yes, 0 no)", "1", "0"),
        Wish("gguf", "A GGUF file to measure too", "", "a path; exports are found without"),
        Wish("lm_eval", "Tasks of lm-eval", "", "names; not needed" if there else "not installed: pip install lm-eval"),
    )


def race_wishes(recipe: Recipe) -> tuple[Wish, ...]:
    """Return what can be chosen of a race of a recipe."""
    steps = str(recipe.train.steps) if recipe.train.steps else ""
    return (
        Wish("steps", "Optimizer steps of each lane", steps, "to the end of the recipe's epochs"),
        Wish("lanes", "Lanes", ",".join(_DEFAULT.lanes), "also qlora+loftq, qlora+mixed"),
    )


def base_request(recipe: Recipe, said: Mapping[str, str]) -> AuditRequest:
    """Return the audit of a recipe's base.

    Raises:
        BadInput: The shipped data are missing from this installation, or a choice is not what its field wants.
    """
    from studio.probe.audit import audit_fields, data_path  # noqa: PLC0415  0.15 s, needed only at a start

    return AuditRequest(
        "base",
        model=recipe.model.base,
        revision=recipe.model.revision,
        data=data_path(recipe.data.path),
        format=recipe.data.format,
        **{"seed": recipe.train.seed, "seq_len": recipe.train.seq_len, **audit_fields(said)},
    )


def run_request(paths: RunPaths, said: Mapping[str, str]) -> AuditRequest:
    """Return the audit of a run's adapter.

    Raises:
        BadInput: It is no training run, has no adapter, no record of its held-out rows, or a choice is not what its
            field wants.
    """
    from studio.probe.audit import audit_fields, audit_of_run  # noqa: PLC0415  as above

    words = {key: value or _EMPTY_MEANS.get(key, "") for key, value in said.items() if value or key != "rows"}
    gguf = words.pop("gguf", "")
    places = (str(Path(gguf).expanduser().absolute()),) if gguf else ()
    return audit_of_run(paths, **audit_fields(words), gguf=places)


def race_request(recipe: Recipe, said: Mapping[str, str]) -> AuditRequest:
    """Return the race of a recipe.

    Raises:
        BadInput: The steps are no number.
    """
    from studio.probe.audit import audit_fields  # noqa: PLC0415  as above

    steps = said.get("steps") or "0"
    if not (steps.isascii() and steps.isdigit() and int(steps[:12]) <= 10**7):
        raise BadInput(f"steps: found {plain(steps, one_line=True, limit=40)}; wanted a whole number.")
    recipe = recipe.with_("train.steps", int(steps))
    lanes = audit_fields({"lanes": said["lanes"]}) if said.get("lanes") else {}
    return AuditRequest("race", model=recipe.model.base, revision=recipe.model.revision, recipe=recipe, **lanes)


_EMPTY_MEANS = {"answers": "0", "speed": "0"}
