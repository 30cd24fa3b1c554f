"""A good citizen of terminals: without colour, without glyphs, in other themes, over SSH, and quiet when idle."""

import asyncio
import importlib
import pkgutil
import re
from base64 import b64encode
from pathlib import Path

import pytest
from rich._palettes import STANDARD_PALETTE
from rich.style import Style
from textual.binding import BindingsMap
from textual.color import Color
from textual.dom import DOMNode
from textual.pilot import Pilot
from textual.theme import Theme

import widgets
from studio import tui
from studio.core.recipe import Recipe
from studio.runs.layout import RunPaths
from studio.runs.recipe_file import dump_recipe
from studio.tui import app as app_module
from studio.tui.app import StudioApp, run_studio
from studio.tui.screens.audit import AuditScreen
from studio.tui.screens.open import OpenScreen
from studio.tui.themes import OURS, SIXTEEN
from tests.fakes.runs import CHECKOUT, LiveWorker
from tests.pictures.drawn import Ground
from tests.pictures.findings import contrast
from tests.tui.stories import NARROW, Asked, given, make_run, play, services_that, settle, shown, train, until
from widgets.output_filter import drawable

GROUNDS = ("background", "panel", "block-cursor-background", "block-cursor-blurred-background")


def rows_written(app: StudioApp) -> list[str]:
    """The screen as it leaves for the terminal, filters applied."""
    return ["".join(segment.text for segment in strip) for strip in app.screen._compositor.render_strips()]


async def tour(pilot: Pilot[None], app: StudioApp) -> list[str]:
    """Look at every screen; returns all that was written."""
    seen: list[str] = []
    for keys in (("?",), ("escape", "v"), ("v", "g"), ("escape", "o"), ("enter",), ("2",), ("3",), ("4",), ("escape",)):
        await pilot.press(*keys)
        await settle(pilot)
        seen += rows_written(app)
    return seen


def studio(root: Path, **options: object) -> StudioApp:
    return StudioApp(
        Recipe(name="try é"),
        runs_root=root / "runs",
        services=services_that(Asked()),
        poll_seconds=3600,
        **options,  # type: ignore[arg-type]
    )


def toured(app: StudioApp, size: tuple[int, int] = (120, 40)) -> list[str]:
    seen: list[str] = []

    async def run() -> None:
        async with app.run_test(size=size) as pilot:
            await settle(pilot)
            seen.extend(await tour(pilot, app))

    asyncio.run(run())
    return seen


@pytest.fixture
def with_a_run(tmp_path: Path) -> Path:
    paths = make_run(tmp_path)
    with LiveWorker(paths) as worker:
        train(worker, range(1, 30))
    return tmp_path


@pytest.mark.slow
def test_an_ascii_terminal_gets_ascii_on_every_screen(with_a_run: Path) -> None:
    seen = toured(studio(with_a_run, can_draw=drawable("ascii")), NARROW)
    assert all(row.isascii() for row in seen)
    assert all(len(row) == NARROW[0] for row in seen)
    assert any("loss" in row for row in seen)


@pytest.mark.slow
def test_no_color_shows_every_screen_without_a_colour(with_a_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = studio(with_a_run)
    grey = True

    async def run() -> None:
        nonlocal grey
        async with app.run_test(size=(120, 40)) as pilot:
            await settle(pilot)
            await tour(pilot, app)
            for strip in app.screen._compositor.render_strips():
                for segment in strip:
                    for colour in (segment.style.color, segment.style.bgcolor) if segment.style else ():
                        triplet = colour.triplet if colour is not None else None
                        grey &= triplet is None or triplet.red == triplet.green == triplet.blue

    asyncio.run(run())
    assert app.no_color
    assert grey


@pytest.mark.parametrize("theme", [ours.name for ours in OURS])
def test_a_theme_is_worn_from_the_start(tmp_path: Path, theme: str) -> None:
    app = studio(tmp_path, theme=theme)

    async def run() -> None:
        async with app.run_test(size=NARROW):
            assert app.theme == theme

    asyncio.run(run())


@pytest.mark.parametrize("theme", OURS, ids=lambda theme: theme.name)
@pytest.mark.parametrize(
    "ground", ["background", "panel", "block-cursor-background", "block-cursor-blurred-background"]
)
def test_words_in_colour_can_be_read_on_every_ground(theme: Theme, ground: str) -> None:
    """Also under the cursor of a list; WCAG 2.2 asks for 3 of large text and 4.5 of running text."""
    worn = theme.to_color_system().generate() | theme.variables
    back = Color.parse(worn["background"]) + Color.parse(worn[ground])
    for name in ("primary", "accent", "success", "warning", "error"):
        words = Style(color=Color.parse(worn[f"text-{name}"]).rich_color, bgcolor=back.rich_color)
        assert contrast(words, Ground()) >= 3.5, name


def test_an_unknown_theme_of_an_earlier_version_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textual.constants.COLOR_SYSTEM", "truecolor")
    assert studio(tmp_path, theme="no such theme").theme == "textual-dark"


def test_a_terminal_of_sixteen_colours_gets_those_unless_another_theme_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("textual.constants.COLOR_SYSTEM", "standard")
    app = studio(tmp_path)
    assert app.theme == SIXTEEN.name
    assert studio(tmp_path, theme="textual-light").theme == "textual-light"
    worn = app.get_css_variables()
    has = {tuple(STANDARD_PALETTE[number]) for number in range(16)}
    for name in ("primary", "secondary", "accent", "success", "warning", "error", "muted"):
        assert Color.parse(worn[f"text-{name}"]).rgb in has, "drawn as it is meant, not as the nearest grey"


def test_a_theme_is_chosen_by_key_and_kept(tmp_path: Path) -> None:
    kept: list[str] = []
    services = given(services_that(Asked()), keep_theme=kept.append)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("T", *"high-contrast-l")
        await until(pilot, lambda: "high-contrast-light" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: kept == ["high-contrast-light"])
        assert app.theme == "high-contrast-light"

    play(story, tmp_path, services=services)


def test_the_palette_offers_every_place(tmp_path: Path) -> None:
    app = studio(tmp_path)

    async def run() -> None:
        async with app.run_test(size=NARROW) as pilot:
            commands = {command.title: command for command in app.get_system_commands(app.screen)}
            await pilot.pause()
            assert {"Guided set-up", "Runs", "Audits", "Theme", "Help"} <= commands.keys()
            assert {"Edit", "Run", "LoRA/QLoRA", "Card", "Save", "Open"} <= commands.keys(), (
                "every action of the screen"
            )
            assert commands["Save"].help == "s   Save the recipe."
            assert len(commands) == len(list(app.get_system_commands(app.screen))), "each of them once"
            commands["Audits"].callback()
            await pilot.pause()
            assert isinstance(app.screen, AuditScreen)
            app.on_show_runs()
            await settle(pilot)
            commands = {command.title: command for command in app.get_system_commands(app.screen)}
            assert commands["Merge"].help == "There is no run to do that with.", "what cannot be done says why"
            await pilot.press("ctrl+p", *"open a rec")
            await until(pilot, lambda: "Files, runs and shipped" in shown(app))
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.screen, OpenScreen))
            assert [type(screen).__name__ for screen in app.screen_stack] == ["ConfigureScreen", "OpenScreen"]

    asyncio.run(run())


