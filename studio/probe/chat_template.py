"""What a model's chat template does: which roles it writes, whether it takes tools, tells the date, marks answers.

A template is a program written by strangers. It is tried in a process of its own, which this module is too (`python -m
studio.probe.chat_template`): in jinja's sandbox, with little memory and time. transformers is not imported; what it
adds to jinja is written again here (transformers 5.24 utils/chat_template_utils.py).
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from studio.core.text import plain

FILE, CONFIG, PROCESSOR_FILE = "chat_template.jinja", "tokenizer_config.json", "chat_template.json"
_MOST_BYTES = 8 * 2**20
_MOST_TEMPLATE = 2**20
_SECONDS, _CPU_SECONDS = 30.0, 10
_MOST_MEMORY = 2**30
_MOST_SAID = 300
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class FoundTemplate:
    """A chat template as it lies in a model's files.

    Attributes:
        text: The template; empty where there is none that the tokenizer reads.
        source: The file.
        tokens: The special tokens that it may write, such as `eos_token`.
        trouble: Why it cannot be had; empty where it can, and where there is none.
    """

    text: str = ""
    source: str = ""
    tokens: Mapping[str, str] | None = None
    trouble: str = ""


def find_template(folder: Path) -> FoundTemplate:
    """Return the chat template that transformers' tokenizer reads in a folder: its own file, else the config's."""
    try:
        table = _json(folder / CONFIG)
        tokens = {key: _token(value) for key, value in table.items() if key.endswith("_token") and _token(value)}
        if (folder / FILE).is_file():
            return FoundTemplate(_text(folder / FILE), FILE, tokens)
        written = table.get("chat_template")
        if isinstance(written, list):  # several by name
            named = [one for one in written if isinstance(one, dict) and one.get("name") == _DEFAULT]
            written = named[0].get("template") if named else None
        if isinstance(written, str) and written:
            return FoundTemplate(written, CONFIG, tokens)
        if (folder / PROCESSOR_FILE).is_file():
            found = f"it lies in {PROCESSOR_FILE} alone, where the tokenizer does not look"
            return FoundTemplate(trouble=f"{found}: save it as {FILE}")
    except (OSError, ValueError, RecursionError) as error:
        return FoundTemplate(trouble=f"the tokenizer's files cannot be read: {_short(error)}")
    return FoundTemplate()


def template_traits(found: FoundTemplate) -> dict[str, Any]:
    """Return what a template does, found out by letting it write a few conversations.

    Returns:
        `there` and `source`; `roles` whose texts it writes; `refused`, what it says by role where it refuses one;
        `system`, whether a system turn is written; `tools`, whether tools that are passed are written;
        `generation_block`, whether it marks what the assistant says; `date`, whether it asks for today's date; `think`,
        whether it speaks of `<think>`; `keeps_thinking`, whether it writes the thinking of answers before the last; and
        `trouble`, why it could not be tried. What is not known is None.
    """
    unknown = dict.fromkeys(("system", "tools", "generation_block", "date", "think", "keeps_thinking"))
    there = bool(found.text)
    document: dict[str, Any] = {"there": there, "source": found.source, **unknown, "roles": [], "refused": {}}
    if not there:
        return {**document, "trouble": found.trouble}
    if len(found.text) > _MOST_TEMPLATE:
        return {**document, "trouble": f"it has {len(found.text):,} characters, and is not tried"}
    given = json.dumps({"template": found.text, "tokens": dict(found.tokens or {})})
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", "studio.probe.chat_template"],
            input=given.encode(),
            capture_output=True,
            timeout=_SECONDS,
            check=False,
        )
        seen = json.loads(done.stdout) if done.returncode == 0 else None
    except subprocess.TimeoutExpired:
        return {**document, "trouble": "it takes too long to write a few turns"}
    except (OSError, ValueError) as error:
        return {**document, "trouble": f"it cannot be tried: {_short(error)}"}
    if not isinstance(seen, dict):
        return {**document, "trouble": "it takes too long, or too much memory, to write a few turns"}
    return {**document, "trouble": "", **seen}


_ASKED, _ANSWERED, _THOUGHT, _SYSTEM, _TOOL_SAID, _TOOL = (
    "qsked1",
    "answ2red",
    "th0ught",
    "syst3m",
    "t00lsaid",
    "look_4up",
)
_USER = {"role": "user", "content": _ASKED}
_ANSWER = {"role": "assistant", "content": _ANSWERED}
_THINKING = {"role": "assistant", "content": f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWERED}"}
_SPECIFICATION = {
    "type": "function",
    "function": {"name": _TOOL, "description": "looks", "parameters": {"type": "object", "properties": {}}},
}
_CHATS: Mapping[str, tuple[list[dict[str, str]], str]] = {
    "user": ([_USER, _ANSWER], _ASKED),
    "assistant": ([_USER, _ANSWER], _ANSWERED),
    "system": ([{"role": "system", "content": _SYSTEM}, _USER, _ANSWER], _SYSTEM),
    "tool": ([_USER, _ANSWER, {"role": "tool", "content": _TOOL_SAID}, _ANSWER], _TOOL_SAID),
}
"""Conversations by role, as training hands them to a template, each with the text that must be in what it writes."""


def _look(template: str, tokens: Mapping[str, str]) -> dict[str, Any]:
    """Return what a template does; runs in the process of its own."""
    from jinja2 import TemplateError  # noqa: PLC0415  not in the terminal's process

    marks: list[str] = []
    try:
        compiled = _environment(marks).from_string(template)
    except (TemplateError, RecursionError) as error:
        return {"trouble": f"it is no template: {_short(error)}"}

    def write(chat: list[dict[str, str]], year: int = 2001, **more: Any) -> str | Exception:
        now = datetime(year, 1, 2)
        try:
            made: str = compiled.render(
                messages=chat, add_generation_prompt=False, strftime_now=now.strftime, **tokens, **more
            )
        except Exception as error:  # noqa: BLE001  templates raise anything
            return error
        return made

    written = {role: (write(chat), mark) for role, (chat, mark) in _CHATS.items()}
    roles = [role for role, (text, mark) in written.items() if isinstance(text, str) and mark in text]
    refused = {role: _short(text) for role, (text, _) in written.items() if isinstance(text, Exception)}
    with_tool = write([_USER, _ANSWER], tools=[_SPECIFICATION])
    dates = [write([_USER, _ANSWER], year) for year in (2001, 2019)]
    thought = write([_USER, _THINKING, _USER, _ANSWER])
    return {
        "roles": roles,
        "refused": refused,
        "system": "system" in roles,
        "tools": isinstance(with_tool, str) and _TOOL in with_tool,
        "generation_block": bool(marks),
        "date": dates[0] != dates[1] if all(isinstance(text, str) for text in dates) else None,
        "think": "<think>" in template,
        "keeps_thinking": _THOUGHT in thought if isinstance(thought, str) else None,
    }


def _environment(marks: list[str]) -> Any:
    """Return jinja's sandbox with what transformers adds to it; `marks` gets an entry for each generation block."""
    from jinja2 import TemplateError, nodes  # noqa: PLC0415
    from jinja2.ext import Extension, loopcontrols  # noqa: PLC0415
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: PLC0415

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012  as jinja declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            marks.append("generation")
            return nodes.Scope(body).set_lineno(line)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    return made


