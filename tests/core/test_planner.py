"""The planner: what it chooses fits, and is what trying everything would choose."""

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Any

import pytest

from studio.core.gpu_catalogue import GIB, Gpu, card_of_size, find_gpu
from studio.core.placement.fastest import Placed
from studio.core.placement.fidelity import Effects, effects_of, enough, left_in, more_bits, table_of
from studio.core.placement.planner import AIMS, Aim, Plan, Planner
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.throughput import careful_speed
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of
from tests.core.published_rows import shapes

SHAPE = shape_from_config(
    {
        "model_type": "llama",
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
        "tie_word_embeddings": False,
    }
)
CARD = find_gpu("4090")
RECIPE = Recipe().with_("train.accumulation", 4).with_("train.seq_len", 2048).with_("adapter.rank", 64)
FAST = (("Llama-3.2-1B", "T4"), ("Llama-2-7b-hf", "4070"), ("Llama-2-13b-hf", "4090"))
CARDS = ("1080 Ti", "3060", "T4", "4070", "A10", "4090", "5090", "A100-80GB")
RAM = 64 * GIB
LEAN = replace(setup_of(RECIPE.with_("train.optimizer", "paged_adamw_8bit"), CARD), offload_checkpoints=True)


def planned(
    aim: Aim,
    budget: int,
    *,
    recipe: Recipe = RECIPE,
    shape: ModelShape = SHAPE,
    gpu: Gpu = CARD,
    ram: int | None = RAM,
    effects: Effects | None = None,
) -> Plan | None:
    return Planner(recipe, shape, gpu, budget, ram, lambda setup: estimate_vram(shape, setup, gpu), effects).plan(aim)


@lru_cache
def everything() -> tuple[tuple[Setup, VramEstimate, float], ...]:
    """Every setting of the small model."""
    return tuple((setup, estimate_vram(SHAPE, setup, CARD), careful_speed(SHAPE, setup, CARD) or 0) for setup in _all())


