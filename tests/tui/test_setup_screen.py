"""The guided set-up: answers, the way back, what is refused, and what comes out."""

import json
import re
import struct
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import OptionList

from studio.core.columns import Pairs
from studio.core.errors import BadInput
from studio.core.gpu_catalogue import find_gpu
from studio.core.recipe import EMBEDDED
from studio.core.recommendation import DataFacts, recommend
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.probe.cards import Card
from studio.probe.data.opened import Progress
from studio.probe.local_models import Listed
from studio.probe.machine import Machine
from studio.probe.plan import device_from_catalogue
from studio.probe.setup import Answers, DataChecked, check_data
from studio.tui.app import StudioApp
from studio.tui.model_fits import fits_of
from studio.tui.panels.data_text import EXAMPLE_ROWS
from studio.tui.panels.setup_step import SetupStep
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.run import RunScreen
from studio.tui.screens.setup import SetupScreen
from studio.tui.services import Services
from studio.tui.setup_texts import data_text
from studio.tui.told import Abandoned, ReadingTold
from tests.pictures.drawn import rows_of
from tests.pictures.findings import EMPTY, empty_share
from tests.tui.stories import (
    BOTH,
    EIGHT_B,
    HOSTILE,
    NARROW,
    WIDE,
    Asked,
    Story,
    assert_harmless,
    given,
    make_run,
    services_that,
    settle,
    shown,
    until,
)

GIB = 2**30
CARD = Card(0, "NVIDIA GeForce RTX 3060", total_bytes=12 * GIB, free_bytes=11 * GIB, capability=(8, 6))


@dataclass
class Told:
    """What the set-up kept and asked."""

    kept: list[Answers] = field(default_factory=list)
    searched: list[str] = field(default_factory=list)


def finding(
    told: Told,
    services: Services | None = None,
    *,
    recalled: Answers | None = None,
    cards: list[Card] | None = None,
    files: tuple[Path, ...] = (),
    hub: tuple[str, ...] | str = (),
) -> Services:
    """Services that look at data files for real and at nothing else."""

    def shape(base: str, _: str) -> ModelShape:
        if "missing" in base:
            raise BadInput(f"There is no model {base}.")
        return shape_from_config(EIGHT_B)

    def search(words: str) -> list[str]:
        told.searched.append(words)
        if isinstance(hub, str):
            raise BadInput(hub)
        return list(hub)

    def check(word: str, base: str, columns: Pairs, progress: Progress | None) -> DataChecked:
        return check_data(word, "no tokenizer here", columns, progress)

    def recommended(answers: Answers, model: ModelShape, data: DataFacts) -> object:
        gpu = find_gpu(answers.card) if answers.card else None
        return recommend(answers.goal, answers.base, model, data, gpu=gpu)

    return given(
        services or services_that(Asked()),
        machine=lambda root: Machine(cards, "555.1", 32 * GIB, 20 * GIB, 100 * GIB, 8, "Linux", spills=False),
        models=lambda: [Listed(EMBEDDED, "embedded", GIB), Listed("owner/missing", "hub", problem="it is damaged")],
        search_hub=search,
        shape=shape,
        data_files=lambda: list(files),
        check_data=check,
        recommend=recommended,
        recall_answers=lambda: told.kept[-1] if told.kept else recalled or Answers(),
        keep_answers=told.kept.append,
    )


def play_setup(story: Story, root: Path, services: Services, *, size: tuple[int, int] = WIDE) -> StudioApp:
    """Play a story on a studio that begins with the set-up."""
    import asyncio

    from studio.core.recipe import Recipe

    app = StudioApp(
        Recipe(name="before"),
        runs_root=root / "runs",
        setup=True,
        services=services,
        poll_seconds=3600,
    )

    async def run() -> None:
        async with app.run_test(size=size, notifications=True) as pilot:
            await until(pilot, lambda: isinstance(app.screen, SetupScreen) and "20.0 free" in shown(app))
            await story(pilot, app)

    asyncio.run(run())
    return app


def step_of(app: StudioApp) -> str:
    assert isinstance(app.screen, SetupScreen)
    return app.screen.step


async def through(pilot: Pilot[None], app: StudioApp, *steps: str) -> None:
    """Take the option under the cursor until each step has come."""
    for step in steps:
        await pilot.press("enter")
        await until(pilot, lambda step=step: step_of(app) == step)
    await settle(pilot)


