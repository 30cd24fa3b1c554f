"""The estimate's invariants, and its agreement with traces of the real libraries."""

from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import GIB, Gpu, find_gpu
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.estimate import refined
from studio.core.stock.setup import StockSetup, stock_setup
from studio.core.trainable import AdaptedPart
from studio.core.vram.frozen import FrozenForm, base_bytes, quantised_parts
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup, setup_of
from studio.core.vram.static import optimizer_bytes
from tests.bench.trace_settings import config_of
from tests.core.loops import estimated, kernel_of, staged
from tests.core.published_rows import shapes
from tests.examples import examples

LLAMA = shapes()["Llama-3.1-8B"]
ALL = AdaptedPart("all-linear", 16)
CARDS = [None, *map(find_gpu, ("T4", "4090", "H100"))]
SMALL_CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 4096,
}
SMALL = shape_from_config(SMALL_CONFIG)
UNKNOWN = shape_from_config({**SMALL_CONFIG, "model_type": "brand_new"})

CHOICES: dict[str, st.SearchStrategy[Any]] = {
    "method": st.sampled_from(["lora", "qlora"]),
    "rank": st.integers(1, 400),
    "targets": st.sampled_from(["all-linear", ("q_proj", "v_proj"), ("down_proj",)]),
    "dropout": st.sampled_from([0.0, 0.1]),
    "dora": st.booleans(),
    "micro_batch": st.integers(1, 16),
    "seq_len": st.integers(8, 4096),
    "accumulation": st.sampled_from([1, 8]),
    "optimizer": st.sampled_from(["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]),
    "recompute": st.sampled_from(["all", "none", 1, 3]),
    "attention": st.sampled_from(["sdpa", "eager", "flash_attention_2"]),
    "loss": st.sampled_from(["chunked", "full", "liger"]),
    "offload_checkpoints": st.booleans(),
    "modules_to_save": st.sampled_from([(), ("lm_head",), ("embed_tokens", "norm")]),
    "device": st.sampled_from(["cuda", "cpu"]),
    "dtype": st.sampled_from(["bf16", "fp16", "fp32"]),
    "double_quant": st.booleans(),
}
setups = st.builds(Setup, **CHOICES, quant_type=st.sampled_from(["nf4", "fp4"])) | st.builds(
    StockSetup,
    **CHOICES,
    quant_type=st.sampled_from(["nf4", "int8"]),
    transformers=st.sampled_from(["", "4.43.3", "4.48.1", "5.24.0"]),
    kbit_prepare=st.booleans(),
    autocast=st.booleans(),
    outputs_kept=st.booleans(),
)


@pytest.mark.parametrize(
    ("model", "method", "upcast", "gib"),
    [
        ("Llama-3.1-8B", "lora", False, 18.91),
        ("Llama-3.1-8B", "qlora", True, 12.70),
        ("Llama-3.1-8B", "qlora", False, 9.26),
        ("Llama-2-7b-hf", "lora", False, 14.28),
        ("Llama-2-7b-hf", "qlora", True, 6.56),
        ("Llama-2-13b-hf", "lora", False, 26.53),
        ("Llama-2-13b-hf", "qlora", True, 10.71),
        ("Qwen2.5-0.5B", "lora", False, 4.60),
        ("Qwen2.5-0.5B", "qlora", True, 4.70),
    ],
)
def test_traces_of_transformers_and_peft_at_full_depth(model: str, method: str, upcast: bool, gib: float):
    """Traced under fake tensors: transformers 5.23, peft 0.21, bitsandbytes 0.50; rank 16, 1 x 2048, flash."""
    setup = StockSetup(method=method, seq_len=2048, loss="full", kbit_prepare=upcast)
    assert round(staged(shapes()[model], setup, "flash").peak / GIB, 2) == gib


def test_what_goes_backward_before_a_checkpoint_computes_again_does_not_stand_beside_it():
    """The last, unadapted 4-bit products: their dequantised weights are gone when the layer is computed again.

    Traced with `trace_grid.traced` (transformers 5.24, peft 0.21, bitsandbytes 0.50): 574.5 MiB in the backward.
    """
    shape = shape_from_config(config_of("phi-1_5", 4))
    setup = Setup(method="qlora", rank=8, targets=("dense",), micro_batch=3, seq_len=64)
    assert staged(shape, setup, "flash").by_name["backward"] / 2**20 == pytest.approx(574.5, rel=0.005)


@pytest.mark.parametrize(
    ("changes", "traced"),
    [
        ({"method": "lora"}, 1_306_547_200),
        ({"method": "lora", "recompute": "none"}, 1_306_547_200),
        ({"method": "qlora", "loss": "full"}, 2_277_331_456),
    ],
)
def test_a_head_trained_alone_leaves_the_layers_without_a_graph(changes: dict[str, Any], traced: int):
    """Traced with `trace_grid.traced`: four layers of Llama 3.2 1B, rank 16, 1 x 1024 tokens."""
    shape = shape_from_config(config_of("Llama-3.2-1B", 4))
    setup = Setup(targets=("lm_head",), **changes)
    assert staged(shape, setup, "flash").peak == pytest.approx(traced, rel=0.005)
    stock = stock_setup(setup)
    closed = estimated(shape, stock)
    assert (refined(closed, shape, stock) is closed) == (not setup.recomputes)


@settings(max_examples=examples(150))
@given(setups)
def test_components_and_stages_add_up(setup: Setup):
    estimate = estimated(SMALL, setup)
    parts = estimate.components
    total = sum(getattr(parts, f.name) for f in fields(parts) if f.name != "context")
    assert total == estimate.allocated.expected == max(dict(estimate.stages).values())
    assert dict(estimate.stages)[estimate.stage] == estimate.allocated.expected
    assert all(getattr(parts, f.name) >= 0 for f in fields(parts))
    for bounds in (estimate.allocated, estimate.reserved, estimate.device):
        assert 0 < bounds.low <= bounds.expected <= bounds.high
    assert estimate.allocated.expected <= estimate.reserved.expected <= estimate.device.expected
    assert (estimate.allocated.expected < estimate.device.expected) == (setup.device == "cuda")


def saved(shape: ModelShape, setup: Setup) -> int:
    """Return what bitsandbytes takes off the device, or keeps in 8 bits, of the states of tensors that are large."""
    state = optimizer_bytes(shape, setup.adapted, setup.optimizer, pages=setup.device == "cuda")
    return state.paged + state.spared


def assert_no_less(shape: ModelShape, setup: Setup, larger: Setup, gpu: Gpu | None) -> None:
    before, after = estimated(shape, setup, gpu), estimated(shape, larger, gpu)
    fall = max(0, saved(shape, larger) - saved(shape, setup))
    assert after.allocated.expected >= before.allocated.expected - fall
    assert after.device.high >= before.device.high
    if setup.device == "cuda":
        assert after.device.expected >= before.device.expected


@settings(max_examples=examples(400))
@given(
    st.sampled_from([SMALL, UNKNOWN, shapes()["gemma-2-2b"], shapes()["Mistral-7B-v0.1"]]),
    setups,
    st.sampled_from(["rank", "micro_batch", "seq_len", "accumulation"]),
    st.integers(1, 64),
    st.sampled_from(CARDS),
)
@pytest.mark.slow
def test_more_never_takes_less(shape: ModelShape, setup: Setup, field: str, more: int, gpu: Gpu | None):
    """Of live bytes by no more than bitsandbytes pages or keeps in 8 bits, of what the card shows not at all."""
    assert_no_less(shape, setup, replace(setup, **{field: getattr(setup, field) + more}), gpu)


@settings(max_examples=examples(100))
@given(setups, st.sampled_from(CARDS))
def test_more_targets_never_take_less(setup: Setup, gpu: Gpu | None):
    few, more = (replace(setup, targets=("q_proj", *others)) for others in ((), ("down_proj",)))
    assert_no_less(SMALL, few, more, gpu)
    counts = [estimated(SMALL, each, gpu).trainable_parameters for each in (few, more)]
    assert counts[0] < counts[1]


def test_more_never_takes_less_where_other_terms_once_fell():
    """By name: pages under doubt, 8-bit states of a loop that is not the expected one, and a peak at loading."""
    pages = Setup(rank=390, optimizer="paged_adamw_32bit")
    eight = stock_setup(Setup(rank=7, seq_len=128, optimizer="adamw_8bit", loss="full"))
    mistral = shapes()["Mistral-7B-v0.1"]
    loading = stock_setup(Setup(rank=1, seq_len=8, loss="full"), kbit_prepare=False)
    for shape, setup in ((UNKNOWN, pages), (shapes()["SmolLM2-135M"], eight), (mistral, loading)):
        assert_no_less(shape, setup, replace(setup, rank=setup.rank + 1), None)
    assert estimated(mistral, loading).stage == "load"


def test_a_larger_rank_leaves_fewer_bytes_alive_where_its_states_are_paged():
    """Why live bytes may fall: SmolLM2's 960 wide maps have 100 000 elements from rank 105 on."""
    smollm = shapes()["SmolLM2-360M"]
    setups = [Setup(rank=rank, seq_len=128, optimizer="paged_adamw_32bit") for rank in (104, 105)]
    before, after = (estimated(smollm, setup) for setup in setups)
    assert after.allocated.expected < 0.78 * before.allocated.expected
    assert after.device.expected > before.device.expected
    assert after.device.high > before.device.high
    assert after.device.low < before.device.low, "the host may hold all pages"


def test_a_rank_that_lets_states_be_in_8_bits_asks_no_less_of_the_card():
    """SmolLM2's 576 wide maps have 4096 elements from rank 8 on."""
    setups = [Setup(rank=rank, seq_len=128, optimizer="adamw_8bit") for rank in (7, 8)]
    before, after = (estimated(shapes()["SmolLM2-135M"], setup) for setup in setups)
    assert 0.97 < after.allocated.expected / before.allocated.expected < 0.98
    assert after.device.expected >= before.device.expected
    assert after.device.high >= before.device.high


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "adamw_32bit"])
def test_nothing_is_paged_on_a_cpu(optimizer: str):
    """jobs/train/optimizer.py takes the same optimizer without pages there."""
    whole, paged = (
        estimated(LLAMA, Setup(rank=64, device="cpu", optimizer=name))  # type: ignore[arg-type]
        for name in (optimizer.replace("adamw_32bit", "adamw_torch"), f"paged_{optimizer}")
    )
    assert whole.components.optimizer > 0
    assert paged == whole


