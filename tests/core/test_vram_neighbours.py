"""Rows of the same public benchmark that are not among the published rows and that no constant was chosen on.

They are not blind: the tables that they stand in were read while the kernels' mechanisms were looked for.

Source: github foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/{a100_80gb, a100_80gb_liger,
a100_80gb_granite, a100_80gb_update_cross_entropy_and_deps}.csv: one A100-SXM4-80GB, rank 16 on q, k, v and o, 4096
tokens per row, checkpointing, the flash-attn package, dropout 0.1. Allocated bytes.
"""

import statistics
from dataclasses import replace
from typing import Any

import pytest

from studio.core.gpu_catalogue import find_gpu
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.setup import StockSetup, stock_setup
from tests.core.loops import estimated
from tests.core.published_rows import shapes

LLAMA, MISTRAL, MIXTRAL, POWER, LLAMA_70B = (
    "Meta-Llama-3-8B",
    "Mistral-7B-v0.1",
    "Mixtral-8x7B",
    "PowerLM-3b",
    "Llama-2-70b-hf",
)
A100 = find_gpu("A100-SXM4-80GB")
OLD, LATER = "4.45.2", "4.48.1"

ROWS = [
    # model, method, kernels and loss, version, rows in a micro-batch: bytes
    (LLAMA, "lora", "foak", OLD, {4: 37_644_015_616, 8: 59_017_447_424}),
    (LLAMA, "lora", "foak-liger", OLD, {4: 24_905_936_896}),
    (LLAMA, "qlora", "foak", OLD, {8: 48_632_712_192}),
    (LLAMA, "qlora", "foak-liger", OLD, {4: 14_411_297_792, 8: 22_936_744_960, 32: 74_089_427_968}),
    (MISTRAL, "lora", "", OLD, {4: 25_653_881_344, 8: 36_643_613_184}),
    (MISTRAL, "lora", "foak", OLD, {4: 24_068_304_384, 8: 33_470_361_088}),
    (MISTRAL, "qlora", "", OLD, {4: 15_323_147_776, 8: 26_312_879_616}),
    (MISTRAL, "qlora", "foak", OLD, {4: 13_064_809_472, 8: 21_823_466_496}),
    (MISTRAL, "qlora", "upcast", OLD, {4: 20_556_796_416, 8: 36_801_860_096}),
    (MISTRAL, "lora", "", LATER, {4: 26_704_571_904}),
    (MISTRAL, "qlora", "", LATER, {4: 16_373_838_336, 8: 28_412_178_944}),
    (MISTRAL, "qlora", "foak", LATER, {4: 14_115_336_192, 8: 23_922_438_144}),
    (MIXTRAL, "qlora", "", OLD, {4: 36_218_023_424, 8: 47_207_755_264}),
    (MIXTRAL, "qlora", "foak", LATER, {4: 34_473_340_928, 8: 44_280_442_880}),
    (LLAMA_70B, "qlora", "", LATER, {4: 68_126_381_056}),
    (LLAMA_70B, "qlora", "foak", LATER, {4: 67_048_903_680}),
    (POWER, "lora", "", OLD, {4: 20_193_463_808}),
    (POWER, "qlora", "", OLD, {8: 28_134_687_232}),
    (POWER, "qlora", "foak", OLD, {4: 11_831_656_448}),
    (POWER, "qlora", "upcast", OLD, {4: 18_174_161_920, 8: 34_177_070_080}),
]
CASES = [(*row[:4], batch, measured) for row in ROWS for batch, measured in row[4].items()]


def setup_of(method: Any, what: str, version: str, batch: int, *, autocast: bool) -> StockSetup:
    return StockSetup(
        method=method,
        targets=("q_proj", "k_proj", "v_proj", "o_proj"),
        dropout=0.1,
        micro_batch=batch,
        seq_len=4096,
        attention="flash_attention_2",
        loss="liger" if "liger" in what else "full",
        fused_kernels="foak" if "foak" in what else "none",
        kbit_prepare=what == "upcast",
        head_cast_back=what == "upcast",
        autocast=autocast,
        transformers=version,
    )


def error(case: Any, **changes: Any) -> float:
    model, method, what, version, batch, measured = case
    # The Llama rows are of a file that says bf16=True; of 16-bit Mistral and PowerLM none does.
    setup = setup_of(method, what, version, batch, autocast=method == "qlora" or model == LLAMA)
    if changes:
        setup = stock_setup(
            replace(setup, attention="sdpa", **changes),
            kbit_prepare=setup.kbit_prepare,
            fused_kernels=setup.fused_kernels,
            gpu=A100,
        )
    return estimated(shapes()[model], setup, A100).allocated.expected / measured - 1


def test_rows_that_were_never_looked_at() -> None:
    found = [abs(error(case)) for case in CASES]
    assert len(found) >= 30
    assert statistics.median(found) <= 0.0005
    assert max(found) <= 0.003


@pytest.mark.parametrize("case", [case for case in CASES if case[0] != MIXTRAL])
def test_flags_without_loop_and_version(case: Any) -> None:
    """Whoever does not say the version of transformers gets the mean of its losses."""
    assert -0.05 <= error(case, head_cast_back=False) <= 0.10


SANTACODER = {
    "model_type": "gpt_bigcode",
    "n_embd": 2048,
    "n_inner": 8192,
    "n_layer": 24,
    "n_head": 16,
    "n_positions": 2048,
    "multi_query": True,
    "vocab_size": 49280,
    "activation_function": "gelu_pytorch_tanh",
}


@pytest.mark.parametrize(
    ("version", "what", "batch", "measured"),
    [
        (OLD, "", 4, 9_148_997_120),
        (OLD, "", 8, 17_486_716_416),
        (OLD, "foak", 4, 7_538_417_152),
        (OLD, "foak", 8, 14_264_901_120),
        (LATER, "", 8, 17_486_716_416),
        (LATER, "foak", 8, 14_264_901_120),
    ],
)
def test_gpt_bigcode(version: str, what: str, batch: int, measured: int) -> None:
    """Its own loss and dropouts, its cache under checkpointing, learnt positions and layer norms; rows of 2048 tokens.

    That the estimate holds some 10 KB per token too much, and 28 MB too little of what lies still, is unexplained.
    """
    setup = replace(setup_of("qlora", what, version, batch, autocast=True), seq_len=2048, targets=("c_attn",))
    assert abs(estimated(shape_from_config(SANTACODER), setup, A100).allocated.expected / measured - 1) <= 0.009
