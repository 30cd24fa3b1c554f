"""Adapted linears on one input keep one copy of it: what a further one adds to the bytes kept is its low-rank part."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from studio.core.recipe import AdapterSection
from studio.jobs.measure.weightless import frozen_tensors
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel
from tests.core.test_vram_real_step import four_bit
from tests.fakes.live_bytes import LiveBytes

HIDDEN, INNER, LAYERS, TOKENS, RANK = 256, 704, 2, 2 * 96, 8
WIDTHS = {"q_proj": 256, "k_proj": 128, "v_proj": 128, "gate_proj": INNER, "up_proj": INNER}


def kept_bytes(method: str, dtype: torch.dtype, targets: tuple[str, ...]) -> int:
    """What the forward leaves behind for the backward."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    base = LlamaForCausalLM(config).to(dtype)
    if method == "nf4":
        four_bit(base, dtype)
    base.requires_grad_(False)
    model = attach_adapter(base, AdapterSection(rank=RANK, targets=targets), recompute="none")

    def autocast() -> Any:
        return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)

    step_model = StepModel(model, "chunked", autocast).train()
    ids = torch.randint(0, 512, (2, TOKENS // 2))
    with LiveBytes() as storages:
        for tensor in frozen_tensors(model):
            storages.track(tensor)
        before = storages.live
        loss = step_model({"input_ids": ids, "labels": ids})
        kept = storages.live - before
        loss.backward()
    return kept


@pytest.mark.parametrize("method", ["lora", "nf4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("first", "more"), [(("q_proj",), ("k_proj", "v_proj")), (("q_proj", "gate_proj"), ("up_proj",))]
)
def test_a_further_linear_adds_no_input(
    method: str, dtype: torch.dtype, first: tuple[str, ...], more: tuple[str, ...]
) -> None:
    size = dtype.itemsize
    few, several = (kept_bytes(method, dtype, targets) for targets in (first, (*first, *more)))
    added = LAYERS * len(more) * TOKENS * RANK * size  # A's output
    if size == 2:
        # The 16-bit forms of A and B; of A only where its input wants a gradient, which the embeddings do not.
        inputs = LAYERS - ("k_proj" in more)
        added += sum(RANK * (inputs * HIDDEN + LAYERS * WIDTHS[name]) * size for name in more)
    assert several - few == added
    assert added < TOKENS * HIDDEN * size * len(more), "a private copy in one layer would be more"
