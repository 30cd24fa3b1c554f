"""Which models a card can train: one of them in both methods, all known ones at a glance.

Worked out by the estimator for a small recipe of its own, so that models can be compared before there is one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from textual.content import Content

from studio.core.errors import StudioError
from studio.core.recipe import Method, Recipe
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.text import plain, plain_path
from studio.core.vram.report import Verdict
from studio.probe.forecast import Forecaster
from studio.probe.known_models import known_models
from studio.probe.plan import PlanDevice
from studio.probe.trade import METHODS
from studio.tui.panels.setup_step import Shown
from studio.tui.readable import count, gib

_RECIPE = Recipe()
_ASSUMED = f"at 1 row of {count(_RECIPE.train.seq_len)} tokens and rank {_RECIPE.adapter.rank}"
_SHOWN: dict[Method, str] = {"lora": "LoRA 16-bit", "qlora": "QLoRA 4-bit"}
_LEVELS = {"fits": "$text-success", "tight": "$text-warning", "does not fit": "$text-error"}
_LADDER = (1e9, 3e9, 4e9, 8e9, 14e9, 24e9, 32e9, 70e9)
_LARGER = (
    ("train.seq_len", "With longer rows", "tokens"),
    ("adapter.rank", "With a larger rank", "rank"),
)
_TIMES = (2, 4, 8, 16)
"""How many times as much of a setting as assumed is shown."""
_BAR, _NAME, _LEAST_NAME = 22, 24, 20


@dataclass(frozen=True, slots=True)
class Need:
    """What a method takes of a card for a model: expected bytes, and whether that fits; None without a card."""

    expected_bytes: int
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class ModelFit:
    """A model and what it takes by each method.

    Attributes:
        word: Its hub id.
        parameters: Of the language model.
        gated: Whether the hub wants its terms accepted.
        needs: By method.
    """

    word: str
    parameters: int
    gated: bool
    needs: dict[Method, Need]

    @property
    def by(self) -> Method | None:
        """The first method that fits, LoRA before QLoRA; None where none does, or there is no card."""
        return next((method for method in METHODS if self.needs[method].verdict == "fits"), None)


@dataclass(frozen=True, slots=True)
class CardFits:
    """A card and the known models on it, the smallest first.

    Attributes:
        card: Its name; empty for the CPU.
        budget_bytes: What a run can get of it; None without a card.
        models: The known ones.
    """

    card: str
    budget_bytes: int | None
    models: tuple[ModelFit, ...]


def needs_of(shape: ModelShape, device: PlanDevice, recipe: Recipe = _RECIPE) -> dict[Method, Need]:
    """Return what a model takes by each method, with what a recipe says besides.

    Raises:
        BadInput: It cannot be estimated.
    """
    forecaster = Forecaster(shape, device)
    outlooks = {method: forecaster.outlook(recipe.with_("method", method)) for method in METHODS}
    return {method: Need(one.estimate.device.expected, one.verdict) for method, one in outlooks.items()}


@lru_cache(maxsize=8)
def fits_of(device: PlanDevice) -> CardFits:
    """Return all known models on a device. Two seconds for a card that was not asked for before: for a thread."""
    found = []
    for repo, entry in known_models().items():
        try:
            needs = needs_of(shape_from_config(entry["config"]), device)
        except StudioError:
            continue
        found.append(ModelFit(repo, entry["parameters"], "gated" in entry, needs))
    card = device.gpu.name if device.gpu else ""
    return CardFits(card, device.budget_bytes(_RECIPE), tuple(sorted(found, key=lambda one: one.parameters)))


def needs_text(needs: dict[Method, Need], card: str, budget_bytes: int | None) -> Content:
    """Return a bar for each method: how much of the card it takes, and whether that fits."""
    lines: list[str | tuple[str, str]] = []
    if budget_bytes is None:
        lines.append(("On this machine's CPU\n", "bold"))
    else:
        lines.append((f"On {plain(card, one_line=True) or 'the card'}, {gib(budget_bytes)} GiB\n", "bold"))
    for method in METHODS:
        need = needs[method]
        lines.append(f"{_SHOWN[method]:12}{gib(need.expected_bytes):>6} GiB  ")
        if budget_bytes and need.verdict:
            full = min(_BAR, max(1, round(_BAR * need.expected_bytes / budget_bytes)))
            lines += [("█" * full, _LEVELS[need.verdict]), ("░" * (_BAR - full), "dim")]
            lines.append((f"  {need.verdict}", f"{_LEVELS[need.verdict]} bold"))
        lines.append("\n")
    return Content.assemble(*lines, (f"{_ASSUMED}; the recipe is fitted afterwards", "dim"))


def larger_text(shape: ModelShape, device: PlanDevice) -> Content:
    """Return what a model takes by each method with longer rows, up to what it reads, and with larger ranks.

    Raises:
        BadInput: It cannot be estimated.
    """
    lines: list[str | tuple[str, str]] = []
    for path, head, unit in _LARGER:
        values = [times * _RECIPE.get(path) for times in _TIMES]
        if path == "train.seq_len" and shape.positions:
            values = [value for value in values if value <= shape.positions]
        heads = "".join(f"  {_SHOWN[method]:>12}" for method in METHODS)
        lines += [(f"\n\n{head}, in GiB\n", "bold"), (f"{unit:>8}{heads}", "dim")] if values else []
        for value in values:
            needs = needs_of(shape, device, _RECIPE.with_(path, value))
            lines += [f"\n{count(value):>8}", *(_cell(needs[method], 12) for method in METHODS)]
    return Content.assemble(*lines)


def _cell(need: Need, cells: int) -> tuple[str, str]:
    mark, style = (mark_of(need.verdict), _LEVELS[need.verdict]) if need.verdict else (" ", "")
    return f"{gib(need.expected_bytes):>{cells}} {mark}", style


def ladder_text(fits: CardFits) -> Content:
    """Return known models from small to large, each with what it takes of the card by both methods."""
    named = [one for one in fits.models if len(_name(one)) < _NAME] or fits.models
    nearest = [min(named, key=lambda one: abs(one.parameters - size)) for size in _LADDER]
    rungs = {one.word: one for one in nearest}.values()
    head = f"What {plain(fits.card, one_line=True) or 'the card'} trains" if fits.budget_bytes else "What models take"
    budget = f", of {gib(fits.budget_bytes)} GiB" if fits.budget_bytes else ", in GiB"
    lines: list[str | tuple[str, str]] = [(f"{head}{budget}\n", "bold")]
    lines.append((f"{'':9}{'':{_NAME}}{'LoRA':>7}   {'QLoRA':>7}\n", "dim"))
    for one in rungs:
        lines.append(f"{one.parameters / 1e9:5.1f} B  {_name(one)[: _NAME - 1]:{_NAME}}")
        for method in METHODS:
            lines += [_cell(one.needs[method], 7), " "]
        lines.append("\n")
    return Content.assemble(*lines, (f"{_ASSUMED}; {len(fits.models)} models are known without the hub", "dim"))


def _name(one: ModelFit) -> str:
    return one.word.partition("/")[2]


def mark_of(verdict: Verdict) -> str:
    """Return the sign of a verdict."""
    return {"fits": "✓", "tight": "~", "does not fit": "✗"}[verdict]


def known_options(fits: CardFits, found: Sequence[str]) -> list[tuple[str, Shown]]:
    """Offer the known models that were not found here, below headings that say whether the card trains them."""
    there = {word.lower() for word in found}
    rest = [one for one in fits.models if one.word.lower() not in there]
    card = plain(fits.card, one_line=True).upper() or "THE CARD"
    fitting, larger = [one for one in rest if one.by], [one for one in rest if not one.by]
    groups = {f"FITS {card}": fitting, f"LARGER THAN {card}": larger}
    options: list[tuple[str, Shown]] = []
    for heading, models in (groups if fits.budget_bytes else {"ON THE HUB": rest}).items():
        if models:
            options.append(("", Content.styled(f"{heading}  {len(models)}", "bold $text-primary")))
        options += [(one.word, partial(_line, one)) for one in models]
    return options


def _line(one: ModelFit, cells: int) -> Content:
    room, fit = max(_LEAST_NAME, cells - 16), {"lora": mark_of("fits"), "qlora": "4-bit"}.get(one.by or "", "")
    size = f"{one.parameters / 1e9:.1f} B"
    name = plain_path(_name(one), room)
    return Content.assemble(f"{name:{room}}", f"{size:>8}", (f"  {fit:5}", "$text-success"))
