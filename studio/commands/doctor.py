"""`lora-studio doctor`: what this machine has, what is missing, and how far the estimate was off here so far."""

import argparse
from dataclasses import asdict
from typing import Any

from studio.commands.options import add_json, add_runs_dir, root_of
from studio.commands.terminal import DONE, NO, say, table, write_json
from studio.core.calibration import Errors, errors_by_setting
from studio.probe.checkup import Check, check_up, import_libraries
from studio.probe.machine import read_machine
from studio.runs.calibration import calibration_path, read_observations

_SHOWN_SETTINGS = 8


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "doctor",
        help="what this machine has, what is missing, and how right the estimate was here",
        description="Looks and changes nothing. Exit 1: something would keep a run from starting.",
    )
    parser.add_argument(
        "--imports", action="store_true", help="also import torch, peft and bitsandbytes, in a process of their own"
    )
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Look, tell, and return 1 where there is a problem."""
    root = root_of(args)
    machine = read_machine(root)
    checks = check_up(machine, root)
    torch_sees = None
    if args.imports:
        check, torch_sees = import_libraries(machine)
        checks.append(check)
    errors = errors_by_setting(read_observations())
    sound = all(check.verdict != "problem" for check in checks)
    if args.json:
        write_json(
            {
                "ok": sound,
                "checks": [asdict(check) for check in checks],
                "machine": asdict(machine),
                "torch": torch_sees,
                "calibration": {"path": str(calibration_path()), "settings": [_document(item) for item in errors]},
            }
        )
    else:
        _print(checks, errors)
    return DONE if sound else NO


def _document(item: Errors) -> dict[str, Any]:
    return {
        "device": item.setting.device,
        "engine": item.setting.engine,
        "method": item.setting.method,
        "versions": dict(item.setting.versions),
        "runs": item.runs,
        "errors": {name: {"median": middle, "worst": worst} for name, (middle, worst) in item.errors.items()},
    }


def _print(checks: list[Check], errors: list[Errors]) -> None:
    say(table([["", "what", "found"], *([check.verdict, check.name, check.found] for check in checks)]))
    for check in checks:
        if check.advice:
            say(f"{check.name}: {check.advice}")
    say()
    if not errors:
        say("the estimate: no finished run on this machine yet; each one makes later plans more certain")
        return
    say("the estimate so far, predicted over measured (median, worst):")
    head = ["device", "engine", "method", "runs", "tensors", "allocator", "card", "process", "speed"]
    say(table([head, *(_row(item) for item in errors[:_SHOWN_SETTINGS])]))
    if any(item.setting.device.startswith("cpu") for item in errors):
        say("on a CPU, speed and process memory are predicted from earlier runs, so the first of a kind has no error")


def _row(item: Errors) -> list[str]:
    setting = item.setting
    torch = dict(setting.versions).get("torch", "?")
    cells = [_cell(item.errors.get(name)) for name in ("tensors", "allocator", "card", "process", "speed")]
    return [setting.device, f"{setting.engine}, torch {torch}", setting.method, str(item.runs), *cells]


def _cell(error: tuple[float, float] | None) -> str:
    return "-" if error is None else f"{error[0]:+.1%}, {error[1]:+.1%}"
