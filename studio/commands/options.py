"""Options that several verbs share, and what they mean."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from studio.core.text import plain
from studio.runs.home import runs_root
from studio.runs.layout import RunPaths

if TYPE_CHECKING:
    from studio.core.columns import Pairs


def add_restarts(parser: argparse.ArgumentParser) -> None:
    """Declare `--restarts`."""
    parser.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="resume by itself, N times at most, after a crash (a signal, full memory of the machine, a lost card)",
    )


def add_runs_dir(parser: argparse.ArgumentParser) -> None:
    """Add `--runs-dir`."""
    parser.add_argument(
        "--runs-dir",
        metavar="DIR",
        default=argparse.SUPPRESS,  # a default would overwrite the value of a --runs-dir that stands before the verb
        help="where runs live (default: $LORA_STUDIO_HOME/runs)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout, everything else on stderr")


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add `--set`, which may be repeated."""
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a field of the recipe; may be repeated"
    )


def add_device(parser: argparse.ArgumentParser, auto: str = "the run's own card where it is visible, else the") -> None:
    """Add `--device`.

    Args:
        parser: The parser of the verb.
        auto: The beginning of the help's words on what `auto` means.
    """
    parser.add_argument(
        "--device",
        type=_device,
        metavar="WORD",
        default="auto",
        help=f"auto (default: {auto} visible card with the most memory), cpu, cuda or cuda:N, counted from 0",
    )


def add_run(parser: argparse.ArgumentParser, count: str | int | None = None) -> None:
    """Add the argument that names a run."""
    parser.add_argument("run", metavar="RUN", nargs=count, help="a run's name, its beginning, its folder, or: last")


def _device(word: str) -> str:
    from studio.core.recipe import FIELDS  # noqa: PLC0415  10 ms that most verbs need not pay

    if wrong := next(FIELDS["device.device"].problems(word), None):
        raise argparse.ArgumentTypeError(f"found {plain(word, one_line=True, limit=40)!r}; wanted {wrong.allowed}")
    return word


def root_of(args: argparse.Namespace) -> Path:
    """Return the folder of runs that the arguments mean."""
    chosen = getattr(args, "runs_dir", None)
    return Path(chosen).expanduser().absolute() if chosen else runs_root()


def run_of(args: argparse.Namespace) -> RunPaths:
    """Return the run that the arguments mean.

    Raises:
        BadInput: There is none, or it is not clear which.
    """
    from studio.runs.store import find_run  # noqa: PLC0415  10 ms that a plan should not pay

    return find_run(root_of(args), args.run)


COLUMNS_FORM = "OURS=THEIRS,..."


def columns_given(text: str) -> "Pairs":
    """Return what a file calls our columns, from a word such as `prompt=Frage,completion=Antwort`.

    Raises:
        ArgumentTypeError: It says something else.
    """
    from studio.core.columns import Columns  # noqa: PLC0415  as above

    kind = Columns()
    value: Pairs = kind.shaped(kind.read(text))
    if wrong := next(kind.wrong(value), None):
        raise argparse.ArgumentTypeError(f"found {wrong[0]}; wanted {wrong[1]}")
    return value
