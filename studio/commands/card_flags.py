"""Flags that name the card to plan for, and the card that they mean."""

import argparse

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import card_of_size, find_gpu
from studio.core.recipe import Recipe
from studio.probe.device import look, place_of
from studio.probe.plan import PlanDevice, device_from_catalogue, device_of

_MOST_GIB = 4096.0


def add_card(parser: argparse.ArgumentParser) -> None:
    """Add `--gpu` and `--vram-gib`."""
    card = parser.add_mutually_exclusive_group()
    card.add_argument("--gpu", metavar="NAME", help="a card by name, such as 4090 or a100-80gb")
    card.add_argument("--vram-gib", metavar="X", help="a card of this size in GiB")


def device_for(args: argparse.Namespace, recipe: Recipe) -> PlanDevice:
    """Return the card that was named, else the one of this machine that the recipe would run on.

    Raises:
        BadInput: The catalogue has no such card, or the size is not a number of GiB from 0.1 to 4096.
    """
    if args.gpu or args.vram_gib:
        gpu = (
            find_gpu(args.gpu)
            if args.gpu
            else card_of_size(number_between(args.vram_gib, "--vram-gib", 0.1, _MOST_GIB))
        )
        return device_from_catalogue(gpu)
    return device_of(place_of(recipe.device.device, look()))


def number_between(text: str, flag: str, low: float, high: float) -> float:
    """Return the number that a flag was given; of GPUs a whole one.

    Raises:
        BadInput: It is no number, or one outside of these.
    """
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not low <= value <= high or (flag == "--gpus" and value != int(value)):
        raise BadInput(
            f"{flag} is {text!r}; wanted {'a whole number, ' if flag == '--gpus' else ''}{low:g} to {high:g}"
        )
    return value
