"""The forecast on the configure screen: gauge, table, warning, fix and undo, the card that is planned for."""

import asyncio
import json
import threading
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import GIB
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup
from studio.probe.forecast import Forecaster
from studio.probe.plan import PlanDevice
from studio.runs.show import Summary
from studio.tui.app import StudioApp
from studio.tui.panels.data_note import DataNote
from studio.tui.panels.fixes import FixList
from studio.tui.screens.cards import CardScreen
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.dialogs import AskTurn, Confirm
from studio.tui.screens.fill import FillScreen
from studio.tui.screens.run import RunScreen
from studio.tui.services import Services
from tests.tui.stories import (
    BOTH,
    EIGHT_B,
    HOSTILE,
    NARROW,
    WIDE,
    Asked,
    assert_harmless,
    card_of,
    forecaster_on,
    make_run,
    play,
    services_that,
    settle,
    shown,
    until,
)
from widgets.gauge import Gauge

LARGE = Recipe(name="big", method="lora").with_("train.micro_batch", 24)


def screen_of(app: StudioApp) -> ConfigureScreen:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen


def gauge_of(app: StudioApp) -> Gauge:
    return screen_of(app).query_one("#gauge", Gauge)


async def forecast(pilot: Pilot[None], app: StudioApp) -> None:
    await until(pilot, lambda: gauge_of(app).reading.parts)


