"""What the rarer choices cost: offload, whole modules, 8-bit weights, other losses and kernels, a CPU."""

from dataclasses import replace
from typing import Any

import pytest

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import find_gpu
from studio.core.layer_precision import in_sixteen_bit
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.setup import StockSetup, stock_setup
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup
from tests.core.loops import estimated, kernel_of
from tests.core.published_rows import shapes
from tests.core.test_vram import SMALL

LLAMA = shapes()["Llama-3.1-8B"]


def test_offloaded_checkpoints_wait_on_the_host():
    setup = Setup(seq_len=4096)
    near, far = (estimated(LLAMA, replace(setup, offload_checkpoints=value)) for value in (False, True))
    checkpoint = 4096 * LLAMA.hidden * 2
    assert far.host.total == (LLAMA.layers - 1) * checkpoint
    assert near.host.total == 0
    saved = {stage: bytes_ - dict(far.stages)[stage] for stage, bytes_ in near.stages}
    assert saved["forward"] == saved["loss"] == (LLAMA.layers - 1) * checkpoint
    assert 0.8 * saved["forward"] < saved["backward"] < saved["forward"], "the next one comes back early"
    plan = plan_to_dict(far, LLAMA, replace(setup, offload_checkpoints=True))
    assert plan["host_bytes"] == far.host.checkpoints == far.host.total


def test_modules_trained_whole():
    setup = Setup(seq_len=2048)
    plain, head, both = (
        estimated(LLAMA, replace(setup, modules_to_save=names))
        for names in ((), ("lm_head",), ("model.embed_tokens", "lm_head"))
    )
    entries = LLAMA.vocabulary * LLAMA.hidden
    assert head.trainable_parameters == plain.trainable_parameters + entries
    assert both.trainable_parameters == plain.trainable_parameters + 2 * entries
    assert head.components.adapter - plain.components.adapter == 4 * entries, "a trained copy in fp32"
    assert head.components.optimizer - plain.components.optimizer == 8 * entries
    assert head.allocated.expected - plain.allocated.expected >= 16 * entries, "weight, gradient and two moments"
    more = dict(both.stages)["forward"] - dict(head.stages)["forward"]
    assert more == 12 * entries, "its output is cast back: the residual stream stays 16-bit"
    with pytest.raises(BadInput, match=r"modules_to_save names 'lm_haed'.*q_proj"):
        estimated(LLAMA, replace(setup, modules_to_save=("lm_haed",)))


def test_eight_bit_weights_of_the_stock_loop():
    four, eight = (
        estimated(LLAMA, stock_setup(Setup(seq_len=2048, quant_type=quant_type, loss="full"), kbit_prepare=False))
        for quant_type in ("nf4", "int8")
    )
    linears = sum(count * linear.weights for count, linear in LLAMA.all_linears())
    assert eight.components.base - four.components.base == pytest.approx(0.4845 * linears, rel=0.01)
    assert dict(eight.stages)["backward"] > dict(four.stages)["backward"], "its products save their input"


@pytest.mark.parametrize("kbit_prepare", [False, True])
def test_eight_bit_products_keep_their_inputs_outside_of_newer_checkpoints(kbit_prepare: bool):
    def stages(transformers: str, quant_type: Any = "int8") -> dict[str, int]:
        setup = Setup(seq_len=2048, quant_type=quant_type, loss="full")
        stock = stock_setup(setup, kbit_prepare=kbit_prepare, transformers=transformers)
        return dict(estimated(LLAMA, stock).stages)

    old, new = stages("4.57"), stages("5.24")
    layer = LLAMA.groups[0].layer
    itemsize = 4 if kbit_prepare else 2
    a_token = itemsize * (2 * LLAMA.hidden + layer.mlp[2].inputs) + 2 * layer.out.inputs  # attention is 16-bit
    for stage in ("forward", "loss", "backward"):
        assert new[stage] - old[stage] == pytest.approx(2048 * LLAMA.layers * a_token, rel=0.05), stage
    assert (new["eval"], new["load"]) == (old["eval"], old["load"]), "nothing is kept without a graph"
    assert stages("4.57", "nf4")["forward"] == stages("5.24", "nf4")["forward"]


