"""Tokens a second: against published steps, and what must move which way."""

from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.gpu_catalogue import CATALOGUE, card_of_size, find_gpu
from studio.core.step_work import StepWork, step_work
from studio.core.throughput import Speed, duration_of, qlora_slowdown, speed_of, streaming_slowdown, time_factor
from studio.core.vram.setup import Setup
from tests.bench.bench_speed import crossed, rows
from tests.core.published_speed import compared_speeds, consumer_table, model

LLAMA = model("Llama-3.1-8B")
SETUP = Setup(method="lora", micro_batch=1, seq_len=2048)


def expected(setup: Setup, card: str = "A100 80GB") -> float:
    speed = speed_of(LLAMA, setup, find_gpu(card))
    assert speed is not None
    return speed.expected


def test_published_speeds_lie_in_the_range():
    items = compared_speeds()
    assert len(items) == 132
    outside = [item for item in items if not item.inside]
    assert not outside, [(item.row["model"], item.row["gpu"], round(item.ratio, 2)) for item in outside]
    by_card = defaultdict(list)
    for item in items:
        by_card[item.row["gpu"]].append(item.ratio)
    for card, ratios in by_card.items():
        assert 0.88 < median(ratios) < 1.12, card
        assert median(abs(ratio - 1) for ratio in ratios) < 0.12, card


def test_the_guide_shows_what_was_compared_of_consumer_cards():
    assert consumer_table() in Path("docs/estimate.md").read_text(encoding="utf-8")
    found = [item for item in compared_speeds() if item.row["gpu"].startswith("RTX")]
    assert len(found) == 20
    assert round(median(item.ratio for item in found), 2) == 0.97
    assert round(median(abs(item.ratio - 1) for item in found), 2) == 0.06


def test_compiled_layers_are_faster_by_what_was_published():
    """On an RTX 3090 14 to 22 % off an eager step of transformers, 19 % on an RTX 5090; ours is partly fused before."""
    for card in ("RTX 3090", "RTX 5090"):
        gain = expected(replace(SETUP, compile=True), card) / expected(SETUP, card)
        assert 1.0 < gain < 1 / (1 - 0.22)


def test_constants_of_one_source_hold_for_another():
    """Other models, other lengths or another card than those that the shares were fitted on."""
    for name, count, answers in crossed(rows()):
        errors = [abs(ratio - 1) for ratio in answers]
        assert count >= 2
        assert median(errors) < 0.12, name
        assert max(errors) < 0.35, name


def test_published_pairs_say_what_4_bit_costs():
    """The same step in 16 and in 4 bit without peft's upcast: FMS's Mistral rows, 4 and 8 x 4096 on an A100."""
    speeds = {
        (item.row["method"], item.row["loop"], item.row["dtype"]): item.row["tokens_per_second"]
        for item in compared_speeds()
        if item.row["model"] == "Mistral-7B-v0.1" and item.row["micro_batch"] == 8
    }
    measured = speeds["lora", "HF Trainer + peft", "fp16"] / speeds["qlora", "HF Trainer + peft", "fp16"]
    low, usual, high = qlora_slowdown(
        model("Mistral-7B-v0.1"), replace(SETUP, micro_batch=8, seq_len=4096), find_gpu("A100 80GB")
    ) or (0, 0, 0)
    assert 1.0 < low < usual < high < 1.1, "long steps hide dequantising"
    assert 1.1 < measured < 1.2, "what is left of the measured 16 % is the stock loop's upcast, which we do not do"


def test_short_steps_show_what_4_bit_costs():
    """LitGPT on an A10G measured 1.39 and 1.44 for two rows of 7 B models, 1.16 to 2.05 over its table."""
    slow = qlora_slowdown(model("Llama-2-7b-hf"), Setup(micro_batch=2, seq_len=256), find_gpu("A10G"))
    assert slow is not None
    low, usual, high = slow
    assert low < 1.39 < high
    assert 1.1 < usual < 2.05


def test_operations_are_those_of_the_literature():
    """6 per weight and token with checkpointing, 4 without (2 N^2 multiply-adds in LoRA Without Regret)."""
    layers = LLAMA.parameters - LLAMA.embedding_parameters - LLAMA.head_parameters
    short = replace(SETUP, rank=1, seq_len=1, micro_batch=1)
    head = 4 * LLAMA.embedding_parameters
    for checkpointing, per_weight in (("all", 6), ("none", 4)):
        work = step_work(LLAMA, replace(short, recompute=checkpointing))
        assert work.operations_per_token == pytest.approx(per_weight * layers + head, rel=0.01)