def test_every_turn_moves_gauge_and_table(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        told = shown(app)
        for part in (
            "of 24.0 GiB",
            "fits",
            "█ base",
            "Estimated peak in the backward pass",
            "largest batch",
            "trained",
        ):
            assert part in told
        before = gauge_of(app).reading.total
        await pilot.press("right")
        assert gauge_of(app).reading.total > before, "a larger rank takes more, at once"
        assert "83.9 M" in shown(app)
        before = gauge_of(app).reading.total
        await pilot.press("m")
        assert gauge_of(app).reading.total > before, "so does LoRA"
        assert "•LoRA 16-bit" in shown(app)
        await until(pilot, lambda: "..." not in shown(app).split("largest batch")[1][:30])

    play(story, tmp_path)


def test_one_row_is_always_in_sight_where_there_is_room_for_little(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        row = shown(app).splitlines()[1]
        assert row.startswith(" VRAM █")
        assert not screen_of(app).query("MemoryGauges .-host"), "nothing waits in main memory: its styles cost a frame"
        assert "of 24.0 GiB" in row
        assert "fits" in row
        assert "largest batch" not in shown(app)
        await pilot.press("v")
        assert "largest batch" in shown(app)
        assert "█ base" in shown(app)
        assert "Rank" not in shown(app)
        assert shown(app).splitlines()[1] == row
        await pilot.press("v", "right")
        await pilot.pause()
        assert shown(app).splitlines()[1] != row, "the row follows"
        await pilot.resize_terminal(*WIDE)
        await settle(pilot)
        assert not screen_of(app).query_one("#gauge-rows").display
        assert "largest batch" in shown(app)

    play(story, tmp_path, size=NARROW)


@pytest.mark.slow
@BOTH
def test_the_keyboard_reaches_the_end_of_the_forecast(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        await pilot.press("v")
        await until(pilot, lambda: "f makes it fit" in shown(app))
        assert "roofline" not in shown(app)
        await pilot.press("end")
        await until(pilot, lambda: "roofline" in shown(app))
        await pilot.press("v", "right")
        await settle(pilot)
        assert screen_of(app).recipe.adapter.rank == 32, "the arrows turn the slider again"
        await pilot.press("down", "v", "v", "right")
        await settle(pilot)
        assert screen_of(app).recipe.adapter.alpha != LARGE.adapter.alpha, "of the field that was left"

    play(story, tmp_path, recipe=LARGE, size=size)


@BOTH
def test_f_makes_it_fit_and_u_takes_back_first_what_came_later(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        assert gauge_of(app).reading.verdict == "does not fit"
        assert "f Fit" in shown(app)
        assert "u Undo" not in shown(app)
        if size == WIDE:
            await until(pilot, lambda: "f makes it fit: micro-batch 24 ->" in shown(app))
            first, others, table = (shown(app).index(part) for part in ("f makes it", "2 8-bit", "base held in"))
            assert first < others < table, "what else would help does not push the trade out of sight"
        await pilot.press("f")
        await settle(pilot)
        fitted = screen_of(app).recipe
        assert gauge_of(app).reading.verdict == "fits"
        assert fitted.rows_per_step == LARGE.rows_per_step
        assert "undoes" in shown(app), "it says what was changed"
        assert "f Fit" not in shown(app)
        await pilot.press("right", "u")
        await settle(pilot)
        assert screen_of(app).recipe == fitted, "the later turn first"
        await pilot.press("u")
        await settle(pilot)
        assert screen_of(app).recipe == LARGE
        assert gauge_of(app).reading.verdict == "does not fit"
        assert "u Undo" not in shown(app)

    play(story, tmp_path, recipe=LARGE, size=size)


def test_fixes_are_chosen_from_a_list_and_a_needless_length_frightens_nobody(tmp_path: Path) -> None:
    long = Recipe(name="try").with_("train.seq_len", 16384).with_("train.micro_batch", 12)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        await until(pilot, lambda: "x Fixes" in shown(app) and "f makes it fit" in shown(app))
        assert "counted as 16 384 tokens long" in " ".join(shown(app).replace("│", " ").split())
        fixes = screen.query_one(FixList)
        third = fixes._offered[2]
        assert third is not None
        await pilot.press("x", "down", "down", "enter")
        await settle(pilot)
        assert screen.recipe == third.recipe
        await pilot.press("u")
        assert screen.recipe == long
        await until(pilot, lambda: fixes.option_count > 2)
        await pilot.press("x", "3")
        await settle(pilot)
        assert screen.recipe == third.recipe, "its number takes it, too"
        await pilot.press("u")

        screen.query_one(DataNote)._know(Summary(done=9, rows=9, seq_len=16384, lengths={"max": 57.0}))
        await until(pilot, lambda: "1 length" in shown(app) or "f makes it fit: length 16384 -> 128" in shown(app))
        told = " ".join(shown(app).replace("│", " ").split())
        assert "nothing lost: your longest row has 57 tokens" in str(fixes.get_option_at_index(0).prompt)
        assert "longest 57" in told, "beside the length"
        assert "fits at 128 tokens" in told
        assert "does not fit" not in told.split("The trade")[0]
        await pilot.press("f")
        await settle(pilot)
        assert screen.recipe == long.with_("train.seq_len", 128)
        await until(pilot, lambda: not fixes.display)
        screen._form.focus_field("train.seq_len")
        await pilot.press("enter", *"1024", "enter")
        await until(pilot, lambda: "Saves memory for nothing" in shown(app))
        assert gauge_of(app).reading.verdict == "fits"
        await pilot.press("x", "enter")
        await settle(pilot)
        assert screen.recipe.train.seq_len == 128

    play(story, tmp_path, recipe=long)


def test_launching_what_does_not_fit_takes_a_second_yes(tmp_path: Path) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        told = shown(app)
        assert "This does not fit" in told
        assert "too much" in told
        await pilot.press("n")
        await settle(pilot)
        assert asked.started == []
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        await pilot.press("y")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert asked.started == [LARGE]

    play(story, tmp_path, recipe=LARGE, services=services_that(asked, makes=lambda: make_run(tmp_path)))


@pytest.mark.parametrize("key", ["w", "s", "c"])
def test_who_launches_on_a_busy_card_may_wait_for_it(tmp_path: Path, key: str) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, AskTurn))
        assert "At work on it: other-1" in shown(app)
        await pilot.press(key)
        if key == "c":
            await settle(pilot)
        else:  # what waits will have the card for itself; what starts at once is too large for it
            await until(pilot, lambda: isinstance(app.screen, RunScreen if key == "w" else Confirm))
        assert (asked.queued, asked.started) == ([LARGE] if key == "w" else [], [])

    services = services_that(asked, makes=lambda: make_run(tmp_path), at_work=["other-1"])
    play(story, tmp_path, recipe=LARGE, services=services)


@pytest.mark.parametrize(
    ("planned", "free_gib", "words"),
    [
        ("RTX 3060", 500, "GiB of main memory, and time"),
        pytest.param("", 2, "would probably end it", marks=pytest.mark.slow),
        pytest.param("RTX 3060", 2, "would probably end it", marks=pytest.mark.slow),
    ],
)
def test_a_cpu_is_asked_about_where_a_card_was_planned_for_or_memory_is_short(
    tmp_path: Path, planned: str, free_gib: int, words: str
) -> None:
    """The card of the plan is not the card of the launch."""
    asked = Asked()
    services = services_that(
        asked,
        makes=lambda: make_run(tmp_path),
        forecaster=forecaster_on(PlanDevice()),
        planned=planned,
        free_ram_bytes=free_gib * GIB,
    )

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        assert ("Planned for RTX 3060" in shown(app)) is bool(planned)
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        assert words in shown(app)
        assert ("The forecast is of RTX 3060" in shown(app)) is bool(planned)
        assert asked.started == []
        await pilot.press("y")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert asked.started == [LARGE]

    play(story, tmp_path, recipe=LARGE, services=services)


@pytest.mark.slow
def test_another_card_is_chosen_by_typing_and_kept(tmp_path: Path) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        assert "This run has no NVIDIA card: g plans for one" in shown(app)
        assert gauge_of(app).reading.capacity is None
        await pilot.press("g")
        await settle(pilot)
        assert isinstance(app.screen, CardScreen)
        await pilot.press(*"a100", "down", "enter")
        await settle(pilot)
        await until(pilot, lambda: "Planned for A100 80GB" in shown(app))
        await pilot.resize_terminal(*NARROW)
        await settle(pilot)
        assert "planned for A100 80GB; here a card" in shown(app).splitlines()[0], "a short screen names it too"
        await pilot.resize_terminal(*WIDE)
        assert asked.planned == ["A100 80GB"]
        assert gauge_of(app).reading.capacity == pytest.approx(80.0)
        await pilot.press("g")
        await settle(pilot)
        await pilot.press("home", "escape")
        await settle(pilot)
        assert asked.planned == ["A100 80GB"], "escape changes nothing"
        await pilot.press("g")
        await settle(pilot)
        await pilot.press("pageup", "pageup", "pageup", "pageup")
        cards = app.screen.query_one(OptionList)
        assert cards.highlighted == 0
        await pilot.press("pagedown")
        assert cards.highlighted is not None
        assert 5 < cards.highlighted < cards.option_count - 5
        await pilot.press("pagedown", "pagedown", "pagedown", "pagedown")
        assert cards.highlighted == cards.option_count - 1
        await pilot.press(*"this mach")
        assert str(cards.get_option_at_index(0).prompt) == "this machine, as it is"
        await pilot.press("ctrl+u", *"no such card", "enter")
        assert isinstance(app.screen, CardScreen), "nothing to choose"
        await pilot.press("escape")

    play(story, tmp_path, services=services_that(asked, forecaster=forecaster_on(PlanDevice())))


def test_a_model_that_cannot_be_sized_says_why_and_another_is_looked_at(tmp_path: Path) -> None:
    sized = forecaster_on(card_of())

    def find(recipe: Recipe, planned: str) -> Forecaster:
        if recipe.model.base != "embedded":
            raise BadInput(f"There is no model {recipe.model.base}.")
        return sized(recipe, planned)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "There is no model" in shown(app))
        assert not gauge_of(app).reading.parts
        assert_harmless(app)
        screen = screen_of(app)
        screen._form.focus_field("model.base")
        await pilot.press("enter", "ctrl+u", *"embedded", "enter")
        await forecast(pilot, app)

    odd = Recipe().with_("model.base", HOSTILE)
    play(story, tmp_path, recipe=odd, services=services_that(Asked(), forecaster=find))


def test_a_recipe_with_problems_has_no_estimate_and_no_fix(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "no estimate" in shown(app))
        await pilot.press("f")
        assert screen_of(app).recipe.adapter.rank == 0

    play(story, tmp_path, recipe=Recipe().with_("adapter.rank", 0))


def test_a_late_answer_about_another_model_is_passed_over(tmp_path: Path) -> None:
    """A hub may take its time, and the user may have named another model meanwhile."""
    sized, gate = forecaster_on(card_of()), threading.Event()

    def find(recipe: Recipe, planned: str) -> Forecaster:
        if recipe.model.base == "slow/model":
            gate.wait(60)
            return forecaster_on(card_of("Tesla T4"))(recipe, planned)
        return sized(recipe, planned)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        screen._form.focus_field("model.base")
        await pilot.press("enter", "ctrl+u", *"embedded", "enter")
        while not gauge_of(app).reading.parts:
            await pilot.pause(0.02)
        gate.set()
        await settle(pilot)
        assert gauge_of(app).reading.capacity == pytest.approx(24564 / 1024)

    app = StudioApp(
        Recipe().with_("model.base", "slow/model"),
        runs_root=tmp_path / "runs",
        services=services_that(Asked(), forecaster=find),
    )

    async def run() -> None:
        async with app.run_test(size=WIDE) as pilot:
            await pilot.pause()
            await story(pilot, app)

    asyncio.run(run())


@pytest.mark.parametrize(
    "size", [(1, 1), *(pytest.param(one, marks=pytest.mark.slow) for one in ((20, 5), (40, 12), (300, 90)))]
)
def test_any_size(tmp_path: Path, size: tuple[int, int]) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        await pilot.press("v", "v", "right", "f", "u")
        await pilot.resize_terminal(*NARROW)
        await until(pilot, lambda: "does not fit" in shown(app).splitlines()[1])

    play(story, tmp_path, size=size, recipe=LARGE)


def test_the_real_services_size_a_folder_and_keeps_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(EIGHT_B))
    services, recipe = Services(), Recipe().with_("model.base", str(folder))
    found = services.forecaster(recipe, "RTX 4090")
    assert found.shape.parameters == pytest.approx(8.03e9, rel=0.01)
    assert found.device.card is None
    assert found.outlook(recipe).verdict == "fits"
    here = services.forecaster(recipe.with_("device.device", "cpu"), "")
    assert here.device == PlanDevice()
    for word in (str(tmp_path / "none"), "~nobody-of-that-name/x", "a" * 5000, "a\0b"):
        with pytest.raises(BadInput):
            services.forecaster(recipe.with_("model.base", word), "")
    services.keep_planned("RTX 4090")
    assert services.recall_planned() == "RTX 4090"


