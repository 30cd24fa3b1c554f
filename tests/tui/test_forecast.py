"""The forecast without a screen: estimates, budgets, largest batches, fixes, and the words they become."""

import itertools
import re
from pathlib import Path

import pytest

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import GIB
from studio.core.intervals import Interval
from studio.core.layer_precision import layers_held_in
from studio.core.placement.columns import column_of
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.probe import trade
from studio.probe.cards import Card, CardProcess, Driver
from studio.probe.checkup import trouble_of
from studio.probe.device import Sight
from studio.probe.forecast import Forecaster, outlook_or_reason
from studio.probe.machine import Machine
from studio.probe.plan import PlanDevice
from studio.probe.torch_cards import TorchBuild
from studio.probe.trade import sides_of
from studio.runs.quality import LaneResult
from studio.tui.panels.fixes import applied_text, fix_lines
from studio.tui.panels.forecast_text import over_budget_text, table_text
from studio.tui.reading import host_reading, host_words, peak_words, reading_of, rows_words
from studio.tui.services import Services
from studio.tui.setup_texts import machine_text
from studio.tui.trade import footnote, rows_of
from tests.tui.stories import EIGHT_B, ESCAPES, card_of

SMALL = Recipe(method="qlora").with_("train.micro_batch", 2)
LARGE = Recipe(method="lora").with_("train.micro_batch", 24).with_("train.accumulation", 2)


def on(device: PlanDevice) -> Forecaster:
    return Forecaster(shape_from_config(EIGHT_B), device)


def on_4090() -> Forecaster:
    return on(card_of())


def test_the_reading_adds_up_to_what_the_card_will_show() -> None:
    outlook = on_4090().outlook(SMALL)
    reading = reading_of(outlook)
    assert reading.total == pytest.approx(outlook.estimate.device.expected / GIB)
    assert reading.capacity == pytest.approx(24564 / 1024)
    assert [part.label for part in reading.parts][:2] == ["base", "adapter"]
    assert reading.low is not None
    assert reading.high is not None
    assert reading.low < reading.total < reading.high
    assert (reading.verdict, reading.level) == ("fits", "good")
    paged = reading_of(on_4090().outlook(SMALL.with_("train.optimizer", "paged_adamw_32bit")))
    states = {part.label: part.value for part in paged.parts}
    assert states["optimizer"] == pytest.approx({p.label: p.value for p in reading.parts}["optimizer"], rel=0.02)


def test_a_shipped_recipes_model_is_weighed_without_the_hub_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    forecaster = Services().forecaster(SMALL.with_("model.base", "meta-llama/Llama-3.1-8B"), "RTX 4090")
    outlook = forecaster.outlook(SMALL)
    assert outlook.estimate.components == on_4090().outlook(SMALL).estimate.components
    assert any(line.startswith("the config is this program's own copy") for line in peak_words(outlook, card_of()))


def test_a_turn_is_not_worked_out_twice() -> None:
    forecaster = on_4090()
    recipes = [SMALL.with_("adapter.rank", rank) for rank in (4, 8, 16, 32)]
    first = [forecaster.outlook(recipe) for recipe in recipes]
    again = [forecaster.outlook(recipe) for recipe in recipes]
    assert all(a.estimate is b.estimate for a, b in zip(first, again, strict=True))
    assert len({outlook.estimate.device.expected for outlook in first}) == 4


def test_the_largest_batch_is_the_last_that_fits() -> None:
    forecaster = on_4090()
    for recipe in (SMALL, LARGE):
        largest = forecaster.largest_batch(recipe)
        assert largest
        assert forecaster.outlook(recipe.with_("train.micro_batch", largest)).verdict == "fits"
        assert forecaster.outlook(recipe.with_("train.micro_batch", largest + 1)).verdict != "fits"
    assert on(card_of("GTX 1660 Ti")).largest_batch(LARGE) == 0
    assert on(PlanDevice()).largest_batch(SMALL) is None


def test_a_budget_is_the_less_of_what_is_free_and_what_the_recipe_allows() -> None:
    busy = on(card_of(used_gib=4))
    assert busy.device.budget_bytes(SMALL) == busy.device.free_bytes
    assert busy.device.budget_bytes(SMALL.with_("device.budget_gib", 8.0)) == 8 * GIB
    assert on(PlanDevice()).device.budget_bytes(SMALL) is None
    assert on(PlanDevice()).outlook(SMALL).verdict is None