@BOTH
def test_enter_alone_leads_from_the_machine_to_a_launched_run(tmp_path: Path, size: tuple[int, int]) -> None:
    asked, told = Asked(), Told()
    services = services_that(asked, makes=lambda: make_run(tmp_path, "made"))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert "RTX 3060" in shown(app)
        assert "555.1" in shown(app)
        assert "List/text" not in shown(app), "there is no line of text to change to"
        await through(pilot, app, "model")
        await until(pilot, lambda: "8.03 B parameters" in shown(app) and "tab List/text" in shown(app))
        await through(pilot, app, "data")
        await until(pilot, lambda: "591 rows" in shown(app))
        await through(pilot, app, "goal")
        assert "baseline that a fine-tune has to" in " ".join(shown(app).split())
        await through(pilot, app, "recipe")
        await until(pilot, lambda: "Start training now" in shown(app))
        assert "Method" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert [recipe.name for recipe in asked.started] == ["task"]
        assert told.kept[-1].done

    play_setup(story, tmp_path, finding(told, services, cards=[CARD]), size=size)


@pytest.mark.slow
def test_on_a_small_screen_the_reasons_use_its_width_and_can_be_scrolled_by_keys(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data", "goal", "recipe")
        await until(pilot, lambda: "Start training now" in shown(app))
        assert "Held out" not in shown(app), "there is more than fits"
        await pilot.press("tab", "end")
        await until(pilot, lambda: "Held out" in shown(app))
        assert max(len(row.rstrip()) for row in shown(app).splitlines()[5:-1]) > 60
        await pilot.press("tab", "enter")
        await until(pilot, lambda: not isinstance(app.screen, SetupScreen))

    services = services_that(Asked(), makes=lambda: make_run(tmp_path, "made"))
    play_setup(story, tmp_path, finding(Told(), services, cards=[CARD]), size=NARROW)


@pytest.mark.slow
def test_every_step_goes_back_and_no_answer_is_lost(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n' * 30)
    told = Told()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        await pilot.press("down")
        await until(pilot, lambda: "30 rows" in shown(app))
        await through(pilot, app, "goal")
        await pilot.press("down", "down")
        await settle(pilot)
        assert "Retrieval fits facts better" in shown(app)
        await through(pilot, app, "recipe")
        for step in ("goal", "data", "model", "machine"):
            await pilot.press("escape")
            await until(pilot, lambda step=step: step_of(app) == step)
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(app.screen, ConfigureScreen))
        assert (told.kept[-1].data, told.kept[-1].goal) == (str(data), "facts")
        await pilot.press("S")
        await until(pilot, lambda: isinstance(app.screen, SetupScreen))
        await through(pilot, app, "model", "data")
        await until(pilot, lambda: "30 rows" in shown(app))
        await through(pilot, app, "goal")
        assert "Retrieval fits facts better" in shown(app)

    play_setup(story, tmp_path, finding(told, files=(data,)))


def test_an_interrupted_set_up_goes_on_where_it_was(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert step_of(app) == "goal"

    recalled = Answers(goal="facts", step="goal")
    told = Told()

    import asyncio

    from studio.core.recipe import Recipe

    app = StudioApp(
        Recipe(), runs_root=tmp_path, setup=True, services=finding(told, recalled=recalled), poll_seconds=3600
    )

    async def run() -> None:
        async with app.run_test(size=WIDE) as pilot:
            await until(pilot, lambda: isinstance(app.screen, SetupScreen))
            await story(pilot, app)

    asyncio.run(run())


def test_another_card_is_planned_for_and_taken_to_the_configure_screen(tmp_path: Path) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("down", "enter")
        await settle(pilot)
        await pilot.press(*"4090", "enter")
        await until(pilot, lambda: step_of(app) == "model")
        await through(pilot, app, "data", "goal", "recipe")
        await until(pilot, lambda: "planned for RTX 4090" in " ".join(shown(app).split()))
        assert "fits" in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: isinstance(app.screen, ConfigureScreen))
        assert isinstance(app.screen, ConfigureScreen)
        assert app.screen.recipe.method == "lora"
        assert asked.planned == ["RTX 4090"]
        await pilot.press("u")
        await settle(pilot)
        assert app.screen.recipe.name == "before"

    play_setup(story, tmp_path, finding(Told(), services_that(asked)))


def _empty_share(app: StudioApp) -> float:
    return empty_share(rows_of(app.screen._compositor.render_strips()), app.size.width)


def test_known_models_are_offered_by_whether_the_card_trains_them(tmp_path: Path) -> None:
    told = Told()
    services = given(
        finding(told, recalled=Answers(card="RTX 4090")),
        known_fits=lambda card: fits_of(device_from_catalogue(find_gpu(card))) if card else None,
    )

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "What RTX 4090 trains, of 24.0 GiB" in shown(app))
        rungs = [line.partition(" B  ")[2] for line in shown(app).splitlines() if " B  " in line]
        ladder = {rung.split()[0]: rung for rung in rungs}
        assert ladder["Llama-3.1-8B"].count("✓") == 2
        assert (ladder["phi-4"].count("✗"), ladder["phi-4"].count("✓")) == (1, 1), "14 B in 4 bits only"
        await through(pilot, app, "model")
        await until(pilot, lambda: "FITS RTX 4090" in shown(app) and "16.8 GiB" in shown(app))
        bars = [line for line in shown(app).splitlines() if "GiB  █" in line]
        assert [("LoRA 16-bit   16.8" in bars[0], "QLoRA 4-bit" in bars[1])] == [(True, True)]
        assert bars[0].count("█") > 2 * bars[1].count("█"), "16 bits take more of the card than 4"
        for size in ((200, 60), WIDE):
            await pilot.resize_terminal(*size)
            await until(
                pilot, lambda: empty_share(rows_of(app.screen._compositor.render_strips()), app.size.width) <= EMPTY
            )
        larger = [float(line) for line in re.findall(r" (?:[248]|16) \d{3} +([0-9.]+) [✓~✗]", shown(app))]
        assert 16.8 < larger[0] < larger[1] < larger[2] < larger[3], "longer rows take more"
        await pilot.press("end")
        await until(pilot, lambda: "LARGER THAN RTX 4090" in shown(app) and "Qwen3-235B-A22B" in shown(app))
        await pilot.press("home", "down")
        listed = app.screen.query_one("#step-model OptionList", OptionList)
        await pilot.press("down")
        await until(pilot, lambda: app.screen.query_one("#step-model", SetupStep).lit.startswith("HuggingFaceTB/"))
        assert listed.highlighted == 3, "a heading is passed over"
        await pilot.press("enter")
        await until(pilot, lambda: step_of(app) == "data")
        assert told.kept[-1].base == "HuggingFaceTB/SmolLM2-135M-Instruct"

    play_setup(story, tmp_path, services)


