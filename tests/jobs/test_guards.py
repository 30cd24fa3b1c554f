"""Each guard against a silently wasted run, provoked by a model or data that really has the fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from studio.core.errors import JobFailed
from studio.core.events import Failed
from studio.core.recipe import Recipe
from studio.jobs.train.guards import check_adapter
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import Train, history_of


def failure(train: Train, recipe: Recipe) -> Failed:
    paths = train(recipe)
    failed = history_of(paths).failed
    assert failed is not None
    assert failed.advice
    assert not paths.adapter.exists()
    return failed


def broken_model(folder: Path, change: Callable[[torch.nn.Module], None]) -> str:
    make_tiny_model(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    return str(folder)


def test_nonfinite_loss(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    def poison(model: torch.nn.Module) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan

    seen = failure(train, recipe.with_("model.base", broken_model(tmp_path / "nan", poison)))
    assert seen.failure == "nonfinite_loss"
    assert "nan at step 1" in seen.message


def test_nonfinite_gradient(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    """A head so large that the loss is still a number but the square of its gradient is not."""

    def blow_up(model: torch.nn.Module) -> None:
        model.lm_head.weight.mul_(1e25)

    seen = failure(train, recipe.with_("model.base", broken_model(tmp_path / "inf", blow_up)))
    assert seen.failure == "nonfinite_gradient"


def test_a_learning_rate_that_explodes_is_stopped_and_leaves_no_adapter(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.learning_rate", 1.0).with_("adapter.alpha", 4096.0).with_("model.dtype", "fp16")
    recipe = recipe.with_("train.max_grad_norm", 0.0).with_("train.steps", 400)
    assert failure(train, recipe).failure in ("nonfinite_loss", "nonfinite_gradient")


def test_zero_loss(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    """A model that is certain of the end token, and data that holds nothing else."""

    def certain(model: torch.nn.Module) -> None:
        model.model.embed_tokens.weight[:, 0] = 100.0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[257, 0] = 1e4

    data = tmp_path / "ends.jsonl"
    data.write_text("\n".join(json.dumps({"text": "<|im_end|>" * size}) for size in (3, 4, 5, 6)))
    recipe = recipe.with_("model.base", broken_model(tmp_path / "certain", certain)).with_("data.path", str(data))
    assert failure(train, recipe).failure == "zero_loss"


def test_all_labels_masked(train: Train, recipe: Recipe) -> None:
    """A length at which every answer is cut off."""
    seen = failure(train, recipe.with_("train.seq_len", 8))
    assert seen.failure == "all_labels_masked"
    assert "seq_len" in seen.advice


def no_gradient(model: torch.nn.Module) -> None:
    """With a zero output projection nothing that the attention's adapters do reaches the loss."""
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()


def test_adapter_that_does_not_move(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_("model.base", broken_model(tmp_path / "dead", no_gradient))
    seen = failure(train, recipe.with_("adapter.targets", ("q_proj", "v_proj")))
    assert seen.failure == "adapter_not_moving"
    assert seen.step == 3


def test_adapter_of_zeros_is_no_success(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_("model.base", broken_model(tmp_path / "dead", no_gradient)).with_("train.steps", 2)
    assert failure(train, recipe.with_("adapter.targets", ("v_proj",))).failure == "adapter_zero"


def test_adapter_with_nan_is_no_success() -> None:
    weights = {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.tensor([[1.0, torch.nan]])}
    with pytest.raises(JobFailed) as caught:
        check_adapter(weights)
    assert caught.value.kind == "adapter_nonfinite"
    check_adapter({name: weight.nan_to_num() for name, weight in weights.items()})
