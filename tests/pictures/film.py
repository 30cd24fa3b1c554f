"""A short film of the studio in a real terminal: launch, gauge, training, merge. Every process in it is real.

`python -m tests.pictures.film` writes docs/pictures/film.svg. Trained is the demo's recipe with fewer rows a step and
fewer steps. What the film leaves out is waiting, and the clock above it says how much time had passed. Needs tmux.
"""

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event, Thread

from rich.ansi import AnsiDecoder
from rich.console import Console

from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe, load_recipe, shipped_recipes
from studio.runs.supervise import stop
from tests.pictures.drawn import Frame, Ground, Row, moving, rows_of
from tests.pictures.home import Home
from tests.pictures.looks import elsewhere
from tests.story.tmux import Terminal

ROOT = Path(__file__).resolve().parents[2]
COLUMNS, ROWS = 100, 30
_LOOK_SECONDS = 0.1
_LONGEST_SECONDS = 0.45
"""How long the film stays on a screen that nobody touches."""
_HELD_SECONDS = 1.6
_LAST_SECONDS = 4.0
_TRAINED_SECONDS = 3600.0
_SMALLER = {
    "name": "first",
    "train.micro_batch": 4,
    "train.accumulation": 1,
    "train.steps": 10,
    "train.seq_len": 128,
    "train.checkpoint_every": 5,
    "eval.rows": 8,
    "eval.every": 5,
    "eval.samples": 1,
    "eval.sample_tokens": 16,
}
"""What makes the demo's recipe short enough to be watched."""


@dataclass(slots=True)
class Reel:
    """The screens of a terminal as they follow each other.

    Attributes:
        seen: When each came, in seconds since the start, with its text and escape sequences.
        held: When something was to be looked at for longer.
    """

    seen: list[tuple[float, str]] = field(default_factory=list)
    held: list[float] = field(default_factory=list)

    def frames(self) -> list[Frame]:
        """Return what is shown, and for how long: as it was, but without the waiting."""
        found = []
        ends = [came for came, _ in self.seen[1:]] + [self.seen[-1][0] + _LAST_SECONDS]
        for (came, text), end in zip(self.seen, ends, strict=True):
            waits = end == ends[-1] or any(came <= moment < end for moment in self.held)
            longest = max(_HELD_SECONDS, _LAST_SECONDS * (end == ends[-1])) if waits else _LONGEST_SECONDS
            clock = f"{int(came) // 60}:{int(came) % 60:02} since the start"
            found.append(Frame(rows_from(text), max(min(end - came, longest), _LOOK_SECONDS), clock))
        return found


def rows_from(text: str) -> list[Row]:
    """Return the rows of a screen as tmux tells it: text with escape sequences."""
    console = Console(width=COLUMNS, color_system="truecolor")
    return rows_of([list(line.render(console, end="")) for line in AnsiDecoder().decode(text)])


@contextmanager
def filmed(terminal: Terminal) -> Iterator[Reel]:
    """Keep every screen that the terminal shows until the block ends."""
    reel, over, began = Reel(), Event(), time.monotonic()

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            text = terminal.coloured()
            if not reel.seen or reel.seen[-1][1] != text:
                reel.seen.append((time.monotonic() - began, text))

    camera = Thread(target=look)
    camera.start()
    try:
        yield reel
    finally:
        over.set()
        camera.join()
    reel.held = [moment - began for moment in reel.held]


def play(terminal: Terminal, reel: Reel) -> None:
    """Do what the film shows."""

    def press(*keys: str, seen: Callable[[str], bool] | None = None, hold: bool = False, pause: float = 0.5) -> None:
        for key in keys:
            terminal.type(key)
            time.sleep(pause)
        if seen is not None:
            terminal.until(seen, f"what follows {keys}", _TRAINED_SECONDS)
        if hold:
            time.sleep(_HELD_SECONDS)
            reel.held.append(time.monotonic() - _HELD_SECONDS / 2)

    terminal.type("lora-studio --recipe first.toml")
    press(pause=0.5)
    press("Enter", seen=lambda text: "GiB" in text and "Rank" in text, hold=True)
    press(*["Right"] * 5, pause=0.4, hold=True)
    press(*["Left"] * 5, pause=0.25)
    press("m", hold=True)
    press("m", hold=True)
    press("r", seen=lambda text: "step" in text and "Stop" in text, hold=True)
    press(seen=lambda text: "done after" in text, hold=True)
    press("2", seen=lambda text: "before" in text.lower() or "held-out" in text.lower(), hold=True)
    press("1", pause=0.8)
    press("m", seen=lambda text: "Merge into" in text, hold=True)
    press("r", seen=lambda text: "verified" in text.lower() or "same as" in text.lower(), hold=True)


def main(words: Sequence[str]) -> int:
    """Film, and write the picture to docs/, or to the file that is named."""
    file = Path(words[0]) if words else ROOT / "docs" / "pictures" / "film.svg"
    home = Home(ROOT / "build" / "pictures" / "film")
    shutil.rmtree(home.runs, ignore_errors=True)
    home.prepare()
    (home.folder / "setup.json").write_text("{}")
    recipe = load_recipe(shipped_recipes()["demo"])
    for path, value in _SMALLER.items():
        recipe = recipe.with_(path, value)
    (home.folder / "first.toml").write_text(dump_recipe(recipe), "utf-8")
    terminal = Terminal(COLUMNS, ROWS, home.folder)
    try:
        terminal.type(f"export PATH={Path(sys.executable).parent}:$PATH PS1='$ '; cd {home.folder}; clear", "Enter")
        time.sleep(1.0)
        with filmed(terminal) as reel:
            play(terminal, reel)
    finally:
        terminal.close()
        for folder in home.runs.glob("*"):
            stop(RunPaths(folder), grace_seconds=10)
    frames = [replace(frame, rows=elsewhere(frame.rows, home.folder)) for frame in reel.frames()]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(moving(frames, COLUMNS, Ground(), "Launch, gauge, training and merge in lora-studio"), "utf-8")
    seconds, megabytes = sum(frame.seconds for frame in frames), file.stat().st_size / 1e6
    print(f"{file}: {len(frames)} screens, {seconds:.0f} s, {megabytes:.2f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