def test_time_falls_evenly_with_the_layers_that_are_not_computed_again():
    again = [work_of(count) for count in ("none", *range(1, LLAMA.layers), "all")]
    steps = [more.half - less.half for less, more in pairwise(again)]
    assert steps == pytest.approx([steps[0]] * LLAMA.layers)
    assert again[-1].launches - again[0].launches == LLAMA.layers * 41
    offloaded = [work_of(count, offload_checkpoints=True).host_bytes for count in (1, 8, "all")]
    assert offloaded == pytest.approx([offloaded[0], 8 * offloaded[0], LLAMA.layers * offloaded[0]])


def test_scales_that_are_quantised_cost_two_more_launches_a_weight_and_pass() -> None:
    """165 and 207 launches of a layer are traced in all (tests/bench/bench_launches.py)."""
    plain, nested = (work_of("all", method="qlora", double_quant=nested) for nested in (False, True))
    assert nested.launches - plain.launches == LLAMA.layers * 7 * 2 * 3


def work_of(recompute: Any, **changes: Any) -> StepWork:
    return step_work(LLAMA, replace(SETUP, recompute=recompute, **changes))


def test_what_costs_time():
    base = expected(SETUP)
    assert expected(replace(SETUP, recompute="none")) > base * 1.2
    assert expected(replace(SETUP, dtype="fp32")) < base / 5
    assert expected(replace(SETUP, seq_len=16384)) < base * 0.8, "attention is quadratic"
    assert expected(replace(SETUP, attention="eager")) < base
    assert expected(replace(SETUP, method="qlora")) < base
    quantised = replace(SETUP, method="qlora", micro_batch=4)
    kept = replace(quantised, keep_dequantised=True)
    assert expected(quantised) < expected(kept) < expected(replace(SETUP, micro_batch=4))
    assert 3 * step_work(LLAMA, kept).dequantised_bytes == pytest.approx(
        2 * step_work(LLAMA, quantised).dequantised_bytes
    )
    assert expected(replace(SETUP, dora=True)) < base
    assert expected(replace(SETUP, rank=256)) < base
    whole_head = expected(replace(SETUP, modules_to_save=("lm_head",)))
    assert base * 0.7 < whole_head < base, "its own gradient"
    whole_embedding = expected(replace(SETUP, modules_to_save=("embed_tokens",)))
    assert whole_head < whole_embedding < base, "no product, but an optimizer step of half a billion parameters"
    assert expected(SETUP, "4090") < base


def test_a_small_step_is_launch_bound():
    tiny = replace(SETUP, seq_len=64)
    assert expected(tiny) == pytest.approx(expected(tiny, "H200"))
    assert expected(replace(tiny, seq_len=128)) == pytest.approx(2 * expected(tiny))
    small = model("Qwen3-0.6B")
    for shape, setup, card, bound in (
        (LLAMA, tiny, "A100 80GB", True),
        (LLAMA, SETUP, "A100 80GB", False),
        (small, SETUP, "RTX 5090", True),
        (small, replace(SETUP, micro_batch=2), "RTX 5090", False),
    ):
        speed = speed_of(shape, setup, find_gpu(card))
        assert speed is not None
        assert speed.launch_bound == bound


def test_nobody_knows_the_speed_of_a_size():
    assert speed_of(LLAMA, SETUP, None) is None
    assert speed_of(LLAMA, SETUP, card_of_size(24)) is None
    assert qlora_slowdown(LLAMA, SETUP, card_of_size(24)) is None


def test_every_card_of_the_catalogue_has_a_speed():
    for gpu in CATALOGUE.values():
        speed = speed_of(LLAMA, replace(SETUP, dtype="bf16" if gpu.bf16 else "fp16"), gpu)
        assert speed is not None
        assert 0 < speed.low < speed.expected < speed.high
        assert speed.high / speed.low <= 1.8**2 + 1e-9
        assert speed.basis


