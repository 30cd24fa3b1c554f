"""`lora-studio gpus`: the NVIDIA cards of this machine and how full they are."""

import argparse
from dataclasses import asdict

from studio.commands.options import add_json
from studio.commands.terminal import DONE, say, size, table, write_json
from studio.probe.cards import Card
from studio.probe.device import MASK, Sight, look, visible_cards
from studio.probe.torch_cards import why_unusable

_NONE = "no NVIDIA driver answers on this machine: jobs run on the CPU"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the verb."""
    parser = subparsers.add_parser("gpus", help="the NVIDIA cards of this machine")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """List the cards; a machine without one is an answer too."""
    sight = look()
    cards = sight.cards
    known = [(card, words_for(card, sight), why_unusable(card, sight.driver, sight.build)) for card in cards or []]
    if args.json:
        rows = [{**asdict(card), "devices": list(words), "unusable": why or None} for card, words, why in known]
        write_json({"driver": cards is not None, "gpus": rows})
    elif not cards:
        say(_NONE if cards is None else "the NVIDIA driver answers, but shows no card")
    else:
        head = ["gpu", "device", "name", "memory", "used", "free", "compute", "busy", "temperature"]
        say(table([head, *(_row(card, words) for card, words, _ in known)]))
        for card, words, why in known:
            hidden = () if words else (f"{MASK} hides it",)
            for line in (*hidden, *([why] if why else []), *notes_on(card)):
                say(f"gpu {card.index}: {line}")
    return DONE


def notes_on(card: Card) -> list[str]:
    """Return what else is worth knowing of a card: how it is cut or shared, and who uses it."""
    notes = []
    if card.mig:
        notes.append("MIG is on: a run gets one instance, whose memory is shown")
    if card.unified:
        notes.append("its memory is the machine's main memory")
    if card.processes:
        users = (f"{item.name or 'unnamed'} (pid {item.pid}, {size(item.used_bytes)})" for item in card.processes)
        notes.append(f"used by {', '.join(users)}")
    elif card.processes is None:
        notes.append("who uses it is not available from this driver")
    return notes


def words_for(card: Card, sight: Sight) -> tuple[str, ...]:
    """Return the words that mean a card in a recipe's `device.device`; none where a mask hides the card.

    A card that is cut into instances has a word for each instance that the mask names.
    """
    seen = visible_cards(sight).cards
    return tuple(f"cuda:{number}" for number, other in enumerate(seen) if other.index == card.index)


def _row(card: Card, words: tuple[str, ...]) -> list[str]:
    capability = ".".join(map(str, card.capability)) if card.capability else "?"
    busy = "?" if card.busy_percent is None else f"{card.busy_percent} %"
    heat = "?" if card.celsius is None else f"{card.celsius} °C"
    sizes = [size(value) for value in (card.total_bytes, card.used_bytes, card.free_bytes)]
    return [str(card.index), ", ".join(words) or "-", card.name, *sizes, capability, busy, heat]
