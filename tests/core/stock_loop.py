"""A step of the stock loop on fake tensors: transformers' model and loss, peft, accelerate's autocast, torch's AdamW.

What a card does otherwise is put back by hand (studio.jobs.measure.card). Nothing of this program's own loop runs.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import torch
from accelerate.utils.operations import convert_to_fp32
from peft import LoraConfig, get_peft_model
from torch import nn

from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.core.vram.setup import Setup
from studio.jobs.measure.card import card_habits
from studio.jobs.measure.fake import Numbers, fake_world
from studio.jobs.measure.step import _staged
from studio.jobs.measure.storages import Storages
from studio.jobs.measure.weightless import config_of, weightless_base

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def traced_stages(values: dict[str, Any], setup: Setup) -> dict[str, int]:
    """Return the peak of live bytes in forward, loss, backward and optimizer step, on compute capability 8.0.

    Args:
        values: The model's config.json.
        setup: How it is trained, by the newest transformers.
    """
    recipe = Recipe().with_("method", setup.method).with_("model.dtype", setup.dtype)
    recipe = recipe.with_("train.attention", setup.attention).with_("model.double_quant", setup.double_quant)
    storages = Storages(block_bytes=512)
    with fake_world() as numbers, torch.random.fork_rng(devices=[]), _autocast_of_a_card():
        storages.stage("load")
        base = weightless_base(config_of(values), recipe, DTYPES[setup.dtype], "cuda", storages)
        with ExitStack() as stack:
            stack.enter_context(storages)
            stack.enter_context(card_habits(storages, (8, 0)))
            _train(_adapted(base, setup), setup, storages, numbers)
    return {name: height(parts) for name, parts in storages.log.peaks().items() if name != "load"}


@contextmanager
def _autocast_of_a_card() -> Iterator[None]:
    """Let peft, which asks for a card's autocast, hear of the one that stands for it here."""
    asked = torch.is_autocast_enabled
    with patch.object(torch, "is_autocast_enabled", lambda kind="cpu": asked("cpu" if kind == "cuda" else kind)):
        yield


def _adapted(base: Any, setup: Setup) -> Any:
    if setup.quantised and setup.kbit_prepare:
        _upcast(base)
    if setup.recomputes:
        base.activation_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    base.config.use_cache = False
    names = setup.targets if isinstance(setup.targets, str) else list(setup.targets)
    lora = LoraConfig(r=setup.rank, lora_dropout=setup.dropout, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def _upcast(base: nn.Module) -> None:
    """Do as peft's `prepare_model_for_kbit_training`, which sets `param.data`: fake tensors cannot."""
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for module in base.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
                made.setdefault(id(weight), (weight, nn.Parameter(weight.data.float(), requires_grad=False)))
                module._parameters[name] = made[id(weight)][1]


def _train(model: Any, setup: Setup, storages: Storages, numbers: Numbers) -> None:
    """Take two steps: in the second one the optimizer's state is there from the start."""
    causal = model.get_base_model()
    vocabulary = causal.get_input_embeddings().weight.shape[0]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], foreach=True)

    def batch() -> dict[str, Any]:
        ids = torch.arange(setup.seq_len).remainder(vocabulary).repeat(setup.micro_batch, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

    with _staged(cast(Any, SimpleNamespace(causal=causal)), storages):
        for _ in range(2):
            with torch.autocast("cpu", dtype=DTYPES[setup.dtype]) if setup.autocast else nullcontext():
                outputs = model(**numbers.batch(batch))
            loss = (convert_to_fp32(outputs) if setup.autocast else outputs).loss
            held = outputs if setup.outputs_kept else None
            del outputs
            loss.backward()
            storages.stage("optimizer")
            optimizer.step()
            optimizer.zero_grad()
            del loss, held
