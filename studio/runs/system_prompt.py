"""The system prompt that most rows of a training begin with, kept with the run: a chat begins with it, too."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from studio.runs.atomic import read_object, write_whole
from studio.runs.layout import RunPaths


@dataclass(frozen=True, slots=True)
class SystemPrompt:
    """What rows of a training begin with.

    Attributes:
        text: The commonest system prompt; empty where most rows have none.
        rows: How many of the rows that were looked at begin with it.
        of: How many were looked at.
    """

    text: str = ""
    rows: int = 0
    of: int = 0

    @property
    def usual(self) -> str:
        """The text, where more than half of the rows begin with it; else empty."""
        return self.text if 2 * self.rows > self.of else ""


NO_SYSTEM_PROMPT = SystemPrompt()


def commonest(prompts: Iterable[str]) -> SystemPrompt:
    """Return the commonest of the rows' system prompts; empty ones count, too."""
    counts = Counter(prompts)
    text, rows = counts.most_common(1)[0] if counts else ("", 0)
    return SystemPrompt(text, rows, counts.total())


def keep_system_prompt(paths: RunPaths, prompt: SystemPrompt) -> None:
    """Write it to the run's folder.

    Raises:
        OSError: It cannot be written.
    """
    write_whole(paths.system_prompt, json.dumps(asdict(prompt), ensure_ascii=False) + "\n")


def read_system_prompt(paths: RunPaths) -> SystemPrompt:
    """Return the one of a run; an empty one where none is kept, or the file is damaged."""
    found = read_object(paths.system_prompt)
    text, rows, of = found.get("text"), found.get("rows"), found.get("of")
    if isinstance(text, str) and isinstance(rows, int) and isinstance(of, int):
        return SystemPrompt(text, rows, of)
    return NO_SYSTEM_PROMPT
