"""A real terminal for stories: a tmux session, seen by what stands on its screen."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

TMUX = shutil.which("tmux")
PATIENCE_SECONDS = 180.0
STUDIO = f"{sys.executable} -m studio"


class Terminal:
    """A tmux session of one size with a shell in it.

    Each has a server of its own: one that ends with its last session would be lost to a session that begins meanwhile.
    """

    def __init__(self, columns: int, rows: int, home: Path) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="story-")
        shell = f"env LORA_STUDIO_HOME={home} PS1=ready: bash --norc --noprofile"
        self._tmux("new-session", "-d", "-s", "story", "-x", str(columns), "-y", str(rows), shell)

    def type(self, *keys: str) -> None:
        self._tmux("send-keys", "-t", "story", *keys)

    def settle(self) -> None:
        """Wait until the screen stands still."""
        before, end = "", time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and (now := self.screen()) != before:
            before = now
            time.sleep(0.3)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-t", "story")

    def coloured(self) -> str:
        """The screen with its colours, as escape sequences, every row up to its end."""
        return self._tmux("capture-pane", "-e", "-N", "-p", "-t", "story")

    def until(self, seen: Callable[[str], bool], what: str, seconds: float = PATIENCE_SECONDS) -> str:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            screen = self.screen()
            if seen(screen):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"never saw {what}; the screen is:\n{self.screen()}")

    def close(self) -> None:
        with suppress(subprocess.CalledProcessError):  # it has ended where the shell has
            self._tmux("kill-server")
        self._folder.cleanup()

    def _tmux(self, *words: str) -> str:
        environment = {**os.environ, "COLORTERM": "truecolor"}
        environment.pop("TMUX", None)
        command = ["tmux", "-S", f"{self._folder.name}/socket", "-f", os.devnull, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
