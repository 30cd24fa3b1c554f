"""Steps that a run was given beyond its plan: `extensions.json` in its folder. The recipe beside it stays as it is."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from studio.core.errors import BadInput
from studio.core.events import Finished
from studio.core.recipe import Recipe
from studio.core.schedule import TAILS, Extension, Tail, extended_rate_at, total_steps_of, usual_tail
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.checkpoints import resumption
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log_parts import log_tail

_SCHEMA = 1
_MOST_STEPS = 10_000_000
_WISH = re.compile(r"(\d+)\s*steps?|(\d+(?:\.\d+)?)\s*epochs?")


HINT = "Steps or epochs, and after them how the learning rate goes on, if not as usual:\n" + "\n".join(
    f"{tail}: it {words}" for tail, words in TAILS.items()
)
"""What may be typed as a wish."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How much longer a run shall train: `steps`, or passes over its rows; and how the learning rate goes on.

    Attributes:
        steps: Further optimizer steps; 0 lets `epochs` decide.
        epochs: Further passes over the rows.
        tail: How the rate goes on; None takes what is usual for the recipe's schedule.
    """

    steps: int = 0
    epochs: float = 0.0
    tail: Tail | None = None


def wish_in(text: str) -> Wish:
    """Return the wish that a person typed, such as `200 steps` or `1.5 epochs constant`.

    Raises:
        BadInput: It is none.
    """
    words = text.strip().lower()
    tail = next((tail for tail in TAILS if words.endswith(tail)), None)
    found = _WISH.fullmatch(words.removesuffix(tail or "").strip())
    if found is None:
        shown = plain(text, one_line=True, limit=40)
        raise BadInput(f"found {shown!r}; wanted such as 200 steps or 2 epochs, and after it {', '.join(TAILS)}.")
    return Wish(int(found[1] or 0), float(found[2] or 0), tail)


def read_extensions(paths: RunPaths) -> tuple[Extension, ...]:
    """Return the steps that a run was given beyond its plan, one extension after the other; none without the file.

    Raises:
        BadInput: The file is damaged, so that nobody knows how long the run is.
    """
    try:
        table = json.loads(paths.extensions.read_bytes())
        if table["schema"] == _SCHEMA:
            found = tuple(Extension(**one) for one in table["extensions"])
            if all(one.end == after.after for one, after in itertools.pairwise(found)):
                return found
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    name = plain(paths.name, one_line=True)
    raise BadInput(
        f"{paths.extensions.name} of the run {name} is damaged: how many steps it was given beyond its plan is not "
        f"known. Put it back, or delete it and extend the run again."
    )


def write_extensions(paths: RunPaths, extensions: Sequence[Extension]) -> None:
    """Write them, whole; none removes the file.

    Raises:
        OSError: The folder cannot be written.
    """
    if not extensions:
        paths.extensions.unlink(missing_ok=True)
        return
    table = {"schema": _SCHEMA, "extensions": [asdict(one) for one in extensions]}
    write_whole(paths.extensions, json.dumps(table, indent=1) + "\n")


def has_steps_left(paths: RunPaths) -> bool:
    """Return whether a run that has finished was given steps since."""
    finished = log_tail(paths.events).last(Finished)
    known = read_extensions(paths)
    return bool(known and finished and finished.step is not None and finished.step < known[-1].end)


def steps_of(paths: RunPaths, recipe: Recipe, rows: int) -> tuple[int, tuple[Extension, ...]]:
    """Return all optimizer steps of a run, and what they hold beyond its plan.

    Args:
        paths: The run.
        recipe: What it is made from.
        rows: How many rows it trains on.

    Raises:
        BadInput: `extensions.json` is damaged, or of another plan.
    """
    train, known = recipe.train, read_extensions(paths)
    planned_steps = total_steps_of(
        steps=train.steps, epochs=train.epochs, rows=rows, rows_per_step=recipe.rows_per_step
    )
    if known and known[0].after != planned_steps:
        raise BadInput(
            f"{paths.extensions.name} adds steps after step {known[0].after}, but recipe and rows make "
            f"{planned_steps}: put both back as they were."
        )
    return known[-1].end if known else planned_steps, known


def extension_for(paths: RunPaths, recipe: Recipe, history: History, wish: Wish) -> Extension:
    """Return what a wish adds to a run, behind all that it was given so far.

    Args:
        paths: The run.
        recipe: What it was made from.
        history: What it told.
        wish: How much longer.

    Raises:
        BadInput: The run cannot be extended: it has not begun, or no checkpoint is whole.
    """
    name, planned = plain(paths.name, one_line=True), history.planned
    if planned is None:
        raise BadInput(
            f"the run {name} ended before it had begun to train: resume it, or start a new one with more steps."
        )
    known = read_extensions(paths)
    after = known[-1].end if known else planned.total_steps
    found = resumption(paths, history, from_start=False)
    if found.checkpoint is None and found.done:
        raise BadInput(
            f"the run {name} has no checkpoint to go on from. Start a new run from its adapter: lora-studio train "
            f"RECIPE --set adapter.start={name}"
        )
    steps = wish.steps or total_steps_of(
        steps=0, epochs=wish.epochs, rows=planned.rows, rows_per_step=recipe.rows_per_step
    )
    if not 1 <= steps <= _MOST_STEPS or (not wish.steps and wish.epochs <= 0):
        raise BadInput(f"found {steps} further steps; wanted 1 to {_MOST_STEPS}.")
    return Extension(after, steps, wish.tail or usual_tail(recipe.train.schedule))


def extension_words(paths: RunPaths, recipe: Recipe, extension: Extension) -> str:
    """Return in words what an extension does, with the rates that the steps beyond the plan begin and end with."""
    known = read_extensions(paths)
    every = (*(one for one in known if one.end <= extension.after), extension)

    def rate(step: int) -> float:
        return extended_rate_at(
            step,
            planned_steps=every[0].after,
            extensions=every,
            peak=recipe.train.learning_rate,
            schedule=recipe.train.schedule,
            warmup_fraction=recipe.train.warmup_fraction,
        )

    first, last, highest = rate(extension.after + 1), rate(extension.end), max(
        rate(extension.after + 1 + place * (extension.steps - 1) // 100) for place in range(101)
    )  # fmt: skip
    little = " That is hardly anything." if highest < recipe.train.learning_rate / 100 else ""
    return (
        f"{extension.after} -> {extension.end} steps. Beyond step {extension.after} the learning rate "
        f"{TAILS[extension.tail]} ({extension.tail}): {first:.2e} at first, {highest:.2e} at most, {last:.2e} at the "
        f"end.{little}"
    )
