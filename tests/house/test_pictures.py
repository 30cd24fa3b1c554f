"""`make pictures`: what it draws is what a terminal shows, it leaves no screen out, and the pages show its pictures."""

import asyncio
import importlib
import pkgutil
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from rich._palettes import STANDARD_PALETTE
from rich.segment import Segment
from rich.style import Style
from textual.screen import Screen

from studio.tui import screens
from tests.house.test_readme import PAGES as PAGES_OF_WORDS
from tests.house.test_readme import ROOT
from tests.pictures.drawn import HIGH, WIDE, Frame, Ground, hexadecimal, moving, rows_of, shape_of, still
from tests.pictures.film import rows_from
from tests.pictures.findings import contrast, empty_share, findings
from tests.pictures.home import Home
from tests.pictures.looks import LOOKS, cells_of, elsewhere, wear
from tests.pictures.shots import PAGES, SHOTS, studio_for

_SVG = "{http://www.w3.org/2000/svg}"
_KINDS_OF_DIALOG = {"Dialog", "Picker", "OfferingScreen"}
"""Classes that other screens are made of; nobody meets them as they are."""


def read(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  we made it


def drawn(*rows: tuple[str, str], columns: int = 20) -> ET.Element:
    lines = [[Segment(text, Style.parse(style))] for text, style in rows]
    return read(still(rows_of(lines), columns, Ground(), "a screen"))


def test_text_stands_in_its_cells() -> None:
    picture = drawn(("  <ab> & 漢c  ", "bold #ff0000"), ("", ""), ("x", "reverse"))
    first, second = picture.iter(f"{_SVG}text")
    assert (first.text, first.get("fill"), first.get("class")) == ("<ab> & 漢c", "#ff0000", "b")
    assert float(first.get("x", "")) == 2 * WIDE
    assert float(first.get("textLength", "")) == pytest.approx(10 * WIDE)
    assert (second.get("x"), second.get("fill")) == ("0", Ground().back)
    assert 2 * HIGH < float(second.get("y", "")) < 3 * HIGH


def test_lines_blocks_and_braille_are_shapes_that_join() -> None:
    picture = drawn(("╭─┬╮│━┃█▌▁░⣿⠁▟", "#00ff00"))
    assert not list(picture.iter(f"{_SVG}text"))
    assert {path.get("fill") for path in picture.iter(f"{_SVG}path")} == {"#00ff00"}
    (dash, _), (dash_on, _) = shape_of("─")
    assert dash(0, 0).startswith("M0 ")
    assert dash_on(0, 0).endswith(f"h{-WIDE / 2 - 0.6:g}z")
    assert [opacity for _, opacity in shape_of("░")] == [0.25]
    assert len(shape_of("⣿")) == 8
    assert len(shape_of("▟")) == 3
    assert not shape_of("a")


def test_a_film_keeps_each_row_once_and_shows_every_screen_for_its_time() -> None:
    screens_seen = [
        rows_from(text) for text in ("\x1b[31mone\x1b[0m\nsame", "two\nsame", "\x1b[31mone\x1b[0m\nsame\nmore")
    ]
    frames = [Frame(rows, 1.0, f"at {place}") for place, rows in enumerate(screens_seen)]
    film = read(moving(frames, 20, Ground(), "a film"))
    texts = [text.text for text in film.iter(f"{_SVG}text")]
    assert texts.count("same") == 1
    assert [text for text in texts if text in ("one", "two", "more")] == ["one", "two", "more"]
    shown = [(each.get("values"), each.get("keyTimes")) for each in film.iter(f"{_SVG}animate")]
    assert ("visible;hidden", "0;0.33333") in shown  # the first title
    assert ("visible;hidden;visible", "0;0.33333;0.66667") in shown  # the first row, which comes again
    assert ("hidden;visible;hidden", "0;0.33333;0.66667") in shown
    assert ("hidden;visible", "0;0.66667") in shown


def test_what_is_hard_to_read_or_left_empty_is_found() -> None:
    assert contrast(Style.parse("#ffffff on #000000"), Ground()) == pytest.approx(21)
    assert contrast(Style.parse("#777777 on #777777"), Ground()) == 1
    full = rows_of([[Segment("text " * 4, Style.parse("#ffffff"))]] * 4)
    assert findings(full, 20, Ground()) == []
    faint = rows_of([[Segment("x" * 20, Style.parse("#333333"))]] * 4)
    assert "faint" in findings(faint, 20, Ground())[0]
    holed = rows_of([[Segment("left" + " " * 16, Style())]] * 3 + [[Segment("x" * 20, Style())]])
    assert empty_share(holed, 20) == pytest.approx(16 * 3 / 80)
    assert "60%" in findings(holed, 20, Ground())[0]


def test_a_screen_has_the_colours_of_its_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path))
    shot = next(shot for shot in SHOTS if shot.name == "runs-empty")
    app = studio_for(shot, Home(tmp_path))
    chosen = [look for look in LOOKS if look.name in ("dark", "sixteen", "no-color")]
    colours: dict[str, set[str]] = {}

    async def run() -> None:
        async with app.run_test(size=(80, 24)) as pilot:
            for look in chosen:
                await wear(pilot, app, look)
                app.refresh_css(animate=False)  # at once, however busy the machine is
                parts = [part for row in cells_of(app, look) for part in row]
                colours[look.name] = {each for _, style in parts for each in hexadecimal(style, look.ground)}

    asyncio.run(run())
    assert len({frozenset(found) for found in colours.values()}) == len(chosen)
    assert colours["sixteen"] <= {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in STANDARD_PALETTE._colors}
    assert all(each[1:3] == each[3:5] == each[5:7] for each in colours["no-color"])


def test_no_folder_of_this_machine_is_pictured() -> None:
    home = Path("/somewhere/on/this/machine")
    rows = rows_of([[Segment(f"in {home}/runs "), Segment("next")]])
    ((first, _), (second, _)) = elsewhere(rows, home)[0]
    assert first.rstrip() == "in ~/lora-studio/runs"
    assert (len(first), second) == (len(rows[0][0][0]), "next")


def test_every_screen_is_pictured() -> None:
    found = set()
    for module in pkgutil.iter_modules(screens.__path__, "studio.tui.screens."):
        for name, each in vars(importlib.import_module(module.name)).items():
            if isinstance(each, type) and issubclass(each, Screen) and each.__module__ == module.name:
                found.add(name)
    assert len(found) > 15
    assert found - _KINDS_OF_DIALOG <= {shot.screen for shot in SHOTS}, "make a shot of it: tests/pictures/shots.py"
    assert len({shot.name for shot in SHOTS}) == len(SHOTS)


def test_the_pages_show_what_is_made_and_nothing_else_lies_there() -> None:
    link = re.compile(r"!\[[^\]]*\]\(([^)]+\.svg)\)")
    shown = {
        (page.parent / place).resolve() for page in PAGES_OF_WORDS for place in link.findall(page.read_text("utf-8"))
    }
    made = {ROOT / "docs" / "pictures" / f"{name}.svg" for name in (*PAGES, "film")}
    assert shown == made
    assert set((ROOT / "docs" / "pictures").iterdir()) == made
    assert {shot.name for shot in SHOTS} >= set(PAGES)
    for picture in made:
        read(picture.read_text("utf-8"))
