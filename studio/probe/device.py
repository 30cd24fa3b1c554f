"""Which card a job runs on: one answer for the plan, the launch and the job itself.

A recipe's `device` word is resolved here to one card or none, by the cards that the driver shows and the mask that this
process has inherited. The job is given the UUID of the card (or of a MIG instance of it) and sees that card alone, in
whatever order CUDA would have counted.

    auto, cuda   of the visible cards that torch can use, the one with the most memory; of equals the first
    cuda:N       the N-th visible card, from 0: without a mask as nvidia-smi and `lora-studio gpus` number them (by PCI
                 bus), under `CUDA_VISIBLE_DEVICES` the N-th that it names, as in any CUDA program
    cpu          none

The mask is read as CUDA reads it (CUDA C++ Programming Guide, "CUDA Environment Variables"; torch/cuda/__init__.py
_parse_visible_devices): numbers, UUIDs or beginnings of UUIDs, in their order, up to the first word that is none of
these. Its numbers count by PCI bus where `CUDA_DEVICE_ORDER` says so or all cards are alike, else in CUDA's own order.
`NVIDIA_VISIBLE_DEVICES` is read by the container's runtime: the driver does not even show the cards that it hides.
"""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.cards import Card, Driver, read_cards
from studio.probe.torch_cards import TorchBuild, ask_torch, may_have_card, torch_build, why_unusable
from studio.runs.layout import RunPaths

MASK, ORDER = "CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"
CHOSEN = "LORA_STUDIO_CARD"
"""Tells a job, and every process that it starts, which card was chosen: its UUID or number, empty for the CPU."""
_BY_BUS = "PCI_BUS_ID"
_NUMBER = re.compile(r"[+-]?[0-9]+")
_LONGEST_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Sight:
    """What can be known of this machine's cards without importing torch.

    Attributes:
        cards: What the driver shows; None where none answers.
        driver: The driver's versions.
        build: The installed torch; None where there is no card for it.
        environ: This process's environment: what a job would inherit.
        ask: Returns the cards that torch sees in CUDA's own order, with or without the mask; None where it cannot be
            asked. Takes seconds.
        hinted: Whether there may be a card though no driver answers.
    """

    cards: list[Card] | None
    driver: Driver = field(default_factory=Driver)
    build: TorchBuild | None = None
    environ: Mapping[str, str] = field(default_factory=dict)
    ask: Callable[[bool], list[Card] | None] = lambda masked: None
    hinted: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """Where a job runs.

    Attributes:
        card: The card as it was read; None for the CPU, and where nothing can be read.
        visible: What `CUDA_VISIBLE_DEVICES` must be for the job to see that card alone: empty to see none, None to
            leave it as it is.
        refusal: Why no job can be started here; empty where one can.
        note: What the user should know, though it stops nothing.
        by_bus: Whether a number in `visible` counts by PCI bus; else it counts as CUDA does in this environment.
    """

    card: Card | None = None
    visible: str | None = None
    refusal: str = ""
    note: str = ""
    by_bus: bool = True

    @property
    def environment(self) -> dict[str, str]:
        """What is added to the job's environment, so that it sees the same card."""
        if self.visible is None:
            return {}
        return {MASK: self.visible, CHOSEN: self.visible, **({ORDER: _BY_BUS} if self.by_bus else {})}

    def or_refuse(self) -> "Place":
        """Return the place itself.

        Raises:
            BadInput: No job can be started there; the message says why, and what to do.
        """
        if self.refusal:
            raise BadInput(self.refusal)
        return self


CPU_PLACE = Place(visible="")
"""The place of a job that needs no card: it sees none, so that it cannot take one from other jobs."""


@dataclass(frozen=True, slots=True)
class Visible:
    """The cards that a job would see, in the order in which `cuda:N` counts them.

    Attributes:
        cards: The cards. Of a card that is divided into instances (MIG) it is the instance that the mask names, else
            the first.
        why_none: Why there are none though the mask names some.
        refusal: Why their order cannot be found out; empty where it is known.
    """

    cards: tuple[Card, ...]
    why_none: str = ""
    refusal: str = ""