def test_a_model_that_cannot_be_used_holds_the_step(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        await pilot.press("down", "enter")
        await until(pilot, lambda: "There is no model owner/missing" in shown(app))
        assert step_of(app) == "model"

    play_setup(story, tmp_path, finding(Told()))


def test_words_search_the_hub_and_its_answers_can_be_chosen(tmp_path: Path) -> None:
    told = Told()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        await pilot.press("tab", "enter", *"small qwen", "enter")
        await until(pilot, lambda: "2 found on the hub" in shown(app) or "Qwen/small" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: step_of(app) == "data")
        assert told.searched == ["small qwen"]
        assert told.kept[-1].base == "Qwen/small"

    play_setup(story, tmp_path, finding(told, hub=("Qwen/small", HOSTILE)))


@pytest.mark.slow
def test_the_reasons_wrap_anew_when_the_terminal_changes(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data", "goal", "recipe")
        await until(pilot, lambda: "Start training now" in shown(app))

        async def reasons(columns: int) -> list[str]:
            await pilot.resize_terminal(columns, 90)
            await pilot.pause()
            await pilot.pause()
            rows = [row.rstrip() for row in shown(app).splitlines()]
            return rows[next(place for place, row in enumerate(rows) if row.startswith(" Method")) : -1]

        wide, narrow = await reasons(99), await reasons(80)
        assert max(map(len, wide)) > 80
        flush = [[row for row in rows if row.strip() and row[1] != " "] for rows in (wide, narrow)]
        assert flush[0] == flush[1], "the labels stand before the reasons, and nothing else"
        assert " ".join(" ".join(wide).split()) == " ".join(" ".join(narrow).split())
        assert await reasons(99) == wide

    play_setup(story, tmp_path, finding(Told()), size=(120, 90))


def test_long_paths_in_the_lists_show_their_names_at_any_width(tmp_path: Path) -> None:
    file = tmp_path / "a-folder-with-a-long-name-that-fills-most-of-a-row" / "another-one-below-it" / "the-rows.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    model = str(file.parent / "the-model")
    services = given(finding(Told(), files=(file,)), models=lambda: [Listed(model, "folder", GIB)])

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        async def rows(name: str) -> list[str]:
            await pilot.pause()
            await pilot.pause()
            return [row for row in shown(app).splitlines() if name in row]

        await through(pilot, app, "model")
        row = (await rows("the-model  1.0 GiB"))[0]
        assert row.startswith(" …/")
        step = app.screen.query_one("#step-model OptionList", OptionList)
        assert step.size.height == 1, "in one row"
        await pilot.resize_terminal(500, 40)
        assert model in (await rows("the-model  1.0 GiB"))[0]
        await pilot.resize_terminal(40, 24)
        assert (await rows("…/the-model  1.0 GiB"))[0]
        assert step.size.height == 1
        await pilot.resize_terminal(80, 24)
        await through(pilot, app, "data")
        assert (await rows("/the-rows.jsonl"))[0].startswith(" …/")

    play_setup(story, tmp_path, services, size=NARROW)


def test_without_a_line_the_search_says_so_and_offers_what_can_be_planned_without_one(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        await pilot.press("tab", "enter", *"no such", "enter")
        await until(pilot, lambda: "cannot be asked" in shown(app))
        assert step_of(app) == "model"
        await pilot.press("escape")
        await until(pilot, lambda: step_of(app) == "machine")
        await through(pilot, app, "model")
        assert "no such" in shown(app), "what was typed stays in its line"
        await pilot.press("tab", "enter", *["backspace"] * 7, *"llama 3.2", "enter")
        await until(pilot, lambda: "meta-llama/Llama-3.2-1B-Instruct  on the hub, gated" in shown(app))

    play_setup(story, tmp_path, finding(Told(), hub="The hub cannot be asked (no line)."))


def test_bad_rows_are_named_and_hold_the_step(tmp_path: Path) -> None:
    bad = tmp_path / f"bad{MARK}.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n' + json.dumps({"prompt": HOSTILE}) + "\nno json \x1b[31m\n")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        await pilot.press("down", "enter")
        await until(pilot, lambda: "Correct the file" in shown(app))
        assert step_of(app) == "data"
        assert_harmless(app)

    play_setup(story, tmp_path, finding(Told(), files=(bad,)))


@pytest.mark.parametrize("kind", EXAMPLE_ROWS)
def test_rows_are_read_as_the_set_up_shows_them(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "rows.jsonl"
    words = (f"word {number} " * number for number in count(1))
    rows = [re.sub(r"\.\.\.", lambda _: next(words), EXAMPLE_ROWS[kind]) for _ in range(2)]
    file.write_text("".join(f"{row}\n" for row in rows))
    checked = check_data(str(file), "no tokenizer here")
    assert checked.sound, checked.data.findings
    assert sum(checked.counts) == (4 if checked.facts.pairs else 2)
    assert checked.facts.text is (kind == "Plain text")
    assert checked.facts.pairs is ("better" in kind)


MARK = "[b]x[@click=app.quit]"


def test_what_is_not_used_is_told_as_the_check_tells_it_and_tokens_all_without_the_chat_template(
    tmp_path: Path,
) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": "a", "completion": "b", "id": 1}, {"prompt": "a", "completion": ""}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    checked = check_data(str(path), "no/such-model")
    text = data_text(replace(checked, facts=DataFacts(str(path), 1, 400, 300))).plain
    assert all(f"note  {note}\n" in text for note in checked.data.notes())
    assert "rows.jsonl: columns not used: id." in text
    assert "400 tokens of text, the longest row 300; what a chat template adds to each is not counted" in text
    path.write_text(json.dumps(rows[0] | {"label": False}))
    text = data_text(check_data(str(path), "no/such-model")).plain
    assert "error  row 1: found false beside an answer" in text
    path.write_text("".join(json.dumps(rows[0] | {"images": ["a.png"]}) + "\n" for _ in range(3)))
    text = data_text(check_data(str(path), "no/such-model")).plain
    assert "3 rows must be corrected: 3 x media" in text
    assert "error  row 1: found the column images; pictures, sound and films are not read here" in text
    assert "a limit of this program" in text
    assert "remove the column\n" in text


def test_hostile_answers_of_an_earlier_visit_stay_harmless(tmp_path: Path) -> None:
    recalled = replace(Answers(), base=HOSTILE, data=f"{HOSTILE}.jsonl", card="")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model", "data")
        await settle(pilot)
        await until(pilot, lambda: "does not exist" in shown(app))
        assert_harmless(app)

    play_setup(story, tmp_path, finding(Told(), recalled=recalled))


def test_a_home_that_cannot_be_written_is_told_and_goes_on(tmp_path: Path) -> None:
    def refuse(answers: Answers) -> None:
        raise PermissionError(13, "Permission denied")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await through(pilot, app, "model")
        assert "cannot be kept" in shown(app)

    play_setup(story, tmp_path, given(finding(Told()), keep_answers=refuse))


def test_a_base_that_is_quantised_already_holds_the_models_step(tmp_path: Path) -> None:
    config = {**EIGHT_B, "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(BadInput, match="already quantised"):
        Services().shape(str(tmp_path), "")


def test_reading_tells_how_far_it_is_and_ends_when_nobody_waits() -> None:
    now, over, shown = [0.0], [False], list[str]()
    told = ReadingTold(shown.append, lambda: over[0], lambda: now[0])
    for seconds, done in ((0.5, 10), (1.1, 20), (1.2, 30), (1.7, 40)):
        now[0] = seconds
        told(done, 80)
    assert shown == ["Reading the data: 25 %", "Reading the data: 50 %"]
    over[0] = True
    with pytest.raises(Abandoned):
        told(50, 80)
