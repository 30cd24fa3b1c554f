"""The outlook of a recipe as the screen shows it: the parts of the gauge, and the words below it."""

from studio.core.fit import Fix
from studio.core.placement.streaming import HOST_SHARE
from studio.core.recipe import Recipe
from studio.core.text import plain
from studio.probe.cards import Card, CardProcess
from studio.probe.forecast import Outlook
from studio.probe.plan import PlanDevice
from studio.tui.readable import count, gib, to_gib
from widgets.gauge_picture import Level, Part, Reading

STAGES = {
    "load": "while loading",
    "forward": "in the forward pass",
    "loss": "at the loss",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
    "eval": "in the evaluation",
    "save": "while saving",
}

_LEVELS: dict[str | None, Level] = {"fits": "good", "tight": "doubtful", "does not fit": "bad"}
_MOST_NOTES = 2
_MOST_NAMED = 3
_LONGEST_NAME = 40


def reading_of(outlook: Outlook | str, free: Fix | None = None) -> Reading:
    """Return what the gauge shows: the peak by component in GiB; without an outlook, the reason why there is none.

    Args:
        outlook: What the recipe needs.
        free: The length that all rows need, where the recipe has a longer one: what fits so frightens nobody.
    """
    if isinstance(outlook, str):
        return Reading(verdict=plain(outlook, one_line=True, limit=200))
    estimate = outlook.estimate
    parts, device = estimate.components, estimate.device
    paged = paged_bytes(outlook)
    named = (
        ("base", parts.base),
        ("adapter", parts.adapter),
        ("gradients", parts.gradients),
        ("optimizer", parts.optimizer + paged),
        ("activations", parts.activations),
        ("logits", parts.logits),
    )
    other = device.expected - sum(size for _, size in named)
    verdict, level = str(outlook.verdict or "estimate"), _LEVELS.get(outlook.verdict, "")
    if free is not None and free.verdict == "fits" and outlook.verdict in ("tight", "does not fit"):
        verdict, level = f"fits at {free.recipe.train.seq_len} tokens", "doubtful"
    return Reading(
        parts=tuple(Part(label, to_gib(size)) for label, size in (*named, ("other", max(0, other)))),
        capacity=None if outlook.budget_bytes is None else to_gib(outlook.budget_bytes),
        low=to_gib(device.low),
        high=to_gib(device.high),
        verdict=verdict,
        level=level,
    )


def host_reading(outlook: Outlook | str, ram_bytes: int | None) -> Reading:
    """Return what a second gauge shows: what waits in main memory, in GiB; nothing where nothing does.

    Of a paged optimizer's states there counts what does not fit on the card: they move only then.

    Args:
        outlook: What the recipe needs.
        ram_bytes: Main memory of the computer; None where it is not known.
    """
    if isinstance(outlook, str):
        return Reading()
    host, paged = outlook.estimate.host, min(paged_bytes(outlook), outlook.over_bytes)
    named = (("weights", host.weights), ("checkpoints", host.checkpoints), ("paged states", paged))
    parts = tuple(Part(label, to_gib(size)) for label, size in named if size)
    if not parts or ram_bytes is None:
        return Reading(parts=parts)
    verdict, level = host_verdict(host.total + paged, ram_bytes)
    return Reading(parts=parts, capacity=to_gib(ram_bytes), verdict=verdict, level=level)


def host_verdict(size_bytes: int, ram_bytes: int) -> tuple[str, Level]:
    """Return whether main memory holds what would wait there beside system and program: in words, and as a level."""
    if size_bytes <= HOST_SHARE * ram_bytes:
        return "fits", "good"
    return ("tight", "doubtful") if size_bytes <= ram_bytes else ("does not fit", "bad")


def host_words(outlook: Outlook, ram_bytes: int | None) -> str:
    """Return the warning that main memory, not the card, is too small; empty where it is not."""
    size = outlook.estimate.host.total
    if ram_bytes is None or host_verdict(size, ram_bytes)[1] == "good":
        return ""
    return (
        f"Main memory is too small: {gib(size)} GiB would wait there, and this computer has {gib(ram_bytes)}, of which "
        f"{gib(int(HOST_SHARE * ram_bytes))} may be used. The card is not the limit."
    )


def paged_bytes(outlook: Outlook) -> int:
    """Return what the card holds beyond torch's allocator and the CUDA context: a paged optimizer's states."""
    estimate = outlook.estimate
    return max(0, estimate.device.expected - estimate.reserved.expected - estimate.components.context)


def rows_words(recipe: Recipe, longest_tokens: int | None) -> str:
    """Return how long the rows are that an estimate counts; empty where they are known to be as long.

    Args:
        recipe: Has the length, which estimates take all rows to have.
        longest_tokens: Tokens of the longest row, where it is known.
    """
    length = count(recipe.train.seq_len)
    if longest_tokens is None:
        return f"; every row counted as {length} tokens long"
    if longest_tokens >= recipe.train.seq_len:
        return ""
    return f"; rows counted as {length} tokens long, your longest has {count(longest_tokens)}"


def peak_words(outlook: Outlook, device: PlanDevice, rows: str = "", *, keys: bool = True) -> list[str]:
    """Return the lines below the gauge: in which stage the peak is, what is left, which card is meant, any doubts.

    Args:
        outlook: What the recipe needs.
        device: The card that is meant.
        rows: What `rows_words` says.
        keys: Whether to name the key that plans for another card.
    """
    stage = STAGES.get(outlook.estimate.stage, outlook.estimate.stage)
    room = ""
    if outlook.budget_bytes is not None:
        left = outlook.estimate.headroom_bytes(outlook.budget_bytes)
        room = f", {gib(left)} GiB free" if left >= 0 else f", {gib(-left)} GiB over"
    notes = [plain(note, one_line=True) for note in outlook.estimate.notes[:_MOST_NOTES]]
    return [f"Estimated peak {stage}{room}{rows}.", device_words(device, keys=keys), *notes]


def process_words(process: CardProcess) -> str:
    """Return a process that uses a card: its name, its id, and its GiB where the driver tells."""
    name = plain((process.name or "process").rpartition("/")[2], one_line=True, limit=_LONGEST_NAME)
    held = f" {gib(process.used_bytes)}" if process.used_bytes is not None else ""
    return f"{name} ({process.pid}){held}"


def others_words(card: Card) -> str:
    """Return which other processes use a card: the largest few by name, and how many more there are."""
    words = [process_words(process) for process in card.processes or ()]
    if not words:
        return "other processes"
    more = len(words) - _MOST_NAMED
    return ", ".join(words[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def device_words(device: PlanDevice, *, keys: bool = True) -> str:
    """Return which card the estimate is for, and where `keys` is true the key that plans for another."""
    if device.gpu is None:
        return f"This run has no NVIDIA card{': g plans for one' if keys else ''}."
    name = plain(device.gpu.name, one_line=True, limit=60)
    total = f"{gib(device.gpu.total_bytes)} GiB"
    if device.card is None:
        return f"Planned for {name}, {total}, with nothing else on it{'; g changes it' if keys else ''}."
    used = device.card.used_bytes
    others = f", {gib(used)} used by {others_words(device.card)}" if used else ""
    return f"On this {name}, {total}{others}{'; g plans for another' if keys else ''}."