def look() -> Sight:
    """Return what can be known of this machine's cards."""
    cards, driver = read_cards()
    return Sight(
        cards,
        driver,
        torch_build() if cards else None,
        os.environ,
        lambda masked: ask_torch(masked=masked),
        hinted=cards is None and may_have_card(),
    )


def place_of(word: str, sight: Sight | None = None, *, run_card: str = "", setting: str = "device.device") -> Place:
    """Return where a job runs that asks for a device.

    Args:
        word: `auto`, `cpu`, `cuda` or `cuda:N`.
        sight: What is known of the machine; None looks.
        run_card: UUID of the card of the run that the job belongs to; taken if it is visible, whatever the word.
        setting: Where the word was given, for messages: a field of a recipe, or a flag.
    """
    if word == "cpu":
        return CPU_PLACE
    sight = look() if sight is None else sight
    # A job's own environment comes first: it was given one card, and whatever it starts must stay on that card.
    if CHOSEN in sight.environ:
        return _inherited(sight)
    if sight.cards is None:
        return _without_driver(word, sight, setting)
    seen = visible_cards(sight)
    if seen.refusal or not seen.cards:
        return _none_visible(word, sight, seen, setting)
    return _among(seen, word, sight, run_card, setting)


def _among(seen: Visible, word: str, sight: Sight, run_card: str, setting: str) -> Place:
    number = int(word[5:]) if word.startswith("cuda:") else None
    own = next((card for card in seen.cards if run_card and card.uuid == run_card), None)
    if own is None and number is not None and number >= len(seen.cards):
        return Place(refusal=f"{setting} is {word}; {_choices(seen, sight)}. Choose one of them, auto or cpu.")
    chosen = own or (_best(seen.cards, sight) if number is None else seen.cards[number])
    why = why_unusable(chosen, sight.driver, sight.build)
    refusal = f"{why}. {_to_cpu(setting)}." if why else ""
    return Place(chosen, _name_of(chosen), refusal, _other_card(run_card, own, chosen))


def recorded_card(paths: RunPaths | None) -> str:
    """Return the UUID of the card that a run used last; empty if it used none, or has not started to train."""
    if paths is None:
        return ""
    from studio.core.events import Planned  # noqa: PLC0415  a plan has no run, and need not pay for reading logs
    from studio.runs.log import read_events  # noqa: PLC0415  as above

    planned = (event for event in reversed(read_events(paths.events)) if isinstance(event, Planned))
    last = next(planned, None)
    found = last.card.get("uuid") if last else None
    return found if isinstance(found, str) else ""


def other_card_note(paths: RunPaths) -> str:
    """Return what to tell if this job was launched on another card than a run used last; empty if on the same.

    Args:
        paths: The run of this job, or the run that this job is about.
    """
    before, now = recorded_card(paths), os.environ.get(CHOSEN, "")
    if not before or before == now:
        return ""
    shown = plain(before, one_line=True, limit=80)
    here = f"this is on {plain(now, one_line=True, limit=80)}" if now else "this is on the CPU"
    return f"the run was on the card {shown}, which was not visible or not asked for: {here}"