def test_what_cannot_be_estimated_says_why() -> None:
    forecaster = on_4090()
    assert "problems" in str(outlook_or_reason(forecaster, SMALL.with_("adapter.rank", 0)))
    assert "q_prj" in str(outlook_or_reason(forecaster, SMALL.with_("adapter.targets", ("q_prj",))))
    with pytest.raises(BadInput):
        forecaster.outlook(SMALL.with_("adapter.targets", ("q_prj",)))
    assert "\x1b" not in reading_of("no \x1b[2Jmodel").verdict


def with_settings(recipe: Recipe, settings: tuple[tuple[str, object], ...]) -> Recipe:
    for path, value in settings:
        recipe = recipe.with_(path, value)
    return recipe


def test_fixes_save_what_they_say_and_the_gentlest_that_fits_is_taken() -> None:
    forecaster = on_4090()
    before = forecaster.outlook(LARGE)
    assert before.verdict == "does not fit"
    fixes = forecaster.single_fixes(LARGE)
    assert "micro-batch 24 -> " in fixes[0].words, "the same rows a step come first"
    for fix in fixes:
        after = forecaster.outlook(with_settings(LARGE, fix.settings))
        assert before.estimate.device.expected - after.estimate.device.expected == fix.saved_bytes > 0
    checkpointing = forecaster.single_fixes(LARGE.with_("train.recompute", "none"))
    slower = next(fix for fix in checkpointing if "computed again" in fix.words)
    assert slower.price.startswith("step x1.")
    first = forecaster.fix_that_fits(LARGE)
    assert first is not None
    assert first.words == fixes[0].words
    fitted = with_settings(LARGE, first.settings)
    assert fitted == first.recipe
    assert forecaster.outlook(fitted).verdict == "fits"
    assert fitted.rows_per_step == LARGE.rows_per_step == 48
    larger = [rows for rows in (6, 4, 3, 2, 1) if rows > fitted.train.micro_batch]
    for rows in larger:
        assert forecaster.outlook(LARGE.with_("train.micro_batch", rows)).verdict != "fits", "no smaller than needed"


def test_several_fixes_together_where_none_is_enough() -> None:
    forecaster = on(card_of("RTX 4070"))
    recipe = LARGE.with_("train.recompute", "none").with_("train.seq_len", 4096)
    assert all(fix.verdict != "fits" for fix in forecaster.single_fixes(recipe))
    first = forecaster.fix_that_fits(recipe)
    assert first is not None
    assert len(first.changes) > 1
    assert forecaster.outlook(with_settings(recipe, first.settings)).verdict == "fits"
    assert with_settings(recipe, first.settings).problems() == ()
    for count in range(1, len(first.changes)):
        for fewer in itertools.combinations(first.changes, count):
            settings = tuple(setting for item in fewer for setting in item.change.settings)
            assert (
                count < len(first.changes) - 1 or forecaster.outlook(with_settings(recipe, settings)).verdict != "fits"
            )


def test_where_nothing_helps_it_says_so() -> None:
    forecaster = on(PlanDevice(card_of().gpu, 2 * GIB))
    assert forecaster.fix_that_fits(LARGE) is None
    (none, nothing), *others = fix_lines(forecaster.single_fixes(LARGE), None, over=True)
    assert none is None, "a line that says so cannot be chosen"
    assert "Nothing here makes it fit" in nothing.plain
    assert all("not enough alone" in line.plain for _, line in others)


def test_a_length_that_no_row_needs_is_the_gentlest_change_and_loses_nothing() -> None:
    forecaster = on_4090()
    long = SMALL.with_("train.seq_len", 32768).with_("train.micro_batch", 12)
    assert forecaster.fix_for_nothing(long) is None, "how long the rows are is not known"
    assert rows_words(long, None) == "; every row counted as 32 768 tokens long"
    before = reading_of(forecaster.outlook(long))
    assert (before.verdict, before.level) == ("does not fit", "bad")
    forecaster.longest_tokens = 57
    free = forecaster.fix_for_nothing(long)
    assert free is not None
    assert free.settings == (("train.seq_len", 128),)
    assert free.words == "length 32768 -> 128"
    assert free.price == "nothing lost: your longest row has 57 tokens", "no step is any faster for it"
    assert forecaster.fix_that_fits(long) == free
    assert forecaster.single_fixes(long)[0] == free
    assert not any("rows are cut" in fix.price for fix in forecaster.single_fixes(long)), "no row is long enough to cut"
    after = reading_of(forecaster.outlook(long), free)
    assert (after.verdict, after.level) == ("fits at 128 tokens", "doubtful")
    assert rows_words(long, 57).endswith("your longest has 57")
    assert rows_words(long, 40000) == ""
    assert forecaster.fix_for_nothing(free.recipe) is None
    forecaster.longest_tokens = 20000
    assert forecaster.single_fixes(long)[0].price != free.price, "no stop of the length lies between"
    assert any("rows are cut" in fix.price for fix in forecaster.single_fixes(long))
    here = on(PlanDevice())
    here.longest_tokens = 57
    saved = here.fix_for_nothing(long)
    assert saved is not None
    assert "GiB; nothing lost" in fix_lines([saved], None, over=False)[0][1].plain


