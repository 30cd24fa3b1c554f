"""The command line: `lora-studio VERB`. Knows the verbs and how errors leave the program, nothing of what verbs do.

Only the module of the verb that was asked for is imported, so that `--version` and `runs list` cost next to nothing.
"""

import argparse
import errno
import gc
import importlib
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from studio import __version__
from studio.core.errors import BadInput, StudioError
from studio.core.text import plain

VERBS = {
    "demo": "the embedded model and data, end to end",
    "train": "train a recipe's adapter",
    "plan": "how much memory a recipe takes, before it runs",
    "measure": "memory of a real training step, traced or run",
    "fit": "the best recipe that fits a card, and why",
    "runs": "list, follow, stop, continue and compare runs",
    "data": "check a data file, or show its rows as tokens",
    "merge": "merge an adapter into its base model",
    "export": "write an adapter, or a merged model in fewer bits",
    "chat": "ask the tuned model and its base, side by side",
    "audit": "measure what 4 bits cost a model, an adapter or a training",
    "clean": "what the program holds on the disk, and how to free it",
    "doctor": "what this machine has, and how right estimates were",
    "gpus": "the NVIDIA cards of this machine",
    "models": "the base models on this machine, and what is known of one",
    "recipes": "the recipes that come with the program",
    "import": "a recipe from axolotl, LLaMA-Factory, TRL or Unsloth",
    "setup": "the guided set-up: machine, model, data, goal, recipe",
    "serve": "the studio in a browser of this machine",
    "completion": "completion for bash, zsh and fish, and a manual page",
}
_MODULES = {verb: f"studio.commands.{verb}" for verb in VERBS} | {
    "": "studio.commands.open_studio",
    "import": "studio.commands.import_config",  # a word of Python's own
}
_NAMES = {
    "recipe": "RECIPE",
    "recipe_word": "RECIPE",
    "model": "--model",
    "model_word": "MODEL",
    "gpu": "--gpu",
    "out": "--out",
}
"""Arguments that name something: an empty one is a slip (`--gpu "$CARD"` with nothing in CARD), never a default."""
_DEBUG = "LORA_STUDIO_DEBUG"
_READER_GONE = 141
"""The exit code that a shell gives a program which SIGPIPE (13) has ended."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with nothing of the arguments reaching the terminal as it came."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what this verb does not know, which argparse would leave to the whole program, whose help is short."""
        known, foreign = super().parse_known_args(args, namespace)
        if foreign:
            import difflib  # noqa: PLC0415  only a slip needs it

            near = difflib.get_close_matches(foreign[0].partition("=")[0], self._option_string_actions, n=1, cutoff=0.8)
            self.error(f"unrecognized arguments: {' '.join(foreign)}{f'; perhaps {near[0]}' if near else ''}")
        return known, foreign

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {plain(message, one_line=True)}; see: {self.prog} --help\n")


def main(argv: Sequence[str] | None = None, *, modules: Mapping[str, str] | None = None) -> int:
    """Run one verb and return the exit code.

    Args:
        argv: The arguments; None takes those of the process.
        modules: The module of each kind of job; None takes the real ones.
    """
    if argv is None:
        # All that is imported stays: to look for garbage in it, now and at the end, takes an eighth of a short command.
        gc.disable()
    words = list(sys.argv[1:] if argv is None else argv)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # An encoding without our characters shows them as escapes instead of ending the program.
            stream.reconfigure(errors="backslashreplace")
    try:
        return _run_and_flush(words, modules)
    except BrokenPipeError:
        # Whoever read our output has gone (`| head`): nothing to tell, and Python must not try again as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _READER_GONE
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # noqa: BLE001  the last stop: a message instead of a traceback
        return _complain(*_told(error))


def _told(error: Exception) -> tuple[str, int]:
    """Return what to say of an error, and the exit code."""
    if isinstance(error, StudioError):
        return str(error), 2 if isinstance(error, BadInput) else 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # as pathlib and platformdirs say it
        return "no home folder is known for a path with ~, or for this user: give whole paths, set HOME, or both", 2
    if isinstance(error, FileNotFoundError) and not _has_current_folder():
        return "the current folder was deleted: change into another one first", 2
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk, or what the output goes to, is full", 1
    if isinstance(error, OSError):
        from studio.runs.disk import DISK_FULL, disk_failure  # noqa: PLC0415  3 ms that no command pays that works

        if failure := disk_failure(error, advice="or choose another place"):
            return f"{failure}: {failure.advice}", 1 if failure.kind == DISK_FULL else 2
    return f"unexpected {type(error).__name__}: {error} (set {_DEBUG}=1 for the traceback)", 1


def _open_closed_streams() -> None:
    """Started with `<&-` or `2>&-`, Python has None there, and `print` to a None stderr writes to stdout."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115  as long as the program


def _has_current_folder() -> bool:
    try:
        os.getcwd()  # noqa: PTH109  Path.cwd is the same call
    except FileNotFoundError:
        return False
    return True


def _run_and_flush(words: list[str], modules: Mapping[str, str] | None) -> int:
    """Run one verb and write out what is still buffered, so that a reader that has gone is noticed here."""
    try:
        code = _run(words, modules)
    except SystemExit as leaving:  # argparse, after a help text or a complaint
        code = leaving.code if isinstance(leaving.code, int) else 0
    sys.stdout.flush()
    return code


def _run(words: list[str], modules: Mapping[str, str] | None) -> int:
    # In `--recipe demo` the word is a recipe's name.
    afters = zip(words, ["", *words], strict=False)
    chosen = next((word for word, before in afters if word in VERBS and before not in ("--recipe", "--runs-dir")), "")
    args = _parser({chosen}).parse_args(words)
    for name, shown in _NAMES.items():
        if getattr(args, name, None) == "":
            raise BadInput(f"{shown} is empty; wanted a name. To take the default, leave it out.")
    args.modules, args.whole_parser = dict(modules or {}), whole_parser
    module = importlib.import_module(_MODULES[args.verb or ""])
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    return int(module.run(args))


def whole_parser() -> argparse.ArgumentParser:
    """Return the parser with the arguments of every verb, of which the reference in docs/ is made."""
    return _parser(VERBS)


def _parser(whole: Collection[str]) -> argparse.ArgumentParser:
    """Return the parser with every verb, and the arguments of those that are asked for."""
    parser = _Parser(
        prog="lora-studio",
        description="Fine-tune a language model with LoRA or QLoRA. Without a verb, the studio opens.",
    )
    parser.add_argument("--version", action="version", version=f"lora-studio {__version__}")
    parser.add_argument("--runs-dir", metavar="DIR", help="where runs live (default: $LORA_STUDIO_HOME/runs)")
    parser.add_argument("--recipe", metavar="RECIPE", help="what the studio opens on (default: demo)")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb, help_text in VERBS.items():
        if verb in whole:
            importlib.import_module(_MODULES[verb]).add_parser(subparsers)
        else:
            subparsers.add_parser(verb, help=help_text)
    return parser


def _complain(message: str, code: int) -> int:
    if os.environ.get(_DEBUG):
        import traceback  # noqa: PLC0415  3 ms that no command pays that works

        traceback.print_exc()
    print(f"lora-studio: {plain(message)}", file=sys.stderr, flush=True)
    return code