def visible_cards(sight: Sight) -> Visible:
    """Return the cards that a job would see under the inherited mask."""
    cards, mask = sight.cards or [], sight.environ.get(MASK)
    if mask is None:
        return Visible(tuple(_instance(card) for card in cards))
    entries = _entries(mask)
    by_number = bool(entries) and not entries[0].startswith(("GPU-", "MIG-"))
    numbered = cards
    # Cards that are all alike have no fastest one, so that CUDA's order is that of the bus.
    if by_number and sight.environ.get(ORDER) != _BY_BUS and len({card.name for card in cards}) > 1:
        asked = _as_cuda_orders(cards, sight)
        if asked is None:
            return Visible((), refusal=_unknown_order(mask, cards))
        numbered = asked
    found: list[Card] = []
    for entry in entries:
        card = _numbered(entry, numbered) if by_number else _named(entry, cards)
        if card is None:
            break
        if any(card.uuid == other.uuid and card.index == other.index for other in found):
            return Visible((), f"{MASK}={_shown(mask)} names a card twice, and CUDA then shows none")
        found.append(card)
    if entries and not found:
        return Visible((), f"{MASK}={_shown(mask)} names no card of this machine, which has {_listed(cards)}")
    return Visible(tuple(found))


def _entries(mask: str) -> list[str]:
    """Return the valid entries of a mask: numbers up to the first entry that is none, or UUIDs of the first one's kind.

    As CUDA does it, an entry that begins with a number counts as that number (`1gpu` is 1), and a negative number ends
    the list.
    """
    for prefix in ("GPU-", "MIG-"):
        if mask.startswith(prefix):
            words = mask.split(",")
            return words[: next((place for place, word in enumerate(words) if not word.startswith(prefix)), None)]
    entries = []
    for word in mask.split(","):
        number = _NUMBER.match(word.strip())
        if number is None or int(number[0]) < 0:
            break
        entries.append(str(int(number[0])))
    return entries


def _numbered(entry: str, cards: list[Card]) -> Card | None:
    number = int(entry)
    return _instance(cards[number]) if number < len(cards) else None


def _named(entry: str, cards: list[Card]) -> Card | None:
    """Return the card or instance that a UUID, or the beginning of one, names; None where it names none or several."""
    if entry.startswith("GPU-"):
        found = [_instance(card) for card in cards if (card.uuid or "").startswith(entry)]
    else:
        found = [
            _instance(card, place)
            for card in cards
            for place, instance in enumerate(card.instances)
            if (instance.uuid or "").startswith(entry) or entry == _old_name(card, instance.number)
        ]
    return found[0] if len(found) == 1 else None


def _old_name(card: Card, number: tuple[int, int] | None) -> str | None:
    return f"MIG-{card.uuid}/{number[0]}/{number[1]}" if number else None


def _instance(card: Card, place: int = 0) -> Card:
    """Return a card as a process sees it: of a card that is divided into instances, one of them."""
    if not card.instances:
        return card
    own = card.instances[place]
    return replace(
        card,
        uuid=own.uuid or card.uuid,
        total_bytes=own.total_bytes,
        used_bytes=own.used_bytes,
        free_bytes=own.free_bytes,
    )


def _as_cuda_orders(cards: list[Card], sight: Sight) -> list[Card] | None:
    """Return the cards in CUDA's own order, fastest first by a rule that only CUDA knows; None if torch cannot tell."""
    asked = sight.ask(False) or []
    known = {card.uuid: card for card in cards if card.uuid}
    ordered = [known[card.uuid] for card in asked if card.uuid in known]
    return ordered if len(ordered) == len(cards) else None


def _unknown_order(mask: str, cards: list[Card]) -> str:
    return (
        f"{MASK}={_shown(mask)} counts cards from the fastest on, and which of {_listed(cards)} CUDA takes for the "
        f"fastest cannot be found out here. Set {ORDER}={_BY_BUS}, and the numbers are those of nvidia-smi; or name "
        "the card by its UUID (nvidia-smi -L)."
    )


def _best(cards: tuple[Card, ...], sight: Sight) -> Card:
    """Return the card with the most memory, of equals the first; cards that torch can use come before others."""
    usable = [card for card in cards if not why_unusable(card, sight.driver, sight.build)]
    return max(usable or cards, key=lambda card: card.total_bytes or 0)


def _name_of(card: Card) -> str:
    """Return what a mask calls a card; a card without a UUID has its number by PCI bus."""
    return card.uuid or str(card.index)


