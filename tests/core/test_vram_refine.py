"""What a plan makes of a replay: which estimates it refines, and which it leaves as they are."""

from dataclasses import replace

import pytest

from studio.core.gpu_catalogue import find_gpu
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.refine import refined
from studio.core.vram.setup import Setup
from tests.core.published_rows import shapes

STOCK = Setup(engine="hf", method="lora", loss="full", micro_batch=1, seq_len=1024, transformers="5.24")


def test_only_reserved_and_device_bytes_of_the_stock_loop_change():
    shape, gpu = shapes()["TinyLlama-1.1B"], find_gpu("4090")
    before = estimate_vram(shape, STOCK, gpu)
    after = refined(before, shape, STOCK, gpu)
    assert replace(after, reserved=before.reserved, device=before.device) == before
    assert after.reserved != before.reserved
    moved = after.reserved.expected - before.reserved.expected
    assert after.device.expected - before.device.expected == moved
    for bounds in (after.reserved, after.device):
        assert bounds.low <= bounds.expected <= bounds.high


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("TinyLlama-1.1B", {"engine": "studio", "loss": "chunked"}),
        ("TinyLlama-1.1B", {"device": "cpu"}),
        ("TinyLlama-1.1B", {"modules_to_save": ("lm_head",)}),
        ("TinyLlama-1.1B", {"gpus": 2, "rank": 128}),
        ("Mixtral-8x7B", {"targets": ("q_proj", "v_proj")}),
    ],
)
def test_what_the_replay_does_not_follow_stays_as_it_is(model: str, changes: dict[str, object]):
    shape, setup = shapes()[model], replace(STOCK, **changes)
    before = estimate_vram(shape, setup)
    assert refined(before, shape, setup) is before


def test_threads_that_read_ahead_widen_what_loading_quantised_weights_leaves():
    """transformers 5 reads in two to four threads: the estimate is the mean of what they leave behind."""
    shape = shapes()["Qwen2.5-1.5B"]
    setup = replace(STOCK, method="qlora", dtype="fp16", kbit_prepare=True, autocast=False, outputs_kept=True)
    threads = refined(estimate_vram(shape, setup), shape, setup).reserved.expected
    alone = refined(estimate_vram(shape, setup), shape, replace(setup, transformers="4.49")).reserved.expected
    assert threads > alone