def roomy(recipe: Recipe, planned: str, ram_bytes: int = 64 * GIB) -> Forecaster:
    """An eight-billion model on an RTX 4070, beside some main memory."""
    return Forecaster(shape_from_config(EIGHT_B), card_of("RTX 4070"), ram_bytes=ram_bytes)


def test_one_key_fills_the_card_and_one_takes_it_back(tmp_path: Path) -> None:
    recipe = Recipe(method="qlora").with_("train.micro_batch", 2)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        await pilot.press("F")
        assert isinstance(app.screen, FillScreen)
        screen = app.screen
        await until(pilot, lambda: len(screen.planned) == 3)
        told = shown(app)
        for part in ("the fastest settings that fit", "tokens/s, x", "layers keep their activations", "GiB  x1."):
            assert part in told
        plans = list(screen.planned.values())
        await pilot.press("down", "enter")
        assert screen_of(app).recipe == plans[1]
        assert plans[1] is not None
        assert (plans[1].method, plans[1].model.stream) == ("lora", 32)
        await until(pilot, lambda: "layers streamed" not in shown(app) and "RAM" in shown(app))
        await pilot.press("u")
        assert screen_of(app).recipe == recipe, "one change"

    play(story, tmp_path, recipe=recipe, services=services_that(Asked(), forecaster=roomy))


