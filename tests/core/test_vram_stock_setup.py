"""What a stock loop is taken to be where its settings are not stated, and what its versions differ in."""

from dataclasses import replace

import pytest

from studio.core.errors import BadInput
from studio.core.gpu_catalogue import find_gpu
from studio.core.stock.setup import stock_setup
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup
from tests.core.loops import estimated
from tests.core.test_vram import LLAMA


def test_an_unsaid_stock_loop_is_taken_as_those_that_were_measured():
    def habits(setup: Setup, gpu: str = "") -> tuple[bool, bool, bool]:
        stock = stock_setup(setup, gpu=find_gpu(gpu) if gpu else None)
        assert stock.engine == "hf"
        return stock.kbit_prepare, stock.autocast, stock.outputs_kept

    quantised, half = Setup(), Setup(dtype="fp16")
    assert habits(quantised) == (True, True, False), "the Trainer"
    assert habits(half, "A100") == (True, True, False)
    assert habits(half) == habits(half, "T4") == (True, False, True), "a plain loop in fp16"
    assert habits(replace(quantised, method="lora")) == (False, False, False)
    assert not habits(replace(quantised, dtype="fp32"))[1]


def test_versions_of_transformers_hold_other_logits():
    def stock(version: str, micro_batch: int = 4, *, kept: bool = False) -> VramEstimate:
        setup = Setup(method="lora", micro_batch=micro_batch, seq_len=2048, loss="full")
        return estimated(LLAMA, stock_setup(setup, transformers=version, outputs_kept=kept))

    entry = 4 * 2048 * LLAMA.vocabulary
    copying, newest, unsaid = stock("4.48.1"), stock("5.24.0"), stock("")
    # The copy makes the forward the peak, where the head's input and autocast's copies are alive too.
    assert copying.allocated.expected - newest.allocated.expected == pytest.approx(2 * entry, rel=0.04)
    mean = (copying.allocated.expected + newest.allocated.expected) / 2
    assert unsaid.allocated.expected == pytest.approx(mean, abs=8)
    assert unsaid.allocated.low <= newest.allocated.expected < copying.allocated.expected <= unsaid.allocated.high
    assert stock("4.48.1", 1).allocated.expected == stock("5.24", 1).allocated.expected, "one row needs no copy"
    held = [stock(v, kept=True).allocated.expected - stock(v).allocated.expected for v in ("4.44", "5.24")]
    assert held[0] > 1.8 * held[1] > 0, "up to 4.45 the outputs are fp32"


@pytest.mark.parametrize("word", ["5", "x.y", "4.48b", "-1.2", "99999.1", "\x1b[31m"])
def test_a_version_that_is_none_is_refused(word: str):
    with pytest.raises(BadInput, match="transformers"):
        stock_setup(Setup(), transformers=word)
