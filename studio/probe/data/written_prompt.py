"""Writes prompts from the columns of rows with a jinja line (`data.prompt`), in a process of its own.

The line may come with a recipe from a stranger. So it runs in jinja's sandbox, and in a process whose memory and time
are limited: one row after another goes in as a line of JSON, and its prompt, or what is wrong, comes out.
"""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any, Self

from studio.core.errors import BadInput
from studio.core.text import plain

WHOLE_ROW = "row"
"""The name by which the line has all columns: `{{ row["Frage 1"] }}`."""
_SECONDS = 20.0
_MOST_MEMORY = 2 * 2**30
_MOST_LINE = 20_000
_MOST_PROMPT = 16 * 2**20
_MOST_SAID = 200


class PromptWriter:
    """Writes the prompt of one row after another; to be closed."""

    def __init__(self, line: str) -> None:
        """Start the process.

        Args:
            line: The jinja line.

        Raises:
            BadInput: It is no jinja.
        """
        self.columns = columns_of(line)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "studio.probe.data.written_prompt"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._since = 0.0
        self._late = False
        self._done = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        self._exchange(line)

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *raised: object) -> None:
        """End the process."""
        self._done.set()
        self._process.kill()
        self._process.communicate()

    def write(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return the prompt of a row and what is wrong; one of both is empty.

        Args:
            row: Its columns.

        Raises:
            BadInput: The line takes too long or too much memory.
        """
        used = row if self.columns is None else {name: row[name] for name in self.columns if name in row}
        prompt, wrong = self._exchange(used)
        return prompt, wrong

    def _exchange(self, value: Any) -> Any:
        self._since = time.monotonic()
        answer = b""
        with suppress(OSError):  # it has ended
            if self._process.stdin and self._process.stdout:
                self._process.stdin.write(json.dumps(value, default=str).encode() + b"\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
        self._since = 0.0
        if not answer.endswith(b"\n"):
            why = f"more than {_SECONDS:.0f} s" if self._late else "too much memory"
            raise BadInput(
                f"data.prompt takes {why} to write the prompt of one row. Use fewer loops, or shorter texts."
            )
        return json.loads(answer)

    def _watch(self) -> None:
        """End the process where it takes too long; a signal would reach the main thread alone."""
        while not self._done.wait(_SECONDS / 20):
            if (since := self._since) and time.monotonic() - since > _SECONDS:
                self._late = True
                self._process.kill()
                return


@lru_cache(maxsize=4)
def columns_of(line: str) -> frozenset[str] | None:
    """Return the columns that a jinja line names; None where it asks for the whole row.

    Raises:
        BadInput: It is no jinja, or names no column.
    """
    from jinja2 import Environment, TemplateError, meta  # noqa: PLC0415  30 ms that few files pay

    if len(line) > _MOST_LINE:
        raise BadInput(f"data.prompt has {len(line):,} characters; wanted at most {_MOST_LINE:,}.")
    try:
        # Only parsed here, so that nothing of it runs and nothing needs escaping.
        names = meta.find_undeclared_variables(Environment().parse(line))  # noqa: S701
    except (TemplateError, RecursionError) as error:
        raise BadInput(
            f"data.prompt is no jinja: {_short(error)}. Write the names of columns in braces: {{{{ title }}}}: "
            "{{ body }}."
        ) from None
    if not names:
        raise BadInput(
            f"data.prompt is '{plain(line, one_line=True, limit=60)}', which names no column: every prompt would be "
            "the same. Write the names of columns in braces: {{ title }}: {{ body }}."
        )
    return None if WHOLE_ROW in names else frozenset(names)


def _serve() -> None:
    """Answer lines until there are no more."""
    from jinja2 import StrictUndefined, TemplateError  # noqa: PLC0415  not in the terminal's process
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    from studio.probe.chat_template import limit_process  # noqa: PLC0415

    limit_process(_MOST_MEMORY)
    made = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, finalize=lambda value: "" if value is None else value
    )
    made.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    template = None
    for said in sys.stdin.buffer:
        prompt, wrong = "", ""
        if hasattr(signal, "alarm"):
            signal.alarm(round(2 * _SECONDS))  # ends this process where nobody waits for it any more
        try:
            value = json.loads(said)
            if template is None:
                template = made.from_string(value)
            else:
                prompt = template.render(value, **{WHOLE_ROW: value})
                if len(prompt) > _MOST_PROMPT:
                    prompt, wrong = "", f"it writes {len(prompt):,} characters"
        except TemplateError as error:
            wrong = _short(error) or type(error).__name__
        except MemoryError:
            return
        except Exception as error:  # noqa: BLE001  templates raise anything
            wrong = _short(error) or type(error).__name__
        sys.stdout.write(json.dumps([prompt, wrong]) + "\n")
        sys.stdout.flush()


def _short(error: BaseException) -> str:
    return plain(str(error), one_line=True, limit=_MOST_SAID)


if __name__ == "__main__":
    _serve()
