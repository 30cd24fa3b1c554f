"""The recipe under the user's hands: every field, the checks, and the launch."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from textual.pilot import Pilot

from studio.core.layer_count import LayerCount
from studio.core.recipe import FIELDS, SECTIONS, Recipe
from studio.core.value_kinds import Number
from studio.tui.app import StudioApp
from studio.tui.panels.recipe_form import ESSENTIALS, changed_paths, changed_words, notes_of, options_of
from studio.tui.screens.configure import ConfigureScreen
from studio.tui.screens.find_field import FindScreen, found
from studio.tui.screens.run import RunScreen
from tests.tui.stories import (
    BOTH,
    HOSTILE,
    NARROW,
    Asked,
    assert_harmless,
    make_run,
    play,
    services_that,
    settle,
    shown,
    until,
)
from widgets.choice import Choice
from widgets.fold import Fold
from widgets.slider import Slider
from widgets.text_field import TextField, TextLine


def screen_of(app: StudioApp) -> ConfigureScreen:
    assert isinstance(app.screen, ConfigureScreen)
    return app.screen


def test_every_field_of_a_recipe_is_on_the_form_once_and_explained() -> None:
    paths = [path for _, section in SECTIONS for path in section]
    assert sorted(paths) == sorted(FIELDS)
    for field in FIELDS.values():
        assert field.label
        assert len(field.label) < 18, "labels line up"
        assert field.help.endswith(".")
        assert bool(field.cost) == isinstance(field.kind, (Number, LayerCount))
    assert options_of("train.steps") == ()
    layers = [value for value, _ in options_of("train.recompute")]
    assert (layers[0], layers[-2:]) == ("none", ["all", "auto"])
    assert all(FIELDS["train.recompute"].kind.read(value) in ("none", "all", "auto") or int(value) for value in layers)


@BOTH
@pytest.mark.parametrize("no_color", [False, True])
def test_the_first_screen(
    tmp_path: Path, size: tuple[int, int], no_color: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await until(pilot, lambda: "a card [b]x[/b]" in shown(app))
        told = shown(app)
        for part in ("lora-studio  Configure", "Base", "embedded", "(•) QLoRA 4-bit", "Rank", "2 x rank", "r Run"):
            assert part in told
        assert "Width of the adapter's low-rank pair" in told, "the focused field is explained"

    play(story, tmp_path, size=size, services=services_that(Asked(), card="a card [b]x[/b]"))


def test_the_essential_fields_are_in_sight_and_the_others_folded_away(tmp_path: Path) -> None:
    recipe = Recipe(name="try").with_("adapter.dropout", 0.1).with_("train.seed", 3)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen, told = screen_of(app), shown(app)
        for path in ESSENTIALS:
            assert f" {FIELDS[path].label} " in told, path
        assert re.search(r"Advanced \(\d\d\)  2 changed from their defaults: Dropout, Seed", told)
        assert "all as by default" in changed_words(changed_paths(Recipe()))
        assert "Targets" not in told
        screen._form.focus_field("train.epochs")
        await pilot.press("down", "enter")
        await until(pilot, lambda: "Targets" in shown(app) and "default 0" in shown(app))
        await until(pilot, lambda: "Everything else that a recipe holds" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "Targets" not in shown(app))
        await pilot.press("slash", *"magnitude")
        await until(pilot, lambda: "⏎ go to it" in shown(app) and "adapter.dora" in shown(app))
        await pilot.press("enter")
        await until(pilot, lambda: "DoRA · adapter.dora" in shown(app) and "(•) off  ( ) on" in shown(app))
        await pilot.press("space")
        await until(pilot, lambda: screen.recipe.adapter.dora)
        screen._form.unfold(False)
        await until(pilot, lambda: "3 changed from their defaults: Dropout, DoRA, Seed" in shown(app))
        assert isinstance(app.focused, Fold), "the cursor does not stay in what is folded away"
        await pilot.resize_terminal(200, 60)
        await until(pilot, lambda: "Targets" not in shown(app))  # as the user has left it
        assert "The trade, for this model" in shown(app)
        assert shown(app).splitlines()[1].count("╭") == 3, "three columns"

    play(story, tmp_path, size=NARROW, recipe=recipe)


def test_turning_changes_the_recipe_and_what_follows(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("right")
        assert screen_of(app).recipe.adapter.rank == 32
        assert "1 x rank" in shown(app)
        await pilot.press("4", "8", "enter")
        assert screen_of(app).recipe.adapter.rank == 48
        assert isinstance(screen_of(app).recipe.adapter.rank, int)
        await pilot.press("down", "end")
        assert screen_of(app).recipe.adapter.alpha == 512
        await pilot.press("up", "home")
        assert screen_of(app).recipe.adapter.rank == 1
        screen_of(app)._form.focus_field("train.accumulation")
        await pilot.press("right")
        assert "12 per step" in shown(app)
        assert screen_of(app).recipe.problems() == ()

    play(story, tmp_path)


def test_method_choices_and_switches(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        screen._form.unfold()
        double = screen.query_one("#model--double_quant", Choice)
        assert double.display
        await pilot.press("m")
        assert screen.recipe.method == "lora"
        assert screen.query_one("#method", Choice).value == "lora"
        assert not double.display, "4-bit fields mean nothing to LoRA"
        screen._form.focus_field("method")
        await pilot.press("right")
        assert screen.recipe.method == "qlora"
        screen._form.focus_field("adapter.dora")
        await pilot.press("space")
        assert screen.recipe.adapter.dora is True
        screen._form.focus_field("train.optimizer")
        await pilot.press("right")
        assert screen.recipe.train.optimizer == "adamw_8bit"

    play(story, tmp_path)


def test_what_pairs_of_answers_are_learnt_with_is_shown_for_them_alone(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        screen._form.unfold()
        fields = [screen.query_one(f"#train--{name}", Slider) for name in ("beta", "label_smoothing")]
        assert not any(field.display for field in fields)
        screen._form.focus_field("train.objective")
        await pilot.press("right")
        assert screen.recipe.train.objective == "dpo"
        assert all(field.display for field in fields)
        rate = screen.query_one("#train--learning_rate", Slider)
        assert rate.note == "dpo: 5e-06", "the recipe's rate is that of supervised training"
        screen._form.focus_field("train.beta")
        await pilot.press("right")
        assert screen.recipe.train.beta == 0.2
        assert screen.recipe.problems() == ()

    play(story, tmp_path)


@pytest.mark.slow
def test_texts_become_values(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)

        async def write(path: str, text: str) -> None:
            screen._form.focus_field(path)
            await pilot.pause()
            assert isinstance(app.focused, TextLine)
            await pilot.press("enter")
            app.focused.value = text
            await pilot.press("enter")
            await pilot.pause()

        await write("adapter.targets", "q_proj, v_proj")
        assert screen.recipe.adapter.targets == ("q_proj", "v_proj")
        await write("train.seed", "42")
        assert screen.recipe.train.seed == 42
        await write("adapter.layers", "12, 0-7")
        assert screen.recipe.adapter.layers == (*range(8), 12)
        screen._form.show(screen.recipe)
        assert screen.query_one("#adapter--layers", TextField).value == "0-7, 12", "as a recipe that is opened shows it"
        await write("adapter.rank_pattern", "down_proj=32, layers.0.self_attn.q_proj=8")
        assert screen.recipe.adapter.rank_pattern == (("down_proj", 32), ("layers.0.self_attn.q_proj", 8))
        await write("model.precision", "layers.0-3=16bit, down_proj=int8")
        assert screen.recipe.model.precision == (("layers.0-3", "16bit"), ("down_proj", "int8"))
        await write("adapter.layers", "7-0")
        assert "adapter.layers: found '7-0'" in shown(app)
        assert screen.query_one("#adapter--layers", TextField).value == "7-0", "what was typed stays to be mended"
        await write("adapter.layers", "")
        assert screen.recipe.adapter.layers == ()
        await write("model.base", "owner/name")
        assert screen.recipe.model.base == "owner/name"
        assert screen.recipe.problems() == ()
        await write("train.seed", "many")
        assert "train.seed: found 'many'" in shown(app)
        assert screen.query_one("#train--seed", TextField).value == "many", "what was typed stays to be mended"

    play(story, tmp_path)


def test_letters_go_into_a_text_field_that_is_edited_and_start_nothing(tmp_path: Path) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen_of(app)._form.focus_field("name")
        await pilot.press("enter", "r", "m", "o", "q")
        await settle(pilot)
        assert asked.started == []
        assert isinstance(app.focused, TextLine)
        assert app.focused.value == "tryrmoq"
        assert "⏎ Accept" in shown(app)
        assert "r Run" not in shown(app)
        await pilot.press("down")
        assert screen_of(app).recipe.name == "tryrmoq", "the arrows take what was typed"

    play(story, tmp_path, services=services_that(asked))


@BOTH
def test_in_a_field_that_the_arrows_passed_the_keys_do_what_the_screen_says(
    tmp_path: Path, size: tuple[int, int]
) -> None:
    recipe = Recipe(name="try").with_("train.seq_len", 65536).with_("train.micro_batch", 32)

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        await until(pilot, lambda: "f Fit" in shown(app))
        screen._form.focus_field("model.base")
        await pilot.press("up", "down")
        await until(pilot, lambda: "f Fit" in shown(app))
        assert "⏎ Edit" in shown(app)
        await pilot.press("f")
        await settle(pilot)
        assert screen.recipe.train.seq_len < 65536 or screen.recipe.train.micro_batch < 32
        assert screen.recipe.model.base == "embedded"
        await pilot.press("m")
        assert screen.recipe.method == "lora"

    play(story, tmp_path, size=size, recipe=recipe)


def test_a_click_on_a_label_focuses_its_field_and_changes_nothing(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen = screen_of(app)
        for kind, path in ((Slider, "adapter.rank"), (Choice, "method"), (TextField, "model.base")):
            field = screen.query_one("#" + path.replace(".", "--"), kind)
            await pilot.click(field, offset=(3, 0))
            await pilot.pause()
            assert app.focused in (field, *field.children), path
            assert screen.recipe == recipe, path

    recipe = Recipe(name="try")
    play(story, tmp_path, recipe=recipe)


def test_problems_are_listed_and_nothing_starts(tmp_path: Path) -> None:
    asked, recipe = Asked(), Recipe(name="", train=replace(Recipe().train, epochs=0.0))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        told = " ".join(shown(app).split())
        assert "This keeps the recipe from running" in told
        assert "name: found nothing" in told
        assert "train.steps: found 0 steps and 0 epochs" in told
        await pilot.press("r")
        await settle(pilot)
        assert asked.started == []

    play(story, tmp_path, size=(160, 40), recipe=recipe, services=services_that(asked))


def test_run_starts_the_turned_recipe_and_watches_it(tmp_path: Path) -> None:
    asked = Asked()

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("right", "r")
        await until(pilot, lambda: isinstance(app.screen, RunScreen))
        assert isinstance(app.screen, RunScreen)
        assert [recipe.adapter.rank for recipe in asked.started] == [32]
        assert app.screen.paths.name.startswith("made-")
        assert app.screen.paths.name in shown(app)
        await pilot.press("escape")
        await settle(pilot)
        assert screen_of(app).recipe.adapter.rank == 32

    play(story, tmp_path, services=services_that(asked, makes=lambda: make_run(tmp_path, "made")))


@BOTH
def test_what_the_checks_refuse_is_listed(tmp_path: Path, size: tuple[int, int]) -> None:
    asked = Asked()
    services = services_that(asked, refuses=f"data.path: line 3 is no JSON {HOSTILE}\nmodel.base: nothing there")

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        await pilot.press("r")
        await until(pilot, lambda: "data.path: line 3" in shown(app))
        assert "model.base: nothing there" in shown(app)
        assert "Checking" not in shown(app)
        assert_harmless(app)
        await pilot.press("r")
        await until(pilot, lambda: len(asked.started) == 2)

    play(story, tmp_path, size=size, services=services)


def test_hostile_recipe_values_are_shown_harmlessly(tmp_path: Path) -> None:
    recipe = Recipe(name=HOSTILE, adapter=replace(Recipe().adapter, targets=(HOSTILE, "v_proj")))

    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        assert_harmless(app)
        assert screen_of(app).recipe == recipe, "showing changes nothing"
        await pilot.press("right")
        assert screen_of(app).recipe.name == HOSTILE

    play(story, tmp_path, recipe=recipe)


def test_a_field_is_found_by_its_name_its_path_or_what_is_said_of_it() -> None:
    assert found("rank")[0] == "adapter.rank", "the name first"
    assert found("seed")[0] == "train.seed"
    assert found("seq_len")[0] == "train.seq_len"
    assert "train.optimizer" in found("paged"), "the words of a choice count"
    assert "train.offload_checkpoints" in found("main MEMORY")
    assert found("no such thing") == []
    assert sorted(found("")) == sorted(FIELDS)
    screen = FindScreen(Recipe(method="lora"))
    lines = {line.plain.split()[0]: path for path, line in screen.offers("double")}
    assert lines == {"Double": None}, "a field that means nothing to the recipe says why and cannot be chosen"
    assert "only with QLoRA" in next(iter(screen.offers("double")))[1].plain


def test_notes_follow_from_several_fields() -> None:
    recipe = Recipe(train=replace(Recipe().train, micro_batch=3, accumulation=4, steps=10))
    notes = notes_of(recipe)
    assert notes["train.accumulation"] == "12 per step"
    assert (notes["train.steps"], notes["train.epochs"]) == ("", "by steps")
    assert notes_of(recipe.with_("adapter.rank", 0))["adapter.alpha"] == "", "a rank still to be mended divides nothing"


def test_every_slider_shows_its_knob(tmp_path: Path) -> None:
    async def story(pilot: Pilot[None], app: StudioApp) -> None:
        screen_of(app)._form.unfold()
        sliders = {str(slider.id).replace("--", "."): slider for slider in app.screen.query(Slider)}
        numbers = {path: field.kind for path, field in FIELDS.items() if isinstance(field.kind, Number)}
        assert set(sliders) == {path for path, number in numbers.items() if number.stops}
        for path, slider in sliders.items():
            assert slider.value == screen_of(app).recipe.get(path)
            assert (slider.scale.low, slider.scale.high) == (numbers[path].low, numbers[path].high)

    play(story, tmp_path)
