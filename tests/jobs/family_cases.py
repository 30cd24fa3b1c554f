"""What this program promises for a family: its plan, its trace, its trainings, its adapter elsewhere, its merge."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor

from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import Range
from studio.core.vram.setup import setup_of
from studio.core.vram.stages import CUBLAS_WORKSPACE_BYTES
from studio.jobs.measure.trace import Target, trace
from studio.jobs.train.between import Between
from studio.probe.measure import base_config
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from tests.fakes.families import FAMILIES, without_timm
from tests.jobs.merge_cases import IDS, our_merge, our_steps, tensors_of


@dataclass(frozen=True)
class Logits:
    """Logits `[1, seq, vocabulary]` of a model with its adapter, and without."""

    adapted: Tensor
    plain: Tensor

    @property
    def effect(self) -> Tensor:
        """What the adapter changes."""
        return self.adapted - self.plain


@dataclass(frozen=True)
class Trained:
    """A finished training: its folder, its losses, and its model's logits before the adapter was saved."""

    paths: RunPaths
    losses: list[float]
    logits: Logits


@contextmanager
def last_logits() -> Iterator[list[Logits]]:
    """Keep the logits of what is trained inside the context, as each adapter is saved."""
    seen: list[Logits] = []
    save = Between.save_adapter

    def keep(self: Between, step: int) -> None:
        seen.append(logits_of(self.step_model.model))
        save(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Between, "save_adapter", keep)
        yield seen


@torch.no_grad()
def logits_of(model: PeftModel) -> Logits:
    """The logits of `IDS` with the adapter, and without."""
    training = model.training
    model.eval()
    called: Any = model
    if type(model.get_base_model()).__name__ == "Llama4ForConditionalGeneration":
        # In transformers 5.24 it fails on text alone: what its language model gives has no `image_outputs`.
        called = model.get_base_model().language_model
    adapted = called(input_ids=IDS).logits.float().clone()
    with model.disable_adapter():
        plain = called(input_ids=IDS).logits.float().clone()
    model.train(training)
    return Logits(adapted, plain)


def dead_modules(adapter: Path) -> list[str]:
    """The adapted modules whose B is still zero, as it was before the first step."""
    weights = load_file(adapter / ADAPTER_WEIGHTS)
    return [name for name, weight in weights.items() if "lora_B" in name and not weight.any()]


def on_its_own_class(folder: Path, family: str, adapter: Path) -> PeftModel:
    """Plain peft on the class that the checkpoint names, fp32; every key of the adapter must be met."""
    with without_timm():
        base = getattr(transformers, FAMILIES[family].architecture).from_pretrained(folder, dtype=torch.float32)
    model = PeftModel(base, PeftConfig.from_pretrained(str(adapter)), "default")
    seen = model.load_adapter(str(adapter), "default", torch_device="cpu")
    assert not seen.unexpected_keys, seen.unexpected_keys[:3]
    assert not seen.missing_keys, seen.missing_keys[:3]
    return model.eval()


def traced_recipe(folder: Path, method: str) -> Recipe:
    """The recipe whose step is planned and traced."""
    recipe = Recipe()
    values = {
        "method": method,
        "model.base": str(folder),
        "model.dtype": "bf16",
        "adapter.rank": 8,
        "train.seq_len": 1024,
        "train.micro_batch": 1,
        "train.accumulation": 1,
    }
    for path, value in values.items():
        recipe = recipe.with_(path, value)
    assert recipe.problems() == ()
    return recipe


def planned(shape: ModelShape, recipe: Recipe) -> Range:
    """Estimated bytes of live tensors on a card of compute capability 8.0.

    cuBLAS's workspaces are left out: two layers are so small that these would hide what is wrong with the rest.
    """
    whole = estimate_vram(shape, setup_of(recipe)).allocated
    return Range(*(size - CUBLAS_WORKSPACE_BYTES for size in (whole.low, whole.expected, whole.high)))


def traced(recipe: Recipe) -> int:
    """Traced bytes of live tensors on such a card at the highest point of a step, without the same."""
    log = trace(recipe, base_config(recipe.model.base), Target("cuda", recipe.model.dtype)).log
    return max(map(height, log.peaks().values())) - CUBLAS_WORKSPACE_BYTES


def fp32_merge(folder: Path, family: str, adapter: Path, out: Path) -> dict[str, Tensor]:
    """The tensors on disk after peft's own merge in fp32 on the checkpoint's class, cast once to bf16."""
    merged = on_its_own_class(folder, family, adapter).merge_and_unload(safe_merge=True)
    merged.to(torch.bfloat16).save_pretrained(out)
    names = FAMILIES[family].named
    return {_on_hub(key, names): value for key, value in tensors_of(out).items()}


def _on_hub(key: str, names: Any) -> str:
    found = next((written for written in names if key.startswith(written)), None)
    # What was loaded with the hub's names is written with them again by some versions of transformers.
    if found is None or key.startswith(names[found]):
        return key
    return str(names[found]) + key.removeprefix(found)


def our_merged(folder: Path, adapter: Path) -> dict[str, Tensor]:
    """The tensors that our merge makes."""
    return our_merge(our_steps(folder, adapter))