@settings(max_examples=examples(60))
@given(setups)
def test_full_rows_of_one_length_or_another_hold_the_same_tokens(setup: Setup):
    flat = replace(setup, attention="sdpa", device="cuda", micro_batch=2, seq_len=2048)
    cut = replace(flat, micro_batch=8, seq_len=512)
    one, four = staged(LLAMA, flat, "flash").peak, staged(LLAMA, cut, "flash").peak
    assert abs(one / four - 1) < 1e-3, "only cos and sin follow the length alone"


def test_checkpointing_chunks_and_four_bits_save():
    whole = estimated(LLAMA, Setup(method="lora", seq_len=2048, recompute="none", loss="full"))
    peaks = [whole.allocated.expected]
    for change in ({"recompute": "all"}, {"loss": "chunked"}, {"method": "qlora"}):
        setup = Setup(method="lora", seq_len=2048, recompute="none", loss="full")
        peaks.append(estimated(LLAMA, replace(setup, **change)).allocated.expected)
    assert all(peak < peaks[0] for peak in peaks[1:])


def test_a_tied_head_is_counted_once():
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "vocab_size": 1000,
    }
    tied, free = (shape_from_config({**config, "tie_word_embeddings": value}) for value in (True, False))
    assert free.parameters - tied.parameters == 256 * 1000
    sizes = [base_bytes(shape, FrozenForm("", False, 2, 2, 2)) for shape in (free, tied)]
    assert sizes[0] - sizes[1] == 2 * 256 * 1000