def test_what_a_screen_is_about_goes_to_the_clipboard_of_the_terminal(
    with_a_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STY", raising=False)
    sent: list[str] = []

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert app._driver is not None
        monkeypatch.setattr(app._driver, "write", sent.append)
        monkeypatch.delenv("TMUX", raising=False)
        await pilot.press("y")
        await until(pilot, lambda: "Sent to the terminal's clipboard: the recipe, as TOML." in shown(app))
        assert sent == [f"\x1b]52;c;{b64encode(dump_recipe(Recipe(name='try')).encode()).decode()}\a"]
        monkeypatch.setenv("TMUX", "tmux,1,0")
        await pilot.press("o")
        await until(pilot, lambda: "59/100" in shown(app) or "29/100" in shown(app))
        await pilot.press("y")
        await until(pilot, lambda: "set-clipboard" in shown(app))
        assert RunPaths(Path(app.clipboard)).exists, "the place of the run under the cursor"

    play(story, with_a_run)


@pytest.mark.parametrize(("connection", "level", "pace"), [("1.2.3.4 5 6.7.8.9 22", "none", 1.0), ("", "full", 0.5)])
def test_over_ssh_nothing_moves_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connection: str, level: str, pace: float
) -> None:
    seen: list[StudioApp] = []
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path))

    def run(app: StudioApp) -> None:
        seen.append(app)

    monkeypatch.setattr(app_module.StudioApp, "run", run)
    monkeypatch.delenv("SSH_CONNECTION", raising=False)
    if connection:
        monkeypatch.setenv("SSH_CONNECTION", connection)
    run_studio(Recipe(), runs_root=tmp_path / "runs")
    assert seen[0].animation_level == level
    assert seen[0]._poll_seconds == pace


def test_no_key_is_a_prefix_of_a_multiplexer_or_holds_the_line() -> None:
    """ctrl+b is tmux's own and ctrl+a screen's; ctrl+s and ctrl+q stop and start a line; ctrl+z leaves the program."""
    for package in (tui, widgets):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    kinds: list[type[DOMNode]] = [DOMNode]
    seen: set[tuple[str, str]] = set()
    while kinds:
        kind = kinds.pop()
        kinds += kind.__subclasses__()
        if kind.__module__.startswith(("studio.", "widgets.")):
            seen |= {(key, binding.action) for key, binding in BindingsMap(kind.__dict__.get("BINDINGS", []))}
    assert ("ctrl+r", "turn_base") in seen
    taken = {"ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q", "ctrl+z"}
    assert [pair for pair in sorted(seen) if pair[0] in taken] == [("ctrl+q", "quit")], "which is q's, where q is typed"


@pytest.mark.slow
def test_an_idle_screen_writes_nothing(with_a_run: Path) -> None:
    app = studio(with_a_run)
    drawn: list[object] = []

    async def run() -> None:
        async with app.run_test(size=(120, 40)) as pilot:
            for keys in ((), ("o",), ("enter",)):
                await pilot.press(*keys)
                await settle(pilot)
                app._display, before = lambda *shown: drawn.append(shown), app._display  # type: ignore[method-assign]
                for _ in range(100):  # what the keys began may take long on a busy machine
                    drawn.clear()
                    await pilot.pause(0.5)
                    if not drawn:
                        break
                await settle(pilot)
                await pilot.pause(0.3)
                assert drawn == [], f"{app.screen} repaints although nothing has changed"
                app._display = before  # type: ignore[method-assign]

    asyncio.run(run())


def test_no_text_is_weighted_by_a_colour_that_turns_white() -> None:
    """`$text-muted` is a share of black or white: a style sheet draws it so, a text in full, brighter than all else."""
    for path in (CHECKOUT / "studio" / "tui").rglob("*.py"):
        assert not re.search(r'"\$text-muted[^"]*"', path.read_text("utf-8")), path.name