def test_a_plan_that_nobody_waits_for_ends(tmp_path: Path) -> None:
    asked, go = threading.Event(), threading.Event()
    ended: list[int] = []

    class Slow(Forecaster):
        def estimate(self, setup: Setup) -> VramEstimate:
            asked.set()
            go.wait(10)
            ended.append(1)
            return super().estimate(setup)

    def slow(recipe: Recipe, planned: str) -> Forecaster:
        return Slow(shape_from_config(EIGHT_B), card_of("RTX 4070"), ram_bytes=64 * GIB)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        await pilot.press("F")
        assert await asyncio.to_thread(asked.wait, 10)
        await pilot.press("escape")
        assert isinstance(app.screen, ConfigureScreen), "escape does not wait"
        go.set()
        await settle(pilot)
        assert len(ended) == 1, "nothing is estimated after escape"

    play(story, tmp_path, services=services_that(Asked(), forecaster=slow))


def test_a_small_screen_gets_a_row_for_main_memory_and_a_warning_before_a_launch(tmp_path: Path) -> None:
    recipe = Recipe(method="lora").with_("model.stream", 32)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await forecast(pilot, app)
        rows = shown(app).splitlines()
        assert rows[1].startswith(" VRAM █")
        assert "fits" in rows[1]
        assert rows[2].startswith(" RAM  █")
        assert "does not fit" in rows[2]
        await pilot.press("v")
        assert "Main memory is too small" in shown(app)
        await pilot.press("r")
        await until(pilot, lambda: isinstance(app.screen, Confirm))
        assert "Main memory is too small." in shown(app)

    def poor(recipe: Recipe, planned: str) -> Forecaster:
        return roomy(recipe, planned, 8 * GIB)

    play(story, tmp_path, size=NARROW, recipe=recipe, services=services_that(Asked(), forecaster=poor))