def test_bytes_per_quantised_weight():
    linear = LLAMA.groups[0].layer.mlp[0]

    def bytes_per_weight(quant_type: str, *, double_quant: bool = False) -> float:
        return sum(quantised_parts(linear, FrozenForm(quant_type, double_quant, 2, 2, 2))) / linear.weights

    assert bytes_per_weight("nf4", double_quant=True) == pytest.approx(0.515869, rel=1e-4)
    assert bytes_per_weight("nf4") == pytest.approx(0.5625, rel=1e-4)
    assert bytes_per_weight("fp4") == bytes_per_weight("nf4"), "another table of 16 numbers"
    assert bytes_per_weight("int8") == pytest.approx(1 + 4 / linear.inputs, rel=1e-4)


def test_optimizer_state_by_kind():
    full = optimizer_bytes(LLAMA, ALL, "adamw_torch")
    eight = optimizer_bytes(LLAMA, ALL, "adamw_8bit")
    paged = optimizer_bytes(LLAMA, ALL, "paged_adamw_32bit")
    assert full.resident == 8 * 41_943_040
    assert full.paged == eight.paged == 0
    assert eight.resident / full.resident == pytest.approx((2 + 8 / 256) / 8, rel=0.01)
    assert paged.resident + paged.paged == full.resident
    assert 0 < paged.paged < full.resident, "state tensors below 100 000 elements are not paged"