def test_liger_s_kernel_and_the_flash_attn_package():
    full, chunked, liger = (
        estimated(LLAMA, Setup(seq_len=8192, loss=loss)).allocated.expected for loss in ("full", "chunked", "liger")
    )
    assert liger < full
    assert chunked < full
    mistral, long = shapes()["Mistral-7B-v0.1"], Setup(seq_len=8192)
    assert kernel_of(mistral, long, None) == "efficient_masked"
    assert kernel_of(mistral, replace(long, attention="flash_attention_2"), None) == "flash"
    assert kernel_of(LLAMA, replace(long, attention="flash_attention_2"), find_gpu("T4")) == "efficient"


def test_a_cpu_has_tensors_and_nothing_else():
    card, cpu = (estimated(LLAMA, Setup(device=device)) for device in ("cuda", "cpu"))
    assert cpu.device == cpu.reserved == cpu.allocated
    assert cpu.components.context == 0
    assert cpu.components.workspace == 0
    assert cpu.allocated.expected < card.allocated.expected
    assert any("Python" in note for note in cpu.notes)
    dropped = estimated(SMALL, Setup(method="lora", device="cpu", dropout=0.1, recompute="none"))
    fused = estimated(SMALL, Setup(method="lora", dropout=0.1, recompute="none"))
    assert dropped.components.activations > fused.components.activations, "its dropout keeps noise of the input's size"


def test_modules_that_stay_in_sixteen_bits():
    def base(*names: str) -> int:
        return estimated(LLAMA, Setup(precision=in_sixteen_bit(names))).components.base

    layer = sum(linear.weights for linear in LLAMA.groups[0].layer.linears)
    down = LLAMA.groups[0].layer.mlp[2].weights
    wider = 2 - 0.515869
    assert base("model.layers.0") - base() == pytest.approx(wider * layer, rel=1e-3)
    assert base("model.layers.1") == base("model.layers.0"), "not layers 10 to 19 as well"
    assert base("down_proj") - base() == pytest.approx(wider * down * LLAMA.layers, rel=1e-3)
    assert base("model.layers.3.mlp.down_proj") - base() == pytest.approx(wider * down, rel=1e-3)
    mlp = sum(linear.weights for linear in LLAMA.groups[0].layer.mlp)
    assert base("model.layers.3.mlp") - base() == pytest.approx(wider * mlp, rel=1e-3), "not its attention"
    assert base("model.layers.3.self_attn") - base() == pytest.approx(wider * (layer - mlp), rel=1e-3)


def test_a_family_whose_linears_nobody_quantises_says_so():
    estimate = estimated(shapes()["falcon-7b"], Setup())
    assert any("falcon" in note and "refuses" in note for note in estimate.notes)


def test_rows_longer_than_the_model_s_positions_are_noted() -> None:
    shape = shapes()["phi-1_5"]
    assert shape.positions == 2048
    assert not estimated(shape, Setup(seq_len=2048)).notes
    assert "2048 positions" in estimated(shape, Setup(seq_len=4096)).notes[0]


def test_mixtral_held_rotary_tables_in_every_layer() -> None:
    setups = [StockSetup(targets=("q_proj",), transformers=version) for version in ("4.45.2", "4.48.1")]
    older, later = (estimated(shapes()["Mixtral-8x7B"], setup).components.base for setup in setups)
    assert older - later == 512 * 2**20


def test_experts_that_were_never_modules_stay_unquantised_in_every_version() -> None:
    """GraniteMoe holds its experts as one tensor in transformers 4 too."""
    config = {
        "model_type": "granitemoe",
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 512,
    }
    shape = shape_from_config(config)
    setups = [
        stock_setup(Setup(seq_len=128, loss="full"), kbit_prepare=False, transformers=version)
        for version in ("4.45.2", "5.24", "")
    ]
    bases = {estimated(shape, setup).components.base for setup in setups}
    assert len(bases) == 1
    assert bases.pop() > 2 * shape.expert_parameters
    assert not any("--transformers" in note for note in estimated(shape, setups[2]).notes)


def test_our_estimate_refuses_a_set_up_of_another_loop():
    with pytest.raises(ValueError, match="not of hf"):
        estimate_vram(LLAMA, StockSetup())