def test_experts_cost_what_a_token_goes_through():
    mixtral, mistral = model("Mixtral-8x7B"), model("Mistral-7B-v0.1")
    setup = replace(SETUP, targets=("q_proj", "v_proj"))
    per_token = [step_work(shape, setup).operations_per_token for shape in (mixtral, mistral)]
    assert 1.5 < per_token[0] / per_token[1] < 2.2, "two experts of eight"


def test_experts_without_a_gate_cost_two_products_and_not_three():
    gated = model("Mixtral-8x7B")
    (group,) = gated.groups
    experts = group.layer.experts
    assert experts
    ungated = replace(experts, gated=False)
    plain = replace(gated, groups=(replace(group, layer=replace(group.layer, experts=ungated)),))
    fewer = step_work(gated, SETUP).operations_per_token - step_work(plain, SETUP).operations_per_token
    one_product = gated.hidden * experts.inner * experts.per_token
    assert fewer == pytest.approx(2 * one_product * group.count * 3, rel=0.01), "two passes, and one again"


def test_the_price_of_a_change_in_time():
    gpu = find_gpu("4090")
    plain = replace(SETUP, micro_batch=4, seq_len=1024, recompute="none")
    low, high = time_factor(LLAMA, plain, replace(plain, recompute="all"), gpu) or (0, 0)
    assert 1.1 < low <= high < 1.5
    low, high = time_factor(LLAMA, plain, replace(plain, method="qlora"), gpu) or (0, 0)
    assert 1.0 <= low < high < 1.6
    split = replace(plain, micro_batch=1, accumulation=4)
    low, high = time_factor(LLAMA, plain, split, gpu) or (0, 0)
    assert 1.0 <= low <= high < 1.2, "the same rows a step"
    again = replace(plain, recompute="all")
    low, high = time_factor(LLAMA, again, replace(again, offload_checkpoints=True), gpu) or (0, 0)
    assert low == 1.0
    assert 1.01 < high < 1.3, "copies beside the computation cost between nothing and all of it"
    assert time_factor(LLAMA, plain, again, card_of_size(24)) is None


def test_hours():
    duration = duration_of(Speed(500, 1000, 2000, ""), 3_600_000)
    assert (duration.low, duration.expected, duration.high) == (0.5, 1.0, 2.0)


@given(
    st.integers(1, 64),
    st.sampled_from([64, 500, 2048, 8192]),
    st.sampled_from(["lora", "qlora"]),
    st.sampled_from(["all", "none", 7]),
    st.sampled_from(sorted(CATALOGUE)),
)
def test_more_rows_are_never_slower_per_token(batch: int, length: int, method: str, again: Any, card: str):
    setup = Setup(method=method, micro_batch=batch, seq_len=length, recompute=again)  # type: ignore[arg-type]
    assert expected(replace(setup, micro_batch=batch + 1), card) >= expected(setup, card) * (1 - 1e-9)


def test_copies_of_streamed_layers_hide_behind_enough_tokens() -> None:
    gpu, streamed = find_gpu("A100 80GB"), replace(SETUP, stream=32)
    assert streaming_slowdown(LLAMA, SETUP, gpu) is None
    least, few, most = streaming_slowdown(LLAMA, replace(streamed, seq_len=512), gpu) or (0, 0, 0)
    assert 1 < few <= most
    assert least <= few
    assert streaming_slowdown(LLAMA, replace(streamed, micro_batch=16), gpu) == (1.0, 1.0, 1.0)
    # Where nothing hides, a micro-batch takes as long as its copies: all layers but two, forward and backward.
    plain = LLAMA.parameters - 2 * LLAMA.embedding_parameters
    speed = speed_of(LLAMA, replace(streamed, seq_len=16), gpu)
    assert speed is not None
    assert 16 / speed.expected == pytest.approx(2 * 2 * plain * (30 / 32) / 25e9, rel=0.01)
    four_bit = streaming_slowdown(LLAMA, replace(streamed, method="qlora", seq_len=512), gpu) or (0, 0, 0)
    assert four_bit[1] < few, "a quarter of the bytes"
    assert expected(replace(streamed, stream=2)) == expected(SETUP), "two layers stay in their buffers"
    low, high = time_factor(LLAMA, SETUP, replace(streamed, seq_len=2048), gpu) or (0, 0)
    assert 1 <= low <= high
