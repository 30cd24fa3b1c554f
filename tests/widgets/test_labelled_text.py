"""A label beside a text that wraps."""

import asyncio

from textual.app import App, ComposeResult

from widgets.labelled_text import LabelledText


def test_the_text_wraps_in_its_own_column_and_is_never_markup() -> None:
    class Shown(App[None]):
        def compose(self) -> ComposeResult:
            yield LabelledText("name", "[red]one two three four", label_width=8)

    async def run() -> None:
        app = Shown()
        async with app.run_test(size=(20, 5)) as pilot:
            field = app.query_one(LabelledText)
            rows = ["".join(part.text for part in strip) for strip in app.screen._compositor.render_strips()]
            assert rows[0].startswith("name    [red]one two")
            assert rows[1].startswith("        three four")
            assert field.size.height == 2
            field.update("short")
            await pilot.pause()
            assert field.size.height == 1

    asyncio.run(run())
