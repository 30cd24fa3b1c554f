"""What the tests of the screens share: a run by the real writers, and an app on it whose services start nothing."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widget import Widget

from studio.core.errors import BadInput
from studio.core.events import Evaluated, MemorySeen, Phase, Planned, Sampled, Started, StepDone
from studio.core.gpu_catalogue import GIB, find_gpu
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.probe.cards import Card, CardProcess
from studio.probe.forecast import Forecaster
from studio.probe.plan import PlanDevice, device_from_catalogue
from studio.runs.checkpoints import NoWholeCheckpoint
from studio.runs.extension import Wish
from studio.runs.last_recipe import LastRecipe
from studio.runs.layout import RunPaths
from studio.runs.worker import Worker
from studio.tui.app import StudioApp
from studio.tui.screens.run import RunScreen
from studio.tui.screens.runs import RunsScreen
from studio.tui.services import Services
from tests.fakes.runs import make_run

NARROW, WIDE = (80, 24), (120, 40)
BOTH = pytest.mark.parametrize("size", [NARROW, pytest.param(WIDE, marks=pytest.mark.slow)])
"""A story on both terminals; on the wide one it is told with the slow tests."""
ESCAPES = "\x1b[31mred\x1b[2J\x1b]0;title\x07\x9b1;1H\u202e"
MARKUP = "[bold red]not bold[/] [@click=app.quit]quit[/]"
HOSTILE = f"{ESCAPES}{MARKUP}"
SELDOM = 3600.0

Story = Callable[[Pilot[None], StudioApp], Awaitable[None]]


EIGHT_B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
"""The config.json of Llama-3.1-8B, as far as its size goes."""


def card_of(
    name: str = "RTX 4090", *, planned: bool = False, used_gib: float = 0.0, processes: tuple[CardProcess, ...] = ()
) -> PlanDevice:
    gpu, used = find_gpu(name), int(used_gib * GIB)
    if planned:
        return device_from_catalogue(gpu)
    free = gpu.total_bytes - used
    card = Card(0, gpu.name, "GPU-1", gpu.total_bytes, used, free, gpu.compute_capability, processes=processes)
    return PlanDevice(gpu, free, card)


def forecaster_on(device: PlanDevice) -> Callable[[Recipe, str], Forecaster]:
    """An eight-billion model on a card, or on the one that is planned for."""
    shape = shape_from_config(EIGHT_B)
    return lambda recipe, planned: Forecaster(shape, card_of(planned, planned=True) if planned else device)


@dataclass
class Asked:
    """What the screens asked the services for."""

    started: list[Recipe] = field(default_factory=list)
    queued: list[Recipe] = field(default_factory=list)
    resumed: list[RunPaths] = field(default_factory=list)
    extended: list[tuple[RunPaths, Wish]] = field(default_factory=list)
    started_over: list[RunPaths] = field(default_factory=list)
    ended: list[RunPaths] = field(default_factory=list)
    planned: list[str] = field(default_factory=list)
    kept: list[LastRecipe] = field(default_factory=list)
    visits: list[float] = field(default_factory=list)


def given(services: Services | None = None, **calls: Callable[..., object]) -> Services:
    """Services of which some are a test's own; the others are the real ones, or those of `services`.

    Unless a test says otherwise no process looks at the data, as `settle` would wait until it has added up all rows,
    and no known models are priced.
    """
    if services is None:
        unasked: dict[str, Callable[..., object]] = {"glance_at_data": lambda _: None, "known_fits": lambda _: None}
        services, calls = Services(), {**unasked, **calls}
    for name, call in calls.items():
        assert hasattr(services, name)
        setattr(services, name, call)
    return services


def services_that(
    asked: Asked,
    *,
    refuses: str = "",
    damaged: str = "",
    makes: Callable[[], RunPaths] | None = None,
    card: str = "a card",
    forecaster: Callable[[Recipe, str], Forecaster] | None = None,
    planned: str = "",
    visited: float | None = None,
    spills: bool = False,
    free_ram_bytes: int | None = None,
    at_work: Sequence[str] = (),
) -> Services:
    """Services that note what they are asked; they refuse with a message, or hand out a run."""

    def start(recipe: Recipe, runs_root: Path, progress: object = None, *, queue: bool = False) -> RunPaths:
        (asked.queued if queue else asked.started).append(recipe)
        if refuses or makes is None:
            raise BadInput(refuses)
        return makes()

    def resume(paths: RunPaths, *, from_start: bool = False) -> None:
        if from_start:
            asked.started_over.append(paths)
            return
        asked.resumed.append(paths)
        if damaged:
            raise NoWholeCheckpoint(paths.name, damaged)
        if refuses:
            raise BadInput(refuses)

    return given(
        at_work=lambda recipe: list(at_work),
        start=start,
        resume=resume,
        extension=lambda paths, wish: f"{wish.steps or wish.epochs} further, {wish.tail}",
        extend=lambda paths, wish: asked.extended.append((paths, wish)),
        end_now=asked.ended.append,
        card=lambda: card,
        forecaster=forecaster or forecaster_on(card_of()),
        spills=lambda: spills,
        free_ram_bytes=lambda: free_ram_bytes,
        recall_planned=lambda: planned,
        keep_planned=asked.planned.append,
        recall_visit=lambda: visited,
        keep_visit=asked.visits.append,
        keep_recipe=asked.kept.append,
        glance_at_data=lambda recipe: None,
    )


def play(
    story: Story,
    root: Path,
    *,
    size: tuple[int, int] = WIDE,
    recipe: Recipe | None = None,
    open_run: RunPaths | None = None,
    services: Services | None = None,
    launch: bool = False,
) -> StudioApp:
    """Play a story on the studio and return the app that it ended with."""
    app = StudioApp(
        recipe or Recipe(name="try"),
        runs_root=root / "runs",
        open_run=open_run.root if open_run else None,
        services=services or services_that(Asked()),
        launch=launch,
        poll_seconds=SELDOM,  # the stories say when to look: `settle`
    )

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await settle(pilot)
            await story(pilot, app)

    asyncio.run(run())
    return app


async def settle(pilot: Pilot[None]) -> None:
    """Let the screen look at its run again, as its timer would, and wait until it has drawn."""
    await pilot.pause()
    if isinstance(pilot.app.screen, RunScreen):
        pilot.app.screen._look()
    elif isinstance(pilot.app.screen, RunsScreen):
        pilot.app.screen._read()
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()


async def until(pilot: Pilot[None], condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is true; fails after the time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        await settle(pilot)
        if condition():
            return
    raise AssertionError(f"what was waited for did not come; the screen is:\n{shown(pilot.app)}")


def shown(app: StudioApp) -> str:
    """What stands on the screen now, as the terminal would show it."""
    return "\n".join("".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips())


def assert_harmless(app: StudioApp) -> None:
    """No control character or reordering reaches the terminal, and no markup of others became an action or a style."""
    strips = app.screen._compositor.render_strips()
    for segment in (segment for strip in strips for segment in strip):
        assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in segment.text)
        assert "\u202e" not in segment.text
        actions = [value for key, value in (segment.style.meta if segment.style else {}).items() if "click" in str(key)]
        assert not any("app.quit" in str(value) for value in actions)


def text_of(widget: Widget) -> str:
    """All rows of a widget, scrolled or not."""
    return "\n".join(widget.render_line(y).text for y in range(max(widget.size.height, widget.virtual_size.height)))


def train(worker: Worker, steps: range, *, total: int = 100, method: str = "qlora") -> None:
    """Tell the story of a run up to its last step; begins with its start when the first step is 1."""
    if steps.start == 1:
        worker.emit(Started, job="train", method=method, model="embedded")
        worker.emit(
            Planned,
            total_steps=total,
            trainable_parameters=41_943_040,
            rows=4812,
            held_out_rows=100,
            device="cuda:0",
            dtype="bf16",
            loss_path="chunked",
        )
        worker.emit(Phase, name="training")
        worker.emit(Evaluated, step=0, loss=4.0, loss_tokens=1000, rows=100, seconds=1.0)
        worker.emit(Sampled, step=0, index=0, prompt="what is it?", answer="no idea", expected="this")
    for step in steps:
        worker.emit(
            StepDone,
            step=step,
            loss=3 * math.exp(-step / 20) + 1,
            learning_rate=2e-4,
            grad_norm=0.512,
            tokens=1600,
            seconds=2.0,
        )
        worker.emit(
            MemorySeen,
            step=step,
            stage="step",
            allocated_bytes=5 * 2**30,
            reserved_bytes=7 * 2**30,
            peak_bytes=6 * 2**30,
        )


__all__ = ["Asked", "given", "make_run", "play", "services_that", "settle", "shown", "text_of", "train", "until"]
