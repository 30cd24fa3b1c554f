"""Cells of a table that were drawn before its columns were measured."""

import asyncio

from rich.text import Text
from textual.app import App, ComposeResult

from widgets.whole_table import WholeTable


class _Tables(App[None]):
    def compose(self) -> ComposeResult:
        yield WholeTable()


def test_rows_that_were_drawn_before_they_were_measured_are_drawn_again() -> None:
    async def run() -> None:
        app = _Tables()
        async with app.run_test(size=(80, 10)) as pilot:
            table = app.query_one(WholeTable)
            column = table.add_column("a", key="a")
            table.columns[column].content_width = 4
            table.add_row(Text("a rather long name"))
            for row in range(table.size.height):
                table.render_line(row)  # as a busy machine does before the table is idle
            await pilot.pause()
            assert "a rather long name" in "".join(table.render_line(row).text for row in range(table.size.height))

    asyncio.run(run())
