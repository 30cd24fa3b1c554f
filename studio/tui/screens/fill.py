"""Settings that fill the card for an aim: what each changes, costs and buys, worked out while the dialog is open."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from textual import work
from textual.app import App, ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option
from textual.worker import Worker, get_current_worker

from studio.core.errors import StudioError
from studio.core.recipe import Recipe
from studio.tui.changes import differences
from studio.tui.readable import count, gib
from studio.tui.screens.dialogs import Dialog, ask
from studio.tui.told import Abandoned

if TYPE_CHECKING:  # the estimator takes 0.1 s to import: a thread brings it after the first frame
    from studio.core.gpu_catalogue import Gpu
    from studio.core.placement.planner import Aim, Plan
    from studio.core.vram.report import VramEstimate
    from studio.core.vram.setup import Setup
    from studio.probe.forecast import Forecaster

AIMS: "dict[Aim, str]" = {
    "speed": "the fastest settings that fit",
    "fidelity": "as many bits as fit, then the fastest",
    "room": "the least memory, then the fastest",
}
_WORKING = "working it out ..."
_Parts = list[str | tuple[str, str]]


def ask_to_fill(
    app: App[None], forecaster: "Forecaster | None", recipe: Recipe, take: Callable[[Recipe], object]
) -> None:
    """Offer plans for each aim, or say why there can be none.

    Args:
        app: Shows the dialog.
        forecaster: Knows model and card; None where they were not found yet.
        recipe: What is wanted.
        take: Told the recipe that was chosen, where one was.
    """
    if forecaster is None or recipe.problems():
        app.notify("Nothing can be planned: model or recipe have problems.", severity="warning", markup=False)
    elif forecaster.device.gpu is None or forecaster.device.budget_bytes(recipe) is None:
        app.notify("No card is planned for: g chooses one.", severity="warning", markup=False)
    else:
        ask(app, FillScreen(recipe, forecaster, forecaster.device.gpu), take)


class FillScreen(Dialog[Recipe]):
    """Closes with the recipe of a plan, or with None after escape, which also ends the search."""

    DEFAULT_CSS = """
    FillScreen > Vertical {
        width: 100;
        & OptionList { height: auto; max-height: 100%; background: $surface; border: none; padding: 0; }
    }
    """

    class Planned(Message):
        """An aim was worked out."""

        def __init__(self, aim: "Aim", recipe: Recipe | None, words: Content) -> None:
            """Carry the recipe of the plan, and what to say of it; no recipe where nothing fits."""
            super().__init__()
            self.aim, self.recipe, self.words = aim, recipe, words

    def __init__(self, recipe: Recipe, forecaster: "Forecaster", gpu: "Gpu") -> None:
        """Plan for a recipe.

        Args:
            recipe: What is wanted.
            forecaster: Estimates it.
            gpu: The card.
        """
        super().__init__()
        self._recipe, self._forecaster, self._gpu = recipe, forecaster, gpu
        self.planned: dict[Aim, Recipe | None] = {}

    def compose(self) -> ComposeResult:
        """Make the box with an entry for each aim."""
        with Vertical() as box:
            box.border_title = "Fill the card"
            box.border_subtitle = "⏎ take it  esc back"
            yield OptionList(
                *(Option(_entry(aim, Content(_WORKING)), id=aim) for aim in AIMS), compact=True, markup=False
            )

    def on_mount(self) -> None:
        """Begin to plan."""
        self.query_one(OptionList).focus()
        self._plan()

    def on_fill_screen_planned(self, message: Planned) -> None:
        """Show a plan."""
        self.planned[message.aim] = message.recipe
        self.query_one(OptionList).replace_option_prompt(message.aim, _entry(message.aim, message.words))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Take a plan that is there."""
        event.stop()
        aim = next(aim for aim in AIMS if aim == event.option_id)
        if (recipe := self.planned.get(aim)) is not None:
            self.dismiss(recipe)

    @work(thread=True, exclusive=True)
    def _plan(self) -> None:
        from studio.core.placement.planner import Planner  # noqa: PLC0415  with the estimator
        from studio.probe.quality import audited, layer_effects  # noqa: PLC0415  as above

        worker, forecaster, recipe = get_current_worker(), self._forecaster, self._recipe
        planner = Planner(
            recipe,
            forecaster.shape,
            self._gpu,
            forecaster.device.budget_bytes(recipe) or 0,
            forecaster.ram_bytes,
            lambda setup: _unless_left(worker, forecaster, setup),
            layer_effects(recipe),
        )
        for aim in AIMS:
            try:
                plan = planner.plan(aim)
            except Abandoned:
                return
            except StudioError as error:
                self.post_message(self.Planned(aim, None, Content(str(error))))
                continue
            chosen = None if plan is None else plan.chosen.on(recipe)
            words = _words(plan, recipe, forecaster)
            if aim == "fidelity" and planner.effects is None and not audited(recipe):
                words = Content.assemble(words, ("  Not measured on this model: bits alone count.\n", "dim"))
            self.post_message(self.Planned(aim, chosen, words))


def _unless_left(worker: Worker[None], forecaster: "Forecaster", setup: "Setup") -> "VramEstimate":
    """Return what a set-up takes.

    Raises:
        Abandoned: The dialog was left.
    """
    if worker.is_cancelled:
        raise Abandoned
    return forecaster.estimate(setup)


def _entry(aim: "Aim", words: Content) -> Content:
    return Content.assemble((f"{aim:9}", "bold"), (AIMS[aim], "dim"), "\n", words)


def _words(plan: "Plan | None", recipe: Recipe, forecaster: "Forecaster") -> Content:
    """Return what a plan takes, how fast it is, what it changes, and what the memory buys."""
    from studio.core.throughput import speed_of  # noqa: PLC0415  with the estimator

    if plan is None:
        return Content("  Nothing fits, not even the leanest settings: take a smaller model or a larger card.")
    chosen, gpu, budget = plan.chosen, forecaster.device.gpu, forecaster.device.budget_bytes(recipe) or 0
    device, host = chosen.estimate.device, chosen.estimate.host.total
    takes = f"  {gib(device.expected)} GiB ({gib(device.low)}-{gib(device.high)}) of {gib(budget)}"
    takes += f", {gib(host)} of main memory" if host else ""
    before, after = (speed_of(forecaster.shape, setup, gpu) for setup in (forecaster.setup(recipe), chosen.setup))
    if before and after:
        times = after.expected / before.expected
        takes += f"; {count(after.low)}-{count(after.high)} tokens/s, x{times:.2f} of now"
    changed = differences(recipe, chosen.on(recipe))
    parts: _Parts = [takes, "\n  ", (", ".join(changed) or "nothing changes: the recipe is that already", "bold")]
    for one in plan.bought:
        sign = "-" if one.bytes < 0 else "+"
        parts.append((f"\n  {sign}{gib(abs(one.bytes))} GiB  x{one.factor:.2f}  {one.words}", "dim"))
    if chosen.setup.streamed:
        parts.append(
            ("\n  no card has run a streamed base yet: such a run proves itself at its start", "$text-warning")
        )
    return Content.assemble(*parts, "\n")
