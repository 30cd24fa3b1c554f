"""A real terminal for stories: a tmux session, seen by what stands on its screen."""

import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

TMUX = shutil.which("tmux")
PATIENCE_SECONDS = 90.0
STUDIO = f"{sys.executable} -m studio"


class Terminal:
    """A tmux session of one size with a shell in it."""

    def __init__(self, columns: int, rows: int, home: Path) -> None:
        self.name = f"story-{uuid.uuid4().hex[:8]}"
        shell = f"env LORA_STUDIO_HOME={home} PS1=ready: bash --norc --noprofile"
        self._tmux("new-session", "-d", "-s", self.name, "-x", str(columns), "-y", str(rows), shell)

    def type(self, *keys: str) -> None:
        self._tmux("send-keys", "-t", self.name, *keys)

    def settle(self) -> None:
        """Wait until the screen stands still."""
        before, end = "", time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end and (now := self.screen()) != before:
            before = now
            time.sleep(0.3)

    def screen(self) -> str:
        return self._tmux("capture-pane", "-p", "-t", self.name)

    def until(self, seen: Callable[[str], bool], what: str) -> str:
        end = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < end:
            screen = self.screen()
            if seen(screen):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"never saw {what}; the screen is:\n{self.screen()}")

    def close(self) -> None:
        subprocess.run(["tmux", "kill-session", "-t", self.name], check=False, capture_output=True)

    @staticmethod
    def _tmux(*words: str) -> str:
        environment = {**os.environ, "COLORTERM": "truecolor"}
        environment.pop("TMUX", None)
        return subprocess.run(["tmux", *words], check=True, capture_output=True, text=True, env=environment).stdout
