"""Any text in data, names, logs, samples and notes: no crash, no broken row, nothing raw for the terminal."""

import asyncio
import unicodedata
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from studio.core.events import Failed, Phase, Planned, Sampled, Saved, Started, Warned
from studio.core.gpu_catalogue import GIB
from studio.core.recipe import Recipe
from studio.probe.data import Conversation, DataSet, Finding, Message
from studio.probe.local_models import Listed
from studio.probe.setup import DataChecked
from studio.runs.history import History
from studio.runs.note import write_note
from studio.tui.app import StudioApp
from studio.tui.feed import harmless
from studio.tui.panels.notes import notes_text
from studio.tui.panels.samples import rows_of
from studio.tui.screens.run import RunScreen
from studio.tui.setup_texts import data_text, model_line, refused_text
from tests.fakes.runs import LiveWorker
from tests.tui.stories import NARROW, Asked, assert_harmless, make_run, services_that, settle
from widgets.log_view import LogView

STEERING = [
    "\x1b]52;c;ZXZpbA==\x07",  # OSC 52: the clipboard
    "\x1b]8;;http://evil\x1b\\link\x1b]8;;\x1b\\",  # OSC 8: a link
    "\x1b[6n",  # asks for the cursor's place, answered as if typed
    "\x1b[2J\x1b[1;1H",
    "\x9b31m\x9d0;title\x9c",  # C1
    "\x1b[38;2;1;2",  # unterminated
    "\x1bP$q",
    "\x07\x08\x0b\x0c\x7f\x00",
    "\u202etxet\u202c\u2066",
    "[bold red on blue]", "[/]", "[@click=app.quit]quit[/]", "[link=http://evil]", "\\[", "[[", "]",
    "漢字かな" * 40, "👩‍👩‍👧‍👦" * 20, "é" * 50, "x" * 3000, "\r\rprogress\r", "\ud800",
]  # fmt: skip
HOSTILE = st.lists(st.one_of(st.sampled_from(STEERING), st.text(max_size=40)), min_size=1, max_size=4).map("".join)
SLOWLY = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])


def raw(text: str) -> set[str]:
    """The characters of a text that steer a terminal or reorder what is read."""
    return {
        character
        for character in text
        if (unicodedata.category(character) in ("Cc", "Cs") and character not in "\n\t") or character in "\u202e\u2066"
    }


def screen_of(app: StudioApp, width: int) -> None:
    """Every row is as wide as the screen and holds nothing raw."""
    assert_harmless(app)
    for strip in app.screen._compositor.render_strips():
        assert cell_len("".join(segment.text for segment in strip)) == width


@SLOWLY
@given(HOSTILE)
def test_texts_of_a_run_are_harmless(text: str) -> None:
    history = History()
    history.fold(
        [
            Started(at=1.0, job="train", method=text, model=text),
            Warned(at=1.0, message=text, topic=text),
            Saved(at=1.0, what=text, path=text, step=1),
            Planned(
                at=1.0,
                total_steps=9,
                trainable_parameters=1,
                rows=9,
                held_out_rows=1,
                device=text,
                dtype=text,
                loss_path=text,
                left_out={text: 3, "no_answer": text},  # type: ignore[dict-item]
            ),
        ]
    )
    assert not raw(notes_text(history).plain)
    assert not raw("".join(harmless(text))) and all("\n" not in line for line in harmless(text))
    sampled = Sampled(at=1.0, step=0, index=0, prompt=text, answer=text, expected=text)
    for widget in rows_of([sampled]):
        content = getattr(widget, "content", None)
        assert content is None or not raw(str(content))


@SLOWLY
@given(HOSTILE)
def test_texts_of_the_set_up_are_harmless(text: str) -> None:
    row = Conversation((Message("user", text), Message("assistant", text)), 1)
    finding = Finding("kind", 1, text, text, fatal=True)
    data = DataSet(Path("a"), text, (text,), (text,), (row,), (finding,), {"kind": 1}, 1)
    from studio.core.recommendation import DataFacts

    shown = [data_text(DataChecked(data, DataFacts("a", 1, 1, 1))), refused_text(text)]
    shown += [model_line(Listed(text, "folder", GIB, text, text), 70)]
    for content in shown:
        assert not raw(content.plain)
        assert len(content.spans) < 200


@SLOWLY
@given(st.lists(HOSTILE, max_size=5), st.integers(1, 60))
def test_every_row_of_a_log_fits_its_width(texts: list[str], width: int) -> None:
    from widgets.log_view import _wrapped

    for line in (line for text in texts for line in harmless(text)):
        rows = _wrapped(line, width)
        assert "".join(rows) == line
        assert all(cell_len(row) <= max(2, width) for row in rows)


@pytest.mark.parametrize("seed", range(2))
def test_screens_full_of_hostile_text_keep_their_shape(tmp_path: Path, seed: int) -> None:
    text = "".join(STEERING[seed::2])
    short = text[:300].replace("\x00", "")

    async def story(root: Path) -> None:
        paths = make_run(root, "evil", Recipe(name="evil"))
        paths.output.write_bytes((text + "\n" + "".join(STEERING[:6]) + "\n").encode("utf-8", "surrogatepass"))
        write_note(paths, short[:200].encode("utf-8", "replace").decode())
        with LiveWorker(paths) as worker:
            worker.emit(Started, job="train", method=text, model=text)
            worker.emit(Phase, name=text, detail=text)
            worker.emit(Warned, message=text)
            worker.emit(Sampled, step=0, index=0, prompt=text, answer=text, expected=text)
            worker.emit(Failed, failure=text, message=text, advice=text)
        app = StudioApp(Recipe(name=short), runs_root=root / "runs", services=services_that(Asked()), poll_seconds=3600)
        async with app.run_test(size=NARROW) as pilot:
            for keys in ((), ("o",), ("enter",), ("2",), ("3",), ("4",)):
                await pilot.press(*keys)
                await settle(pilot)
                screen_of(app, NARROW[0])
            assert isinstance(app.screen, RunScreen)
            assert app.screen.query_one(LogView).lines

    with TemporaryDirectory() as folder:
        asyncio.run(story(Path(folder)))
