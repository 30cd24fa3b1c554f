"""What the set-up asks in threads and remembers: is this model known, is this file sound, what fits."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from textual.content import Content

from studio.core.errors import StudioError
from studio.probe.setup import Answers
from studio.tui.setup_finder import Finder
from studio.tui.setup_texts import data_text, model_text, refused_text

if TYPE_CHECKING:
    from studio.core.advice import Advice


@dataclass(frozen=True, slots=True)
class Seen:
    """What looking at a model or a file gave: words, and the answers with it where it can be used."""

    words: Content
    answers: Answers | None = None


class Lookup:
    """Looks at what an answer names."""

    def __init__(self, finder: Finder) -> None:
        """Look through a finder."""
        self._advise = finder.advise
        self._shape = lru_cache(maxsize=32)(finder.shape)
        self._checked = lru_cache(maxsize=8)(finder.check)

    def model(self, answers: Answers) -> Seen:
        """Look at the model of some answers."""
        try:
            return Seen(model_text(answers.base, self._shape(answers.base, answers.card)), answers)
        except StudioError as error:
            return Seen(refused_text(str(error)))

    def data(self, answers: Answers) -> Seen:
        """Read the data of some answers."""
        try:
            checked = self._checked(answers.data, answers.base)
        except StudioError as error:
            return Seen(refused_text(str(error)))
        return Seen(data_text(checked), replace(answers, data=checked.facts.path) if checked.sound else None)

    def advice(self, answers: Answers) -> "Advice":
        """Return the recommendation.

        Raises:
            StudioError: Model, data or card cannot be used.
        """
        checked = self._checked(answers.data, answers.base)
        return self._advise(answers, self._shape(answers.base, answers.card), checked.facts)
