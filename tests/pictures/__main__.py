"""Pictures of every screen in every size and look, by one command: `make pictures`.

They lie in build/pictures, with a page that shows them all (index.html) and what a machine finds wrong with them
(findings.txt); those that README and docs/ show are renewed.
`python -m tests.pictures [NAME ...] [--size 80x24] [--look light]` makes some. Runs are made first, by real processes,
and kept in build/pictures/home.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path

from textual.pilot import Pilot

from studio.runs.home import HOME_VARIABLE
from studio.tui.app import StudioApp
from tests.pictures.drawn import still
from tests.pictures.findings import findings
from tests.pictures.home import Home
from tests.pictures.looks import LOOKS, SIZES, Look, cells_of, elsewhere, wear
from tests.pictures.shots import PAGES, SHOTS, Shot, studio_for

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "build" / "pictures"
DOCS = ROOT / "docs" / "pictures"
_PATIENCE_SECONDS = 300.0
_STEADY_SECONDS = 3.0
_NAMES = {" ": "space", "-": "minus", "/": "slash"}
"""What Textual calls the keys of these characters."""


async def take(shot: Shot, home: Home, sizes: Sequence[tuple[int, int]], looks: Sequence[Look], out: Path) -> list[str]:
    """Take the pictures of a shot; return what was found wrong with them."""
    app, found = studio_for(shot, home), []
    async with app.run_test(size=sizes[0], notifications=True) as pilot:
        for key, seen in shot.steps:
            await _press(pilot, key)
            await _until(pilot, app, seen, shot.name)
        if (screen := type(app.screen).__name__) != shot.screen:
            raise AssertionError(f"{shot.name} is to show a {shot.screen}; a {screen} is shown")
        for look in looks:
            await wear(pilot, app, look)
            for columns, rows in sizes:
                await pilot.resize_terminal(columns, rows)
                await steady(pilot, app, look)
                file = out / f"{columns}x{rows}" / look.name / f"{shot.name}.svg"
                file.parent.mkdir(parents=True, exist_ok=True)
                cells = elsewhere(cells_of(app, look), home.folder)
                file.write_text(picture := still(cells, columns, look.ground, shot.words), "utf-8")
                found += [f"{file.relative_to(out)}: {words}" for words in findings(cells, columns, look.ground)]
                if shot.name in PAGES and (columns, rows, look) == (*SIZES[0], LOOKS[0]) and out == OUT:
                    (DOCS / file.name).write_text(picture, "utf-8")
    return found


async def steady(pilot: Pilot[None], app: StudioApp, look: Look) -> None:
    """Wait until the screen stands still; where something moves all the time, for some seconds only."""
    before, end = None, time.monotonic() + _STEADY_SECONDS
    while time.monotonic() < end:
        await pilot.pause(0.1)
        if (now := cells_of(app, look)) == before:
            return
        before = now


async def _press(pilot: Pilot[None], key: str) -> None:
    keys = key.removeprefix("type:") if key.startswith("type:") else [key] * bool(key)
    await pilot.press(*(_NAMES.get(each, each) for each in keys))


async def _until(pilot: Pilot[None], app: StudioApp, seen: str, name: str) -> None:
    end = time.monotonic() + _PATIENCE_SECONDS
    while True:
        await pilot.pause(0.2)
        text = "\n".join("".join(part for part, _ in row) for row in cells_of(app, LOOKS[0]))
        if seen in text:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"{name}: never saw {seen!r}; the screen is:\n{text}")


def _index(out: Path, sizes: Sequence[tuple[int, int]], looks: Sequence[Look]) -> None:
    """Write a page with all pictures, one row a screen."""
    rows = [
        f"<h2>{shot.name}: {shot.words}</h2>"
        + "".join(
            f'<a href="{columns}x{lines}/{look.name}/{shot.name}.svg"><img loading="lazy" width="{4 * columns}" '
            f'src="{columns}x{lines}/{look.name}/{shot.name}.svg" title="{columns}x{lines} {look.name}"></a>'
            for columns, lines in sizes
            for look in looks
            if (out / f"{columns}x{lines}/{look.name}/{shot.name}.svg").exists()
        )
        for shot in SHOTS
    ]
    (out / "index.html").write_text(
        f"<!doctype html><meta charset=utf-8><title>Pictures</title>{''.join(rows)}", "utf-8"
    )


def main(words: Sequence[str]) -> int:
    """Take the pictures that are asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m tests.pictures", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="screens (default: all)")
    parser.add_argument("--size", action="append", choices=[f"{wide}x{high}" for wide, high in SIZES])
    parser.add_argument("--look", action="append", choices=[look.name for look in LOOKS])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--home", type=Path, default=OUT / "home")
    args = parser.parse_args(words)
    shots = [shot for shot in SHOTS if not args.names or shot.name in args.names]
    sizes = [size for size in SIZES if not args.size or f"{size[0]}x{size[1]}" in args.size]
    looks = [look for look in LOOKS if not args.look or look.name in args.look]
    home = Home(args.home.absolute())
    home.make()
    # Textual gives a screen half a minute, which is too short where the machine is busy with other work.
    Pilot._wait_for_screen = partialmethod(Pilot._wait_for_screen, timeout=_PATIENCE_SECONDS)  # type: ignore[assignment]
    os.environ[HOME_VARIABLE] = str(home.folder)
    os.environ["HF_HUB_OFFLINE"] = "1"  # what the hub says today must not change a picture
    failed, found = [], []
    for live in (True, False):
        chosen = [shot for shot in shots if shot.live is live]
        with home.live() if live and chosen else nullcontext():
            for shot in chosen:
                began = time.monotonic()
                try:
                    found += asyncio.run(take(shot, home, sizes, looks, args.out))
                except (TimeoutError, AssertionError) as error:
                    failed.append(shot.name)
                    print(f"{shot.name}: {error}", file=sys.stderr, flush=True)
                print(f"{shot.name:18} {time.monotonic() - began:5.1f} s", flush=True)
    _index(args.out, SIZES, LOOKS)
    (args.out / "findings.txt").write_text("".join(f"{line}\n" for line in found), "utf-8")
    print(f"{args.out / 'index.html'} shows them; findings.txt beside it: {len(found)} things to look at")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