def test_the_table_has_both_methods_and_no_invented_rows() -> None:
    forecaster = on_4090()
    sides = sides_of(SMALL, forecaster, batches=True)
    assert sides["qlora"].outlook == forecaster.outlook(SMALL)
    assert list(sides) == ["lora", "qlora", "streamed", "mixed"]
    rows = {row[0]: row[1:] for row in rows_of(sides, waiting=False)}
    assert rows["trained"] == ("41.9 M",) * 4
    assert rows["adapter file"] == ("160 MiB",) * 4
    assert rows["largest batch"] == tuple(str(side.largest) for side in sides.values())
    assert rows["fidelity"] == ("reference", "not measured", "as LoRA", "not measured")
    assert rows["base held in"] == ("16-bit", "nf4+dq", "16-bit", "nf4 and more")
    assert rows["use"] == ("if it fits", "less memory", "costs time", "spends room")
    told = table_text(sides, SMALL, waiting=False, width=65).plain
    assert "•QLoRA 4-bit" in told
    assert " LoRA 16-bit" in told
    assert "LitGPT" in footnote(sides)
    waiting = {row[0]: row[1:] for row in rows_of(sides_of(SMALL, forecaster, batches=False), waiting=True)}
    assert waiting["largest batch"] == ("...",) * 4
    assert waiting["main memory"] == ("-", "-", "...", "...")
    assert all(side.pace is not None for side in sides.values())
    lora, qlora, _, _ = rows["tok/s, est."]
    assert lora != qlora
    assert rows["a step, est."][1].startswith("x1.")
    assert rows["time, est."][0].endswith("min")
    assert "Speed: a roofline" in footnote(sides)
    assert waiting["tok/s, est."] == ("...",) * 4
    unknown = sides_of(SMALL, on(PlanDevice()), batches=True)
    assert {row[0]: row[1:] for row in rows_of(unknown, waiting=False)}["tok/s, est."] == ("not known",) * 3
    bare = [row[0] for row in rows_of(unknown, waiting=False)]
    assert "on this card" not in bare
    assert "largest batch" not in bare


def test_what_lies_between_lora_and_qlora_has_its_price() -> None:
    """On 12 GB LoRA does not fit: as few layers as needed wait, and as many as fit stay in 16 bit."""
    shape = shape_from_config(EIGHT_B)
    forecaster = Forecaster(shape, card_of("RTX 4070"), ram_bytes=32 * GIB)
    sides = sides_of(SMALL, forecaster, batches=True)
    rows = {row[0]: row[1:] for row in rows_of(sides, waiting=False)}
    assert rows["on this card"] == ("does not fit", "fits", "fits", "fits")
    layers = sides["streamed"].recipe.model.stream
    assert isinstance(layers, int)
    assert 2 < layers < shape.layers
    fewer = sides["streamed"].recipe.with_("model.stream", layers - 1)
    assert forecaster.outlook(fewer).verdict != "fits"
    assert rows["main memory"][:2] == ("-", "-")
    assert float(rows["main memory"][2]) == pytest.approx(sides["streamed"].host_bytes / GIB, abs=0.05)
    assert sides["mixed"].recipe.model.precision == layers_held_in("16bit", (0, 1, 2, 3, 28, 29, 30, 31))
    for recipe in (sides["streamed"].recipe, sides["mixed"].recipe):
        assert sides_of(recipe, forecaster, batches=True)[column_of(recipe)].recipe == recipe, "marked, and as it is"
    poor = Forecaster(shape, card_of("RTX 4070"), ram_bytes=4 * GIB)
    assert sides_of(SMALL, poor, batches=True)["streamed"].verdict == "lacks RAM"
    assert all(len(cell) < 13 for row in rows_of(sides, waiting=False) for cell in row[1:]), "what 120 columns leave"