def limit_process(memory_bytes: int, cpu_seconds: int = 0) -> None:
    """Limit this process's address space, and the processor time that it may take; 0 leaves time unlimited."""
    try:
        import resource  # noqa: PLC0415  not on Windows
    except ImportError:
        return
    for kind, most in ((resource.RLIMIT_AS, memory_bytes), (resource.RLIMIT_CPU, cpu_seconds)):
        if not most:
            continue
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    table = json.loads(_text(path))
    if not isinstance(table, dict):
        raise ValueError(f"{path.name} is not a JSON object")  # noqa: TRY004  as a file that is no JSON at all
    return table


def _text(path: Path) -> str:
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path.name} is larger than {_MOST_BYTES // 2**20} MiB")
    return path.read_text("utf-8")


def _token(value: Any) -> str:
    word = value.get("content") if isinstance(value, dict) else value
    return word if isinstance(word, str) else ""


def _short(error: Exception) -> str:
    return plain(f"{error}" or type(error).__name__, one_line=True, limit=_MOST_SAID)


def _main(read: Callable[[], str]) -> None:
    given = json.loads(read())
    limit_process(_MOST_MEMORY, _CPU_SECONDS)
    sys.stdout.write(json.dumps(_look(given["template"], given["tokens"])))


if __name__ == "__main__":
    _main(sys.stdin.read)
