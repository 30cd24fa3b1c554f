"""Runs `llama_tool.py` in its own process, tells progress by the size of its file, and reports its error message."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from studio.core.errors import JobFailed
from studio.core.text import plain

_SCRIPT = Path(__file__).with_name("llama_tool.py")
_POLL_SECONDS = 0.05
_TAIL_BYTES = 8000
_NOT_LOADED = ("gguf_init_from_reader:", "llama_model_load: error loading model")
"""Beginnings of the lines in which llama.cpp's library gives its reason; the first such line says most."""
_KEPT_VARIABLES = (
    "PATH", "HOME", "TMPDIR", "TEMP", "TMP", "SYSTEMROOT", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS",
)  # fmt: skip
"""The environment variables that the tool gets: no hub tokens and no Python settings, which it does not need."""


@dataclass(frozen=True, slots=True)
class LlamaTool:
    """The tool with its surroundings.

    Attributes:
        tools: The folder that `ensure_tools` returned.
        log: The file that gets what the tool prints.
        heed: Raises if the user asked for an early end.
    """

    tools: Path
    log: Path
    heed: Callable[[], None]

    def run(
        self,
        verb: str,
        *words: str | Path,
        out: Path | None = None,
        expected_bytes: int = 0,
        tell: Callable[[float], None] = lambda fraction: None,
    ) -> None:
        """Run one verb of the tool to its end.

        Args:
            verb: See `llama_tool.py`.
            words: Its arguments.
            out: A file that the tool writes; its size tells the progress.
            expected_bytes: The size that it will have in the end.
            tell: Told the fraction done, 0 to 1.

        Raises:
            JobFailed: The tool failed; the message has its own last words.
        """
        began = self._log_bytes()
        with self.log.open("ab") as file:
            process = subprocess.Popen(
                self._command(verb, words), stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=_environment()
            )
            try:
                while process.poll() is None:
                    self.heed()
                    if out is not None and expected_bytes and out.exists():
                        tell(min(1.0, out.stat().st_size / expected_bytes))
                    time.sleep(_POLL_SECONDS)
            except BaseException:
                process.kill()
                process.wait()
                raise
        self._require_success(verb, process.returncode, began)

    @contextmanager
    def stream(self, verb: str, *words: str | Path) -> Iterator[IO[bytes]]:
        """Run one verb whose result the caller reads from a pipe; the caller calls `heed` in between.

        Args:
            verb: See `llama_tool.py`.
            words: Its arguments.

        Raises:
            JobFailed: The tool failed, or the caller raised EOFError; the message has the tool's own last words.
        """
        began = self._log_bytes()
        with self.log.open("ab") as file:
            process = subprocess.Popen(
                self._command(verb, words),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=file,
                env=_environment(),
            )
        pipe = cast(IO[bytes], process.stdout)
        try:
            yield pipe
            pipe.close()
            process.wait()
        except EOFError:
            self._require_success(verb, process.wait(), began)
            raise JobFailed("gguf_converter", f"llama.cpp's {verb} said less than it should", _ADVICE) from None
        finally:
            process.kill()
            process.wait()
            pipe.close()
        self._require_success(verb, process.returncode, began)

    def _command(self, verb: str, words: tuple[str | Path, ...]) -> list[str]:
        # -I keeps PYTHONPATH and the current folder off the tool's import path.
        return [sys.executable, "-I", str(_SCRIPT), str(self.tools), verb, *map(str, words)]

    def _log_bytes(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def _require_success(self, verb: str, code: int, began: int) -> None:
        if code < 0:
            name = next((one.name for one in signal.Signals if one == -code), "a signal")
            why = {"SIGILL": "this processor lacks what the prebuilt library needs", "SIGKILL": "the memory was full"}
            raise JobFailed(
                "gguf_converter", f"llama.cpp's {verb} was ended by {name}: {why.get(name, 'a fault in it')}", _ADVICE
            )
        if code:
            raise JobFailed("gguf_converter", f"llama.cpp's {verb} failed: {self._words(began)}", _ADVICE)

    def _words(self, began: int) -> str:
        """Return the tool's own reason: a script's or library's error line, else the last line of its output."""
        with self.log.open("rb") as file:
            file.seek(max(began, self.log.stat().st_size - _TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        errors = [line.partition(":")[2] for line in lines if line.startswith("ERROR:")]
        errors += [line.partition(":")[2] for line in reversed(lines) if line.startswith(_NOT_LOADED)]
        last = lines[-1] if lines else "it said nothing"
        return plain(errors[-1] if errors and "Error" not in last else last, one_line=True, limit=400)


_ADVICE = (
    "its whole output is in tool.log in the run's folder. A model that llama.cpp does not know can still be merged and "
    "used with transformers or vLLM"
)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    # The converter would run Python code that a model brings. Offline, and in folders without .py files, there is none.
    return {**kept, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"}
