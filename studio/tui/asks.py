"""What screens ask of the app: messages, so that no screen reaches for another."""

from textual.message import Message

from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths


class _AboutRun(Message):
    """A wish that is about one run."""

    def __init__(self, paths: RunPaths) -> None:
        """Carry the run."""
        super().__init__()
        self.paths = paths


class OpenRun(_AboutRun):
    """The user wants to watch a run."""


class OpenChat(_AboutRun):
    """The user wants to chat with what a run made."""


class ShowMerge(_AboutRun):
    """The user wants to merge a run's adapter or, where the run is a merge, to see what came of it."""


class ShowRuns(Message):
    """The user wants the list of runs."""


class ShowAudits(Message):
    """The user wants the list of audits and, where a run is given, a new audit of its adapter."""

    def __init__(self, run: RunPaths | None = None) -> None:
        """Carry the run whose adapter is to be audited, if any."""
        super().__init__()
        self.run = run


class ShowSetup(Message):
    """The user wants the guided set-up."""


class ShowData(Message):
    """The user wants to see the data of a recipe as the model reads it."""

    def __init__(self, recipe: Recipe, run: RunPaths | None = None, *, pairs: bool = False) -> None:
        """Carry the recipe, the run that it belongs to, if any, and whether pairs of answers are shown as pairs."""
        super().__init__()
        self.recipe, self.run, self.pairs = recipe, run, pairs