def test_a_table_leaves_out_columns_that_have_no_room() -> None:
    sides = sides_of(SMALL, on_4090(), batches=True)
    streamed = sides["streamed"].recipe
    for recipe, width, heads in (
        (SMALL, 75, ["LoRA 16-bit", "•QLoRA 4-bit", "LoRA streamed", "QLoRA+8 layers"]),
        (SMALL, 64, ["LoRA 16-bit", "•QLoRA 4-bit", "LoRA streamed"]),
        (SMALL, 30, ["LoRA 16-bit", "•QLoRA 4-bit"]),
        (streamed, 30, ["LoRA 16-bit", "QLoRA 4-bit", "•LoRA"]),
    ):
        lines = table_text(sides, recipe, waiting=False, width=width).plain.splitlines()
        assert re.split(r"\s{2,}|\s(?=•)", lines[0].strip()) == heads
        assert width < 50 or max(map(len, lines)) <= width


def test_main_memory_has_a_gauge_where_something_waits_there() -> None:
    forecaster = Forecaster(shape_from_config(EIGHT_B), card_of(), ram_bytes=16 * GIB)
    assert host_reading(forecaster.outlook(SMALL), forecaster.ram_bytes).parts == ()
    streamed = SMALL.with_("method", "lora").with_("model.stream", 32).with_("train.offload_checkpoints", True)
    outlook = forecaster.outlook(streamed)
    total = outlook.estimate.host.total
    for ram, verdict, level in (
        (int(total / 0.85) + 2, "fits", "good"),
        (total, "tight", "doubtful"),
        (total - 1, "does not fit", "bad"),
    ):
        reading = host_reading(outlook, ram)
        assert [part.label for part in reading.parts] == ["weights", "checkpoints"]
        assert reading.total == pytest.approx(total / GIB)
        assert reading.capacity == pytest.approx(ram / GIB)
        assert (reading.verdict, reading.level) == (verdict, level)
        assert bool(host_words(outlook, ram)) == (level != "good")
    assert "The card is not the limit" in host_words(outlook, total - 1)
    assert host_words(outlook, None) == ""
    paged = SMALL.with_("adapter.rank", 1024).with_("train.optimizer", "paged_adamw_32bit")
    small = Forecaster(shape_from_config(EIGHT_B), card_of("RTX 3060"), ram_bytes=16 * GIB)
    assert [part.label for part in host_reading(small.outlook(paged), 16 * GIB).parts] == ["paged states"]


def test_a_base_is_streamed_only_where_nothing_gentler_fits() -> None:
    shape = shape_from_config(EIGHT_B)
    rich = Forecaster(shape, card_of(), ram_bytes=64 * GIB)
    assert rich.fix_that_fits(LARGE) == on_4090().fix_that_fits(LARGE), "something gentler is enough"
    streamed = rich.single_fixes(LARGE)[-1]
    assert streamed.changes[0].change.settings[0][0] == "model.stream"
    assert [fix.settings for fix in rich.single_fixes(LARGE)[:-1]] == [
        fix.settings for fix in on_4090().single_fixes(LARGE)
    ]
    told = fix_lines([streamed], None, over=False)[0][1].plain
    assert "layers streamed from main memory" in told
    assert f"{streamed.estimate.host.total / GIB:.1f} GiB of main memory" in told
    assert "no card has run it yet" in told
    tight = PlanDevice(card_of().gpu, 5 * GIB)
    least = SMALL.with_("train.micro_batch", 1)
    assert on(tight).fix_that_fits(least) is None
    fix = Forecaster(shape, tight, ram_bytes=64 * GIB).fix_that_fits(least)
    assert fix is not None
    assert fix.fits
    assert "model.stream" in dict(fix.settings)
    assert fix.price.startswith("step x"), "what it costs in time"
    assert Forecaster(shape, tight, ram_bytes=2 * GIB).fix_that_fits(least) is None, "main memory would not hold it"