def test_rank_costs_memory_linearly():
    counts = [estimated(LLAMA, Setup(rank=rank)).trainable_parameters for rank in (16, 64)]
    assert counts == [41_943_040, 4 * 41_943_040]


def test_ranks_and_layers_by_pattern():
    plain = Setup(rank=8)
    wide = replace(plain, rank_pattern=(("down_proj", 64),))
    few = replace(plain, layers=(0, 1, 2, 3))
    counts = [estimated(LLAMA, setup).trainable_parameters for setup in (plain, wide, few)]
    assert counts[0] == 20_971_520
    assert counts[1] == counts[0] + 32 * (64 - 8) * (14336 + 4096)
    assert counts[2] == counts[0] // 8
    one = replace(plain, rank_pattern=((r"layers.0.self_attn.q_proj", 16),))
    assert estimated(LLAMA, one).trainable_parameters == counts[0] + 8 * (4096 + 4096)
    assert estimated(LLAMA, few).allocated.expected < estimated(LLAMA, plain).allocated.expected
    recipe = Recipe().with_("adapter.rank_pattern", (("down_proj", 64),)).with_("adapter.layers", (0, 1, 2, 5))
    setup = setup_of(recipe)
    assert (setup.rank_pattern, setup.layers) == ((("down_proj", 64),), (0, 1, 2, 5))


def test_verdicts():
    estimate = estimated(LLAMA, Setup(seq_len=2048))
    assert estimate.verdict(estimate.device.high) == "fits"
    assert estimate.verdict(estimate.device.high - 1) == "tight"
    assert estimate.verdict(estimate.device.expected) == "tight"
    assert estimate.verdict(estimate.device.expected - 1) == "does not fit"
    assert estimate.headroom_bytes(estimate.device.expected + 7) == 7


def test_the_card_decides_the_kernel():
    sdpa, ada, turing = Setup(), find_gpu("4090"), find_gpu("T4")
    assert kernel_of(LLAMA, sdpa, ada) == kernel_of(LLAMA, sdpa, None) == "flash"
    assert kernel_of(LLAMA, sdpa, turing) == "efficient"
    assert kernel_of(LLAMA, replace(sdpa, attention="eager"), ada) == "eager"
    assert kernel_of(LLAMA, replace(sdpa, dtype="fp32"), ada) == "efficient"
    gemma2 = shapes()["gemma-2-9b"]
    estimate = estimated(gemma2, sdpa, ada)
    assert estimate.kernel == "eager"
    assert any("eager" in note for note in estimate.notes)


def test_a_window_shorter_than_the_rows_makes_a_mask_and_rules_flash_out():
    mistral = shapes()["Mistral-7B-v0.1"]
    assert mistral.groups[0].layer.window == 4096
    assert kernel_of(mistral, Setup(seq_len=2048), None) == "flash"
    assert kernel_of(mistral, Setup(seq_len=4096), None) == "efficient_masked"


def test_grouped_heads_without_flash_widen_the_range():
    """Of the stock loop; ours repeats keys and values where no kernel takes grouped heads."""
    setup = stock_setup(Setup(seq_len=4096, dtype="fp16"), kbit_prepare=False)
    assert not estimated(LLAMA, Setup(seq_len=4096, dtype="fp16"), find_gpu("T4")).notes
    old, new = (estimated(LLAMA, setup, find_gpu(name)) for name in ("T4", "A100"))
    assert old.allocated.high > 1.2 * new.allocated.high
    assert any("48633" in note for note in old.notes)
    wide = estimated(LLAMA, replace(setup, dtype="fp32", autocast=False), find_gpu("A100"))
    assert any("48633" in note for note in wide.notes), "flash takes no fp32"