def _all() -> Iterator[Setup]:
    setup = setup_of(RECIPE, CARD)
    for method, optimizer, rows, again, stream, offloads, keeps in product(
        ("lora", "qlora"),
        ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"),
        (1, 2, 4),
        ("none", 1, 2, 3, "all"),
        ("off", 2, 4),
        (False, True),
        (False, True),
    ):
        if not (offloads and again == "none") and not (keeps and (method == "lora" or again == "none")):
            choices: dict[str, Any] = {"method": method, "optimizer": optimizer, "recompute": again, "stream": stream}
            choices["keep_dequantised"] = keeps
            yield replace(setup, **choices, micro_batch=rows, accumulation=4 // rows, offload_checkpoints=offloads)


MEASURED = effects_of(
    [("layers.0", 0.04, 0.09, 0.006), ("layers.1", 0.01, 0.09, 0.006), ("layers.2", 0.03, 0.09, 0.006),
     ("layers.3", 0.02, 0.09, 0.006)],
    "here",
)  # fmt: skip


@lru_cache
def mixed(effects: Effects | None) -> tuple[tuple[Setup, VramEstimate, float], ...]:
    """Every resident setting of the small model with more bits in the layers that are worth it, and in more of them."""
    steps = more_bits(SHAPE, setup_of(RECIPE, CARD), effects)
    steps = enough(steps, 0.99) if effects else steps
    tables = [table_of(steps[:count]) for count in range(1, len(steps) + 1)]
    plain = [one[0] for one in everything() if (one[0].method, one[0].stream) == ("qlora", "off")]
    setups = [replace(setup, precision=table) for setup in plain for table in tables]
    return tuple((setup, estimate_vram(SHAPE, setup, CARD), careful_speed(SHAPE, setup, CARD) or 0) for setup in setups)


def by_force(aim: Aim, budget: int, ram: int | None, effects: Effects | None = None) -> Setup | None:
    every = (*everything(), *mixed(effects)) if aim == "fidelity" else everything()
    room = [one for one in every if one[1].host.total <= 0.85 * (ram or 0)]
    fitting = [one for one in room if one[1].device.high <= budget]
    resident = [one for one in fitting if one[0].stream == "off"]
    kept = [one for one in fitting if one[0].method == "lora"] if aim == "fidelity" else []
    fitting = resident + [one for one in kept if not any(each[0].method == "lora" for each in resident)] or fitting
    least = min((one[1].device.high for one in fitting), default=0)

    def best(one: tuple[Setup, VramEstimate, float]) -> Any:
        setup, estimate, speed = one
        eight = "8bit" in setup.optimizer
        order = ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"].index(setup.optimizer)
        ties = (setup.recomputed_of(4), order, setup.offload_checkpoints)
        left = left_in(SHAPE, setup, effects) if setup.method == "qlora" else 0.0
        left = 0.0 if effects and left < 0.01 else left
        lost = {"speed": 0, "fidelity": (left, eight), "room": estimate.device.high > least}[aim]
        return lost, setup.stream != "off", -speed, *ties, estimate.device.high

    return min(fitting, key=best)[0] if fitting else None


@pytest.mark.parametrize("aim", ["speed", pytest.param("fidelity", marks=pytest.mark.slow), "room"])
def test_it_chooses_what_trying_everything_chooses(aim: Aim) -> None:
    highs = sorted(one[1].device.high for one in everything())
    found = set[Setup | None]()
    for ram in (48 * 2**20, RAM):
        for budget in (highs[0] - 1, highs[0], *highs[20 :: len(highs) // 7], highs[-1]):
            plan = planned(aim, budget, ram=ram)
            chosen = plan and plan.chosen.setup
            assert chosen == by_force(aim, budget, ram), (ram, budget)
            found.add(chosen)
    assert len(found) > (2 if aim == "room" else 6)
    assert any(setup and setup.keep_dequantised for setup in found) == (aim == "speed")


@pytest.mark.slow
def test_with_an_audit_it_chooses_the_layers_that_trying_everything_chooses() -> None:
    highs = sorted(one[1].device.high for one in everything())
    least = min(one[1].device.high for one in everything() if one[0].stream == "off")
    tables = set[Any]()
    for ram in (None, RAM):
        for budget in (*(least + more * 2**20 for more in range(12, 42, 3)), *highs[2 :: len(highs) // 5]):
            plan = planned("fidelity", budget, ram=ram, effects=MEASURED)
            assert (plan and plan.chosen.setup) == by_force("fidelity", budget, ram, MEASURED), (ram, budget)
            tables.add(plan.chosen.setup.precision if plan else None)
    assert {(("layers.0", "int8"),), (("layers.0", "int8"), ("layers.2-3", "int8"))} < tables, (
        "those that lose the most"
    )


def test_an_audit_says_which_layers_are_worth_a_gib_and_when_it_is_enough() -> None:
    shape, tight, ample = shapes()["Llama-2-13b-hf"], 15 * GIB, CARD.total_bytes
    worst = effects_of([(f"model.layers.{n}", 0.1 if n == 30 else 0.02, 0.09, 0.006) for n in range(40)], "an audit")
    plan = planned("fidelity", tight, shape=shape, ram=None, effects=worst)
    assert plan is not None
    check(plan, tight)
    assert plan.chosen.settings["model.precision"]["layers.30"] == "int8"
    more = plan.bought[0]
    assert "in 8 bit" in more.words and "of what 4 bits cost is left" in more.words and more.bytes > 0
    unmeasured = planned("fidelity", tight, shape=shape, ram=None)
    assert unmeasured is not None
    assert "is left" not in unmeasured.bought[0].words
    assert "layers.30" not in unmeasured.chosen.settings["model.precision"]
    enough_room = planned("fidelity", ample, shape=shape, effects=worst)
    assert enough_room is not None
    assert enough_room.chosen.settings["model.precision"] == {"layers.0-39": "int8"}, "the rest buys speed, not 16 bits"
    assert enough_room.chosen.setup.stream == "off", "as good as 16 bits that wait in main memory"


def check(plan: Plan, budget: int) -> None:
    for placed in (plan.chosen, plan.leanest, *plan.runners_up):
        assert placed.estimate.device.high <= budget
        assert placed.setup.micro_batch * placed.setup.accumulation == RECIPE.rows_per_step
        assert placed.on(RECIPE).problems() == ()
        assert placed.estimate.host.total <= RAM
    assert all(one.setup != plan.chosen.setup for one in plan.runners_up)
    spent = plan.chosen.estimate.device.high - plan.leanest.estimate.device.high
    assert sum(one.bytes for one in plan.bought) == spent
    gained = plan.chosen.score / plan.leanest.score
    for one in plan.bought:
        gained /= one.factor
    assert gained == pytest.approx(1)


_DEEP = sorted(shapes(), key=lambda name: (shapes()[name].parameters, name))[::3]


@pytest.mark.parametrize(
    ("model", "card"),
    [
        *FAST,
        *(pytest.param(*pair, marks=pytest.mark.slow) for pair in product(_DEEP, CARDS)),
    ],
)
def test_nothing_chosen_goes_beyond_the_card(model: str, card: str) -> None:
    shape, gpu = shapes()[model], find_gpu(card)
    plans = {aim: planned(aim, gpu.total_bytes, shape=shape, gpu=gpu) for aim in AIMS}
    if plans["room"] is None:
        assert set(plans.values()) == {None}
        return
    for plan in plans.values():
        assert plan is not None
        check(plan, gpu.total_bytes)
    speed, fidelity, room = (plan.chosen for plan in plans.values() if plan)
    resident = [one for one in (speed, fidelity) if one.setup.stream == room.setup.stream]
    assert all(room.estimate.device.high <= one.estimate.device.high for one in resident)
    assert (speed.setup.stream == "off") == (room.setup.stream == "off")
    assert (fidelity.setup.method, "8bit" in fidelity.setup.optimizer) <= (speed.setup.method, True)
    if speed.setup.stream == "off":
        assert speed.score >= room.score


def test_what_the_recipe_rules_out_is_not_chosen() -> None:
    shape = shapes()["Llama-2-7b-hf"]

    def setups(aim: Aim, **fields: Any) -> list[Setup]:
        recipe = RECIPE
        for path, value in fields.items():
            recipe = recipe.with_(path.replace("__", "."), value)
        plan = planned(aim, CARD.total_bytes, recipe=recipe, shape=shape)
        return [placed.setup for placed in (plan.chosen, *plan.runners_up)] if plan else []

    assert {setup.method for setup in setups("speed", method="lora", adapter__init="pissa")} == {"lora"}
    assert {setup.method for setup in setups("fidelity", adapter__init="loftq")} == {"qlora"}


def test_a_card_without_known_speed_is_filled_too() -> None:
    plan = planned("speed", 12 * GIB, shape=shapes()["Llama-2-7b-hf"], gpu=card_of_size(12))
    assert plan is not None
    check(plan, 12 * GIB)
    assert plan.chosen.setup.recomputed_of(32) < 32


def test_placed_settings_are_plain_values_of_a_recipe() -> None:
    plan = planned("fidelity", 12 * GIB, shape=shapes()["Llama-2-13b-hf"], gpu=find_gpu("4070"))
    assert plan is not None
    assert isinstance(plan.chosen, Placed)
    made = plan.chosen.on(RECIPE)
    assert made.method == "lora"
    assert made.model.stream == 40
    assert "40 of 40 layers in main memory" in plan.bought[0].words
    assert setup_of(made, find_gpu("4070")) == plan.chosen.setup


@pytest.mark.parametrize("aim", AIMS)
def test_settings_that_cannot_win_are_not_estimated(aim: Aim) -> None:
    """It answers a person: of some thousand settings of a 32-layer model about a hundred are looked at."""
    shape, asked = shapes()["Llama-3.1-8B"], list[Setup]()

    def estimate(setup: Setup) -> VramEstimate:
        asked.append(setup)
        return estimate_vram(shape, setup, CARD)

    recipe = RECIPE.with_("train.micro_batch", 2).with_("train.accumulation", 8)
    assert Planner(recipe, shape, CARD, CARD.total_bytes, RAM, estimate).plan(aim)
    assert len(asked) == len(set(asked)) <= 110


def test_the_last_layer_may_take_less_where_it_keeps_its_activations() -> None:
    """The computation of all layers again has one more checkpoint and no activation less."""
    shape, gpu = shapes()["falcon-7b"], find_gpu("3060")
    high = {again: estimate_vram(shape, replace(LEAN, recompute=again), gpu).device.high for again in ("all", 31)}
    assert high[31] < high["all"]
    plan = planned("room", high[31], shape=shape, gpu=gpu)
    assert plan is not None
    assert plan.chosen.estimate.device.high <= high[31]
