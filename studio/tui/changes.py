"""What was changed of a recipe on the screen: taken back, done again, said in a line, and kept for the next visit."""

import contextlib
from dataclasses import dataclass, replace
from functools import partial

from textual.screen import Screen
from textual.timer import Timer

from studio.core.errors import StudioError
from studio.core.recipe import FIELDS, SECTIONS, Recipe
from studio.core.text import plain
from studio.runs.last_recipe import LastRecipe, RecipeSource, sound_part
from studio.tui.panels.recipe_form import SHOWN
from studio.tui.services import Services

_KEEP_AFTER_SECONDS = 1.0
_LONGEST_HISTORY = 200
_MOST_NAMED = 3
_LONGEST_VALUE = 28


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that the user did to a recipe."""

    before: Recipe
    after: Recipe
    before_source: RecipeSource | None = None
    """The user's file that the recipe came from before; another one afterwards where a file was opened."""
    after_source: RecipeSource | None = None

    @property
    def moves_source(self) -> bool:
        """Whether the recipe comes from another file afterwards."""
        return self.before_source != self.after_source

    @property
    def reversed(self) -> "Change":
        """The change that takes this one back."""
        return Change(self.after, self.before, self.after_source, self.before_source)

    @property
    def words(self) -> str:
        """What differs afterwards in one line, such as `Rank 32 -> 16, Alpha 64 -> 32 and 4 more`."""
        told = differences(self.before, self.after)
        if not told:
            return "the same recipe of another file"
        more = len(told) - _MOST_NAMED
        return ", ".join(told[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def differences(before: Recipe, after: Recipe) -> list[str]:
    """Return each field that differs, as the form names and orders them, such as `Rank 32 -> 16`."""
    return [
        f"{FIELDS[path].label} {_shown(path, before)} -> {_shown(path, after)}"
        for _, section in SECTIONS
        for path in section
        if before.get(path) != after.get(path)
    ]


class Changes:
    """Remembers the last 200 changes. A run of steps on one field is one change."""

    def __init__(self) -> None:
        """Begin without any."""
        self._done: list[Change] = []
        self._undone: list[Change] = []
        self._run = ""

    @property
    def possible(self) -> tuple[bool, bool]:
        """Whether there is anything to undo, and anything to redo."""
        return bool(self._done), bool(self._undone)

    def note(self, change: Change, run: str = "") -> None:
        """Remember a change; what was undone before it cannot be redone any more.

        Args:
            change: What was done.
            run: The field that was turned by a step; further steps on it are added to this change. Empty for a change
                that stands alone.
        """
        self._undone.clear()
        if run and run == self._run:
            change = replace(change, before=self._done.pop().before)
        if change.before == change.after and not change.moves_source:  # the steps have led back to where they began
            self._run = ""
            return
        self._done.append(change)
        del self._done[:-_LONGEST_HISTORY]
        self._run = run

    def end_run(self) -> None:
        """Let the next step begin another change."""
        self._run = ""

    def undo(self) -> Change | None:
        """Return the change that takes the last one back; None where there is none."""
        change = _moved(self._done, self._undone)
        self._run = ""
        return change.reversed if change else None

    def redo(self) -> Change | None:
        """Return the change that was taken back last; None where there is none."""
        self._run = ""
        return _moved(self._undone, self._done)


class Keeper:
    """Keeps a screen's recipe for the next visit once nothing was turned for a moment, or when the screen ends.

    A field with a problem is kept with the last value that had none.
    """

    def __init__(self, screen: Screen[None], recipe: Recipe, services: Services) -> None:
        """Begin with a recipe that is kept already."""
        self._screen, self._services = screen, services
        self._recipe = self._sound = recipe
        self._source: RecipeSource | None = None
        self._timer: Timer | None = None

    def soon(self, recipe: Recipe, source: RecipeSource | None) -> None:
        """Keep a recipe, with the user's file that it comes from, unless another one comes before long."""
        self._recipe, self._source = recipe, source
        if self._timer is not None:
            self._timer.stop()
        self._timer = self._screen.set_timer(_KEEP_AFTER_SECONDS, self._now)

    def at_once(self) -> None:
        """Keep what has not been kept yet."""
        if self._timer is not None:
            with contextlib.suppress(OSError, StudioError):
                self._services.keep_recipe(self._left())

    def _now(self) -> None:
        self._timer = None
        self._screen.run_worker(partial(self._keep, self._left()), thread=True, group="keep")

    def _keep(self, last: LastRecipe) -> None:
        try:
            self._services.keep_recipe(last)
        except (OSError, StudioError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            told = f"The recipe is not kept for the next visit: {plain(reason)} s saves it to a file."
            app = self._screen.app
            app.call_from_thread(app.notify, told, severity="warning", markup=False)

    def _left(self) -> LastRecipe:
        self._sound = sound_part(self._recipe, self._sound)
        return LastRecipe(self._sound, self._source)


def _moved(taken_from: list[Change], given_to: list[Change]) -> Change | None:
    if not taken_from:
        return None
    given_to.append(taken_from.pop())
    return given_to[-1]


def _shown(path: str, recipe: Recipe) -> str:
    value = plain(FIELDS[path].kind.written(recipe.get(path)), one_line=True, limit=_LONGEST_VALUE)
    return SHOWN.get(value, value) or "nothing"
