"""What the guided set-up asks in threads and remembers: is this model known, is this file sound, what fits."""

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from textual import work
from textual.content import Content
from textual.message import Message
from textual.screen import Screen

from studio.core.errors import StudioError
from studio.probe.setup import Answers
from studio.tui.panels.setup_step import SetupStep
from studio.tui.setup_finder import Finder
from studio.tui.setup_options import SetupDone, data_options
from studio.tui.setup_texts import data_text, machine_text, model_text, refused_text

if TYPE_CHECKING:
    from studio.core.recommendation import Recommendation


@dataclass(frozen=True, slots=True)
class Seen:
    """What looking at a model or a file gave: words, and the answers with it where it can be used."""

    words: Content
    answers: Answers | None = None


class Lookup:
    """Looks at what an answer names."""

    def __init__(self, finder: Finder) -> None:
        """Look through a finder."""
        self._recommend = finder.recommend
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

    def recommendation(self, answers: Answers) -> "Recommendation":
        """Return the recommendation.

        Raises:
            StudioError: Model, data or card cannot be used.
        """
        checked = self._checked(answers.data, answers.base)
        return self._recommend(answers, self._shape(answers.base, answers.card), checked.facts)


if TYPE_CHECKING:
    from studio.core.recommendation import Recommendation
    from studio.probe.local_models import Listed


class SetupThreads(Screen[SetupDone | None]):
    """The set-up without its questions. What is simple is told to its step at once, the rest becomes a message."""

    class Looked(Message):
        """A thread has looked at a model or a file."""

        def __init__(self, step: str, value: str, seen: Seen) -> None:
            """Carry what was looked at, and what was seen."""
            super().__init__()
            self.step, self.value, self.seen = step, value, seen

    class Models(Message):
        """Models were found."""

        def __init__(self, models: "list[Listed]", words: Content | None = None) -> None:
            """Carry them, and what is to be said of the search."""
            super().__init__()
            self.models, self.words = models, words

    class Recommended(Message):
        """The recommendation is there."""

        def __init__(self, answers: Answers, recommendation: "Recommendation") -> None:
            """Carry it with the answers that it is for."""
            super().__init__()
            self.answers, self.recommendation = answers, recommendation

    def __init__(self, finder: Finder, runs_root: Path) -> None:
        """Look through a finder."""
        super().__init__()
        self._finder, self._runs_root = finder, runs_root
        self._lookup = Lookup(finder)

    @work(thread=True, group="machine")
    def _look_at_machine(self) -> None:
        words = machine_text(self._finder.machine(self._runs_root), self._runs_root)
        self.app.call_from_thread(self._step("machine").tell, words)

    @work(thread=True, group="models")
    def _look_for_models(self) -> None:
        self.post_message(self.Models(self._finder.models()))

    @work(thread=True, group="files")
    def _look_for_files(self, chosen: str) -> None:
        files = [str(path) for path in self._finder.files()]
        options = data_options(files, chosen)
        self.app.call_from_thread(self._step("data").offer, options, chosen)

    @work(thread=True, exclusive=True, group="hub")
    def _ask_hub(self, words: str) -> None:
        from studio.probe.local_models import Listed  # noqa: PLC0415  with the thread

        try:
            found = [Listed(word, "hub") for word in self._finder.search(words)]
        except StudioError as error:
            self.app.call_from_thread(self._step("model").tell, refused_text(str(error)))
            return
        told = f"{len(found)} found on the hub, the most used first." if found else "The hub has nothing of that name."
        self.post_message(self.Models(found, Content(told)))

    @work(thread=True, exclusive=True, group="look")
    def _look(self, step: str, value: str, answers: Answers) -> None:
        seen = self._lookup.model(answers) if step == "model" else self._lookup.data(answers)
        self.post_message(self.Looked(step, value, seen))

    @work(thread=True, exclusive=True, group="recommendation")
    def _recommend(self, answers: Answers) -> None:
        try:
            self.post_message(self.Recommended(answers, self._lookup.recommendation(answers)))
        except StudioError as error:
            words = refused_text(f"{error}\nescape goes back to the question.")
            self.app.call_from_thread(self._step("recipe").tell, words)

    def _step(self, key: str) -> SetupStep:
        return self.query_one(f"#step-{key}", SetupStep)