def test_experts_are_in_four_bits_in_our_loop_alone():
    mixtral = shapes()["Mixtral-8x7B"]
    lora, qlora = (estimated(mixtral, Setup(method=method)) for method in ("lora", "qlora"))
    assert qlora.components.base < 0.28 * lora.components.base
    assert qlora.held.four_bit_share == 1
    assert qlora.held.kept_16bit_bytes == 2 * (mixtral.parameters - 32 * (8 * 3 * 14336 + 2 * 5120) * 4096)
    assert lora.held.four_bit_share == 0
    stock = estimated(mixtral, stock_setup(Setup(), kbit_prepare=False))
    assert stock.components.base > 0.9 * lora.components.base
    assert any("quantises no fused expert" in note for note in stock.notes)
    assert stock.held.four_bit_share < 0.05
    assert qlora.allocated.high > 1.02 * qlora.allocated.expected


def test_what_is_adapted_of_a_mixture_is_said():
    mixtral = shapes()["Mixtral-8x7B"]
    plain, wide = (estimated(mixtral, Setup(targets=targets)) for targets in ("all-linear", ("all-linear", "experts")))
    assert any("routed experts and routers are not adapted" in note for note in plain.notes)
    assert any("every routed expert has an adapter of its own" in note for note in wide.notes)
    # A stack's A is [experts x rank, in] and its B [out, rank x experts].
    each = 8 * 16 * (4096 + 2 * 14336) + 8 * 16 * (14336 + 4096)
    assert wide.trainable_parameters - plain.trainable_parameters == 32 * each
    with pytest.raises(BadInput, match="chooses or weighs experts"):
        estimated(mixtral, Setup(targets=("q_proj", "gate")))


def test_a_skipped_stack_stays_in_sixteen_bits():
    mixtral = shapes()["Mixtral-8x7B"]
    all_packed, kept = (estimated(mixtral, Setup(precision=table)) for table in ((), (("experts.down_proj", "16bit"),)))
    weights = 32 * 8 * 14336 * 4096
    more = kept.held.kept_16bit_bytes - all_packed.held.kept_16bit_bytes
    assert more == 2 * weights
    assert kept.components.base - all_packed.components.base == pytest.approx(weights * (2 - 0.515869), rel=1e-4)


def test_an_unknown_architecture_gets_a_wide_range_and_says_why():
    config = {key: value for key, value in SMALL_CONFIG.items() if key != "model_type"}
    known, odd = (shape_from_config({**config, "model_type": word}) for word in ("llama", "brand_new"))
    a, b = estimated(known, Setup()), estimated(odd, Setup())
    assert b.allocated.high > 1.2 * a.allocated.high
    assert b.allocated.low < 0.8 * a.allocated.low
    assert any("brand_new" in note for note in b.notes)


def test_a_target_that_the_model_lacks_is_refused_with_the_nearest():
    with pytest.raises(BadInput, match=r"q_porj.*llama.*q_proj"):
        estimated(LLAMA, Setup(targets=("q_porj",)))


def test_a_recipe_becomes_a_set_up():
    recipe = Recipe().with_("adapter.rank", 8).with_("train.optimizer", "paged_adamw_8bit")
    setup = setup_of(recipe)
    assert (setup.engine, setup.rank, setup.optimizer, setup.dtype) == ("studio", 8, "paged_adamw_8bit", "bf16")
    assert setup.autocast
    assert setup_of(recipe, find_gpu("t4")).dtype == "fp16"


def test_the_document_has_the_contract_s_fields():
    setup = Setup(seq_len=2048)
    gpu = find_gpu("4090")
    plan = plan_to_dict(estimated(LLAMA, setup, gpu), LLAMA, setup, gpu=gpu, budget_bytes=gpu.total_bytes)
    promised = "peak_bytes reserved_bytes device_bytes low_bytes high_bytes fits budget_bytes stage components engine"
    assert set(promised.split()) | {"trainable_parameters"} <= set(plan)
    parts = "base adapter gradients optimizer activations logits workspace context"
    assert list(plan["components"]) == parts.split()
    assert plan["low_bytes"] < plan["peak_bytes"] < plan["reserved_bytes"] < plan["device_bytes"] < plan["high_bytes"]
    assert plan["fits"] is True
    assert plan["verdict"] == "fits"
    unknown = plan_to_dict(estimated(LLAMA, setup), LLAMA, setup)
    assert unknown["fits"] is unknown["budget_bytes"] is unknown["verdict"] is None