def _inherited(sight: Sight) -> Place:
    """Return the place of a process that was started on a chosen card: the processes that it starts run there too."""
    chosen = sight.environ[CHOSEN]
    if not chosen:
        return CPU_PLACE
    everything = [_instance(card, place) for card in sight.cards or () for place in range(max(1, len(card.instances)))]
    # Nothing to add to the environment: mask and order are in it already.
    return Place(next((card for card in everything if _name_of(card) == chosen), None))


def _without_driver(word: str, sight: Sight, setting: str) -> Place:
    """Return the place where NVML answers nothing: a card by its number, as CUDA counts in this environment.

    torch may see cards all the same: under WSL, in a container without NVML, or on a chip for which there is no NVML.
    """
    number = int(word[5:]) if word.startswith("cuda:") else 0
    silent = f"{setting} is {word}, but no NVIDIA driver answers on this machine"
    asked = sight.ask(True) if word != "auto" or sight.hinted else []
    if asked is None:
        return Place(visible=_one_of_mask(sight, number), note=silent, by_bus=False) if word != "auto" else Place()
    if number < len(asked):
        note = silent if word != "auto" else ""
        return Place(asked[number], _one_of_mask(sight, number), note=note, by_bus=False)
    if word == "auto":
        return Place()
    there = f"torch finds {len(asked)} card(s)" if asked else "torch finds no card"
    return Place(refusal=f"{silent} and {there}. Set it to auto or cpu; lora-studio doctor says what is missing.")


def _one_of_mask(sight: Sight, number: int) -> str:
    mask = sight.environ.get(MASK)
    if mask is None:
        return str(number)
    entries = _entries(mask)
    return entries[number] if number < len(entries) else ""


def _none_visible(word: str, sight: Sight, seen: Visible, setting: str) -> Place:
    """Return the place where no card is visible: the CPU for `auto`, a refusal for any other word.

    An empty mask, or one that begins with -1, hides every card on purpose. A mask with a mistake in it does not, and is
    refused under `auto` too.
    """
    if seen.refusal:
        return Place(refusal=seen.refusal)
    if word == "auto" and not (seen.why_none and sight.cards):
        return CPU_PLACE
    if not sight.cards:
        return Place(refusal=f"{setting} is {word}, but the NVIDIA driver shows no card. Choose auto or cpu.")
    why = seen.why_none or f"{MASK} is {_shown(sight.environ.get(MASK, ''))!r}, which hides every card"
    return Place(refusal=f"{setting} is {word}, but {why}. Change or unset {MASK}. {_to_cpu(setting)}.")


def _to_cpu(setting: str) -> str:
    if setting.startswith("--"):
        return f"To run on the CPU all the same, ask for it: {setting} cpu"
    return f"To run on the CPU all the same, ask for it: {setting} = cpu (train --set {setting}=cpu, demo --device cpu)"


def _other_card(run_card: str, own: Card | None, chosen: Card) -> str:
    if not run_card or own is not None:
        return ""
    return (
        f"the run's card {plain(run_card, one_line=True, limit=80)} is not visible here: "
        f"{plain(chosen.name, one_line=True, limit=80)} ({plain(_name_of(chosen), one_line=True)}) is taken"
    )


def _choices(seen: Visible, sight: Sight) -> str:
    named = ", ".join(
        f"cuda:{number} ({plain(card.name, one_line=True, limit=80)})" for number, card in enumerate(seen.cards)
    )
    mask = sight.environ.get(MASK)
    return f"under {MASK}={_shown(mask)} there are {named}" if mask is not None else f"this machine has {named}"


def _listed(cards: list[Card]) -> str:
    return ", ".join(f"{card.index} ({plain(card.name, one_line=True, limit=80)})" for card in cards) or "none"


def _shown(mask: str) -> str:
    return plain(mask, one_line=True, limit=_LONGEST_SHOWN)
