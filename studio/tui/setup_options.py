"""What the steps of the guided set-up offer, and what a chosen or typed word means."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from textual.content import Content

from studio.core.goals import GOALS, Goal
from studio.core.recipe import EMBEDDED, Recipe
from studio.core.recommendation import Recommendation
from studio.core.text import plain
from studio.probe.hub import is_hub_id
from studio.tui.panels.setup_step import Shown, path_line
from studio.tui.setup_texts import goal_line

HERE, OTHER = "here", "other"
"""The machine step's answers beside the name of a card."""

Then = Literal["launch", "configure", "save"]
Options = list[tuple[str, Shown]]
"""Values and what is shown for them."""


@dataclass(frozen=True, slots=True)
class SetupDone:
    """How the set-up ended.

    Attributes:
        recipe: The recommended recipe.
        then: Start it, look at it on the configure screen, or save it to a file.
        card: The card that was planned for; empty for this machine's.
    """

    recipe: Recipe
    then: Then
    card: str


def card_options(card: str) -> Options:
    """Offer this machine, the card of the catalogue that was chosen, another one."""
    chosen = [(card, Content(f"Plan for {plain(card, one_line=True)}"))] if card else []
    return [(HERE, Content("This machine, as it is")), *chosen, (OTHER, Content("Plan for another card ..."))]


def data_options(files: Sequence[str], chosen: str) -> Options:
    """Offer the embedded data and the files that were found; before them another file that was chosen."""
    options: Options = [(EMBEDDED, Content("embedded: questions about Python's standard library"))]
    options += [(file, path_line(file)) for file in files]
    return options if chosen in (EMBEDDED, *files) else [(chosen, path_line(chosen)), *options]


def goal_options() -> Options:
    """Offer every goal."""
    return [(goal, goal_line(goal)) for goal in GOALS]


def end_options() -> Options:
    """Offer what can be done with the recommended recipe."""
    words: dict[Then, str] = {
        "launch": "Start training now",
        "configure": "Look at every knob first",
        "save": "Save the recipe to a file",
    }
    return [(then, Content(text)) for then, text in words.items()]


def likely_end(recommendation: Recommendation, card: str) -> Then:
    """Return which of them stands under the cursor: a start, where the recipe runs here and fits."""
    return "launch" if recommendation.verdict in (None, "fits") and not card else "configure"


def goal_of(word: str) -> Goal:
    """Return the goal of an option."""
    return next(goal for goal in GOALS if goal == word)


def end_of(word: str) -> Then:
    """Return the end of an option."""
    return "launch" if word == "launch" else "save" if word == "save" else "configure"


def is_model(word: str) -> bool:
    """Return whether a line names a model rather than words to search for."""
    if word == EMBEDDED or word.startswith((".", "~")) or "\0" in word:
        return True
    try:
        if Path(word).is_dir():
            return True
    except OSError:
        return False
    return "/" in word and (is_hub_id(word) or word.startswith("/"))
