"""The replay against the stock loop itself: transformers and peft on fake tensors, every storage followed.

What is traced goes through the same allocator: a difference is one of order, or of a tensor that one of them forgot.
"""

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.stock.allocator import Block, CachingAllocator
from studio.core.stock.replay import load, replayed
from studio.core.stock.setup import StockSetup
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES
from studio.jobs.measure.card import card_habits
from studio.jobs.measure.fake import fake_world
from studio.jobs.measure.storages import StorageLog, Storages
from studio.jobs.measure.weightless import config_of, weightless_base

CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
STOCK = StockSetup(
    targets=TARGETS,
    rank=32,
    micro_batch=2,
    seq_len=1024,
    loss="full",
    dtype="fp16",
    double_quant=False,
    autocast=False,
    outputs_kept=True,
    transformers="5.24",
)


def traced(setup: StockSetup) -> StorageLog:
    """Return what two steps of a plain loop over the stock model allocate and free, loading left out."""
    recipe = Recipe().with_("method", setup.method).with_("train.attention", setup.attention)
    recipe = recipe.with_("model.double_quant", setup.double_quant)
    storages = Storages()
    with fake_world() as numbers, torch.random.fork_rng(devices=[]), ExitStack() as stack:
        base: Any = weightless_base(config_of(CONFIG), recipe, torch.float16, "cuda", storages)
        stack.enter_context(storages)
        stack.enter_context(card_habits(storages, (7, 5)))
        base.config.use_cache = False
        if setup.kbit_prepare:
            base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=setup.recomputes)
        adapter = LoraConfig(r=setup.rank, target_modules=list(setup.targets), task_type="CAUSAL_LM")
        model: Any = get_peft_model(base, adapter)
        if setup.recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)
        ids = numbers.batch(lambda: {"ids": torch.zeros(setup.micro_batch, setup.seq_len, dtype=torch.long)})["ids"]

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            out = model(input_ids=ids, labels=ids)
            out.loss.backward()
            optimizer.step()

        storages.stage("steps")
        step()
        step()
    return storages.log


def reserved_by_trace(setup: StockSetup) -> tuple[int, int]:
    """Return the most bytes of blocks and of segments when what was traced goes through the allocator."""
    log, allocator = traced(setup), CachingAllocator()
    load(allocator, shape_from_config(CONFIG), setup, 1)
    blocks: dict[int, Block] = {}
    events = log.events[log.stages[-1][0] :]
    for event, following in zip(events, [*events[1:], None], strict=True):
        first = log.sums.get(event, -1)
        if event >= 0 and following == ~first and log.sizes[first] == log.sizes[event]:
            blocks[event] = blocks.pop(first)  # added in place where nobody looks (StorageLog.really)
        elif event < 0 and ~event in blocks:
            allocator.release(blocks.pop(~event))
        elif event >= 0 and log.sizes[event]:
            blocks[event] = allocator.allocate(log.sizes[event])
    return allocator.most_allocated, allocator.most_reserved


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_replayed_step_is_the_stock_loops(method: Any, recompute: Any, attention: Any):
    setup = replace(
        STOCK,
        method=method,
        kbit_prepare=method == "qlora",
        recompute=recompute,
        attention=attention,
    )
    kernel = "eager" if attention == "eager" else "efficient"
    peak = replayed(shape_from_config(CONFIG), setup, kernel, workspace=CUBLAS_WORKSPACE_BYTES)
    allocated, reserved = reserved_by_trace(setup)
    assert peak.allocated == pytest.approx(allocated, rel=0.002)
    # Eager attention kept whole: one block of 250 MiB more or less, after a sum that the trace makes out of place.
    chaotic = method == "lora" and attention == "eager" and recompute == "none"
    assert peak.reserved == pytest.approx(reserved, rel=0.12 if chaotic else 0.02)
