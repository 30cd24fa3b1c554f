"""`lora-studio setup`: the guided set-up on a screen, or what it finds and recommends as plain lines or JSON."""

import argparse
import textwrap
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from studio.commands.options import COLUMNS_FORM, add_json, add_runs_dir, columns_given, root_of
from studio.commands.terminal import DONE, NO, say, size, table, why_no_studio, width_of_terminal, write_json
from studio.core.errors import BadInput
from studio.core.goals import GOALS
from studio.core.gpu_catalogue import find_gpu
from studio.core.recipe_parse import refuse
from studio.core.recommendation import Recommendation
from studio.core.text import plain
from studio.probe.checkup import trouble_of
from studio.probe.machine import Machine, read_machine
from studio.probe.setup import Answers, check_data, goal_for, recall_answers, recommendation_for, shape_for
from studio.runs.atomic import write_whole
from studio.runs.recipe_file import dump_recipe


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser(
        "setup",
        help="the guided set-up: machine, model, data, goal, and the recipe that follows",
        description="In a terminal, five questions on a screen. With a flag or without a terminal, the machine as it "
        "is found and the recipe that follows from the flags, with reason and source of each choice. Exit 1: it does "
        "not fit the card.",
    )
    parser.add_argument("--goal", choices=tuple(GOALS), help="what it is for")
    parser.add_argument("--model", metavar="MODEL", help="a folder, a hub id, or: embedded")
    parser.add_argument("--data", metavar="FILE", help="the rows to learn from, or: embedded")
    parser.add_argument("--columns", type=columns_given, metavar=COLUMNS_FORM, help="what the file calls our columns")
    parser.add_argument("--gpu", metavar="NAME", help="plan for this card instead of this machine's")
    parser.add_argument("--out", metavar="FILE", help="write the recipe there")
    add_json(parser)
    add_runs_dir(parser)


def run(args: argparse.Namespace) -> int:
    """Open the guided set-up; with a flag, or without a terminal, print what it would recommend.

    Raises:
        BadInput: Model, data or card cannot be used, or the recipe cannot be written.
    """
    told = any((args.goal, args.model, args.data, args.columns, args.gpu, args.out, args.json))
    if not told and not why_no_studio():
        from studio.commands.open_studio import open_on_last  # noqa: PLC0415  0.3 s of screens

        return open_on_last(root_of(args), setup=True)
    answers = _answers(args)
    machine = read_machine(root_of(args))
    checked = check_data(answers.data, answers.base, answers.columns)
    if checked.unknown:
        names = ", ".join(plain(name, one_line=True, limit=40) for name, _ in checked.unknown[:12])
        raise BadInput(
            f"The columns of {plain(str(checked.data.path), one_line=True)} are not known: {names}. Name them with "
            "--columns prompt=...,completion=..."
        )
    if not checked.sound:
        raise BadInput(
            f"{plain(str(checked.data.path), one_line=True)} must be corrected before training: lora-studio data check "
            "names the rows."
        )
    if not args.goal:
        answers = replace(answers, goal=goal_for(answers.goal, checked.facts))
    shape = shape_for(answers.base, answers.card)
    recommendation = recommendation_for(answers, shape, checked.facts)
    if args.out:
        _write(Path(args.out), recommendation)
    if args.json:
        write_json(_document(answers, machine, recommendation, args.out))
    else:
        _tell(answers, machine, recommendation, args.out)
        if shape.origin:
            say(f"note: {shape.origin}")
    return NO if recommendation.verdict == "does not fit" else DONE


def _answers(args: argparse.Namespace) -> Answers:
    """Return the answers of the flags; where a flag is missing, the answer that was given on the screen last."""
    given = {"goal": args.goal, "base": args.model, "data": args.data}
    card = find_gpu(args.gpu).name if args.gpu else None
    said: dict[str, Any] = {name: value for name, value in (*given.items(), ("card", card)) if value is not None}
    if args.data is not None:
        said["columns"] = ()
    if args.columns is not None:
        said["columns"] = args.columns
    return replace(recall_answers(), **said)


def _write(path: Path, recommendation: Recommendation) -> None:
    refuse(recommendation.recipe.problems())  # TOML is UTF-8, and the name of a data file may not be
    if path.exists():
        raise BadInput(f"{plain(str(path), one_line=True)} is there already: choose another --out or remove it.")
    try:
        write_whole(path, dump_recipe(recommendation.recipe))
    except OSError as error:
        raise BadInput(f"{plain(str(path), one_line=True)} cannot be written: {error.strerror or error}.") from error


def _document(answers: Answers, machine: Machine, recommendation: Recommendation, saved: str | None) -> dict[str, Any]:
    device = recommendation.estimate.device
    return {
        "machine": asdict(machine),
        "answers": {"model": answers.base, "data": answers.data, "goal": answers.goal, "card": answers.card or None},
        "instead": recommendation.instead,
        "fits": None if recommendation.verdict is None else recommendation.verdict == "fits",
        "verdict": recommendation.verdict,
        "budget_bytes": recommendation.budget_bytes,
        "device_bytes": device.expected if recommendation.verdict else None,
        "low_bytes": device.low if recommendation.verdict else None,
        "high_bytes": device.high if recommendation.verdict else None,
        "notes": list(recommendation.estimate.notes),
        "choices": [
            {"label": choice.label, "settings": dict(choice.settings), "why": choice.why, "source": choice.source}
            for choice in recommendation.choices
        ],
        "streamed": recommendation.streamed
        and {"settings": dict(recommendation.streamed.settings), "words": recommendation.streamed.words},
        "recipe": recommendation.recipe.to_dict(),
        "saved": saved,
    }


def _tell(answers: Answers, machine: Machine, recommendation: Recommendation, saved: str | None) -> None:
    cards = machine.cards or []
    for card in cards:
        say(f"card:    {card.name}, {size(card.total_bytes)}, {size(card.free_bytes)} free")
    if not cards:
        say("card:    no NVIDIA driver answers: training runs on the CPU")
    say(f"driver:  {machine.driver or '-'}")
    if trouble := trouble_of(machine):
        say(f"problem: {trouble}")
    say(f"memory:  {size(machine.ram_bytes)}, {size(machine.free_ram_bytes)} free; {machine.cores or '?'} cores")
    say(f"disk:    {size(machine.disk_bytes)} free")
    say(f"model:   {answers.base}")
    say(f"data:    {answers.data}")
    say(f"goal:    {GOALS[answers.goal].label}")
    say()
    _say_wrapped(recommendation.instead)
    say()
    rows = [[choice.label, choice.shown, choice.why, choice.source] for choice in recommendation.choices]
    say(table([["choice", "", "why", "source"], *rows]))
    say()
    if recommendation.verdict is None or recommendation.budget_bytes is None:
        say("It runs on this machine's CPU: slow, and sure to fit only for small models. --gpu NAME plans for a card.")
    else:
        device = recommendation.estimate.device
        say(
            f"{recommendation.verdict}: {size(device.expected)} expected "
            f"({size(device.low)} to {size(device.high)}) of "
            f"{size(recommendation.budget_bytes)} on {answers.card or 'this card'}"
        )
    if recommendation.streamed:
        _say_wrapped(recommendation.streamed.words)
    if saved:
        say(f"saved as {saved}; start it with: lora-studio train {saved}")
    else:
        say("--out FILE saves this recipe; lora-studio train FILE starts it")


def _say_wrapped(text: str) -> None:
    for line in textwrap.wrap(plain(text), width_of_terminal()):
        say(line)