def test_a_race_on_this_model_and_data_replaces_what_was_published(monkeypatch: pytest.MonkeyPatch) -> None:
    lora = LaneResult("m", "d", "lora", "a", Interval(2.787, 2.44, 3.17), Interval(0.0, 0.0, 0.0), 900, 40, 120.4)
    qlora = LaneResult("m", "d", "qlora", "b", Interval(2.805, 2.46, 3.19), Interval(0.018, 0.004, 0.031), 900, 40)
    for raced, measured in (({"lora": lora, "qlora": qlora}, True), ({"lora": lora}, False), ({}, False)):
        monkeypatch.setattr(trade, "audited", lambda recipe: raced)  # noqa: B023  used at once
        sides = sides_of(SMALL, on_4090(), batches=True)
        rows = {row[0]: row[1:] for row in rows_of(sides, waiting=False)}
        told = footnote(sides)
        assert ("fidelity" in rows) is not measured
        assert ("LitGPT" in told) is not measured
        if measured:
            assert rows["held-out loss"] == ("2.787", "2.805", "as LoRA", "not measured")
            assert rows["4 bit adds"] == ("-", "+.004..+.031", "as LoRA", "not measured")
            assert rows["tok/s, raced"][:2] == ("120", "-")
            assert rows["use"][:2] == ("learns more", "saves memory")
            assert "40 steps each, 900 held-out tokens" in told


def test_the_words_name_stage_room_card_and_others() -> None:
    forecaster = on(card_of(used_gib=3))
    words = "\n".join(peak_words(forecaster.outlook(SMALL), forecaster.device))
    assert "Estimated peak in the backward pass, " in words
    assert "GiB free" in words
    assert "3.0 used by other processes" in words
    planned = peak_words(on_4090().outlook(LARGE), card_of("RTX 4090", planned=True))
    assert "GiB over" in planned[0]
    assert "Planned for RTX 4090" in planned[1]
    assert "no NVIDIA card" in peak_words(on(PlanDevice()).outlook(SMALL), PlanDevice())[1]


@pytest.mark.parametrize(("spills", "fate"), [(False, "out of memory.\n"), (True, "spill into main memory")])
def test_the_question_before_a_launch(spills: bool, fate: str) -> None:
    forecaster = on(card_of(used_gib=3))
    outlook = forecaster.outlook(LARGE)
    first = forecaster.fix_that_fits(LARGE)
    assert first is not None
    told = over_budget_text(outlook, forecaster.device, first, spills=spills).plain
    for part in ("does not fit", "GiB too much", "Other processes hold 3.0 GiB", fate, first.words):
        assert part in told
    assert "u undoes it" in applied_text(first)


def test_the_planned_card_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path / "home"))
    services = Services()
    assert services.recall_planned() == ""
    services.keep_planned("RTX 4090")
    assert services.recall_planned() == "RTX 4090"
    for damage in ("{", "[]", '{"card": 3}', ""):
        (tmp_path / "home" / "planned_card.json").write_text(damage)
        assert services.recall_planned() == ""


def test_who_else_uses_the_card_is_named_and_harmless() -> None:
    processes = tuple(
        CardProcess(pid, name, used)
        for pid, name, used in (
            (11, "/usr/lib/Xorg", 512 * 2**20),
            (12, f"evil{ESCAPES}", None),
            (13, None, GIB),
            (14, "chrome", GIB),
        )
    )
    device = card_of(used_gib=3.0, processes=processes)
    words = peak_words(on(device).outlook(SMALL), device)[1]
    assert "3.0 used by Xorg (11) 0.5, evil" in words
    assert "process (13) 1.0 and 1 more" in words
    assert "\x1b" not in words.replace("\\x1b", "")


@pytest.mark.parametrize(
    ("cards", "driver", "bar", "trouble"),
    [
        (None, Driver(), "no NVIDIA card: the CPU", ""),
        ([Card(0, "A", "GPU-a", 8 * GIB), Card(1, "B", "GPU-b", 9 * GIB)], Driver("580.1", (13, 0)), "B 9.0", ""),
        ([Card(0, "A", "GPU-a", 8 * GIB)], Driver("560.1", (12, 6)), "A cannot be used", "A cannot be used: torch"),
        ([Card(0, "A", "GPU-a", 8 * GIB)], Driver("560.1"), "A cannot be used", "Update the driver"),
    ],
)
def test_the_screens_name_the_card_that_a_run_would_take(
    cards: list[Card] | None, driver: Driver, bar: str, trouble: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    build = TorchBuild("2.13.0", (13, 0))
    monkeypatch.setattr("studio.probe.device.look", lambda: Sight(cards, driver, build))
    monkeypatch.setattr("studio.probe.checkup.torch_build", lambda: build)
    assert Services().card().startswith(bar)
    machine = Machine(cards, driver.version, None, None, None, None, "Linux", spills=False, cuda=driver.cuda)
    assert trouble_of(machine).startswith(trouble) or trouble in trouble_of(machine)
    assert bool(trouble_of(machine)) == bool(trouble)
    assert trouble in machine_text(machine, tmp_path).plain
