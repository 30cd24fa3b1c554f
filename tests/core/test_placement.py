"""What `auto` becomes: the fewest layers computed again, or streamed, whose high end is within the budget."""

from dataclasses import replace
from itertools import pairwise

import pytest

from studio.core.gpu_catalogue import find_gpu
from studio.core.placement.auto import with_fewest
from studio.core.placement.streaming import streamed_layers
from studio.core.recipe import Method, Stream
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate, plan_to_dict
from studio.core.vram.setup import Setup
from tests.core.published_rows import shapes

AUTO = Setup(method="qlora", micro_batch=2, seq_len=1024, optimizer="paged_adamw_8bit", recompute="auto")


@pytest.mark.parametrize("card", ["T4", "4070", "4090"])
@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Qwen2.5-1.5B", "Llama-2-7b-hf", "Llama-2-13b-hf"])
def test_as_few_layers_as_the_card_has_room_for(model: str, card: str) -> None:
    shape, gpu = shapes()[model], find_gpu(card)
    tried: list[Setup] = []

    def estimate(setup: Setup) -> VramEstimate:
        tried.append(setup)
        return estimate_vram(shape, setup, gpu)

    chosen = with_fewest(AUTO, shape.layers, gpu.total_bytes, estimate)
    assert len(tried) <= 8, "halving, not counting"
    words = ["none", *range(1, shape.layers), "all"]
    highs = [estimate_vram(shape, replace(AUTO, recompute=word), gpu).device.high for word in words]
    # The margin for blocks that the allocator cannot reuse may grow by a few MiB where the last layer joins the others.
    assert highs[:-1] == sorted(highs[:-1], reverse=True)
    assert highs[-1] < 1.02 * highs[-2]
    wanted = next((word for word, high in zip(words, highs, strict=True) if high <= gpu.total_bytes), "all")
    assert chosen == replace(AUTO, recompute=wanted)


def test_without_a_budget_or_with_another_wish() -> None:
    shape = shapes()["Llama-3.2-1B"]

    def estimate(setup: Setup) -> VramEstimate:
        return estimate_vram(shape, setup)

    assert with_fewest(AUTO, shape.layers, None, estimate).recompute == "all"
    assert with_fewest(replace(AUTO, offload_checkpoints=True), shape.layers, 2**40, estimate).recompute == 1
    fixed = replace(AUTO, recompute=3)
    assert with_fewest(fixed, shape.layers, 0, estimate) is fixed
    assert estimate(AUTO).device == estimate(replace(AUTO, recompute="all")).device


def test_what_is_left_keeps_dequantised_weights() -> None:
    shape = shapes()["Llama-2-7b-hf"]
    setup = Setup(method="qlora", seq_len=2048, keep_dequantised="auto")

    def kept(budget: int | None, setup: Setup = setup) -> bool:
        chosen = with_fewest(setup, shape.layers, budget, lambda tried: estimate_vram(shape, tried))
        assert chosen.recompute == "all"
        return chosen.keep_dequantised is True

    without, with_ = (estimate_vram(shape, replace(setup, keep_dequantised=keep)).device.high for keep in (False, True))
    assert 0.2 * 2**30 < with_ - without < 0.6 * 2**30
    assert [kept(budget) for budget in (None, without, with_ - 1, with_)] == [False, False, False, True]
    assert not kept(2**40, replace(setup, seq_len=512)), "so few rows need no dequantised weight"


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(("model", "card"), [("Llama-2-13b-hf", "T4"), ("Llama-2-7b-hf", "4070"), ("Qwen2.5-7B", "T4")])
def test_as_few_layers_are_streamed_as_the_card_forces(model: str, card: str, method: Method) -> None:
    shape, gpu = shapes()[model], find_gpu(card)
    auto = replace(AUTO, method=method, stream="auto", recompute="all")

    def estimate(setup: Setup) -> VramEstimate:
        return estimate_vram(shape, setup, gpu)

    words: list[Stream] = ["off", *range(1, shape.layers + 1)]
    highs = [estimate(replace(auto, stream=word)).device.high for word in words]
    # The first streamed layer saves the embedding alone, and what segments of the allocator leave free is not smooth.
    assert all(after <= before + 8 * 2**20 for before, after in pairwise(highs))
    wanted = next((word for word, high in zip(words, highs, strict=True) if high <= gpu.total_bytes), shape.layers)
    assert with_fewest(auto, shape.layers, gpu.total_bytes, estimate) == replace(auto, stream=wanted)
    # Both at once: first streaming with all layers computed again, then as few of those as there is room for.
    both = with_fewest(replace(auto, recompute="auto"), shape.layers, gpu.total_bytes, estimate)
    assert both.stream == wanted
    assert estimate(both).device.high <= gpu.total_bytes
    assert with_fewest(auto, shape.layers, None, estimate).stream == "off"


def test_streamed_layers_are_spread_over_the_model() -> None:
    assert streamed_layers(0, 8) == ()
    assert streamed_layers(4, 8) == (1, 3, 5, 7)
    assert streamed_layers(3, 8) == (2, 5, 7)
    for count in range(1, 9):
        numbers = streamed_layers(count, 8)
        gaps = [after - before for before, after in pairwise((-1, *numbers))]
        assert len(numbers) == count
        assert max(gaps) - min(gaps) <= 1, "each copy has as many layers to hide behind"
    assert streamed_layers(99, 3) == (0, 1, 2)


def test_main_memory_is_stated_and_the_card_is_spared_as_much() -> None:
    shape = shapes()["Llama-3.1-8B"]
    near, far = (estimate_vram(shape, replace(AUTO, recompute="all", stream=word)) for word in ("off", 32))
    assert near.host.total == 0
    layer = far.host.weights - shape.embedding_parameters * 2
    assert near.components.base - far.components.base == far.host.weights - 2 * layer // 32
    plan = plan_to_dict(far, shape, replace(AUTO, stream=32))
    assert plan["host_bytes"] == plan["host_parts"]["weights"] == far.host.weights
    assert plan["setup"]["stream"] == 32
