"""How many layers `train.recompute = "auto"` computes again: the fewest whose high end is within the budget."""

from dataclasses import replace

import pytest

from studio.core.gpu_catalogue import find_gpu
from studio.core.placement.recompute import with_fewest
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
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
    assert highs == sorted(highs, reverse=True)
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
