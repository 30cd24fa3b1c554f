"""Modules trained whole beside the adapter: fp32 masters, saved and resumed with it; unknown names are refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM

from studio.core.errors import JobFailed
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.train import between
from studio.jobs.train.adapter import attach_adapter
from studio.runs.control import request, withdraw_all
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_initialisation import logits
from tests.jobs.test_resume import at_step, weights


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("modules", [("lm_head",), ("embed_tokens", "lm_head"), ("norm",)])
def test_what_was_trained_is_what_is_saved(
    train: Train, recipe: Recipe, tiny: Path, monkeypatch: pytest.MonkeyPatch, modules: tuple[str, ...], init: str
) -> None:
    at_end: list[torch.Tensor] = []
    save = between.save_adapter

    def saving(model: PeftModel, *rest: object) -> int:
        at_end.append(logits(model))
        return save(model, *rest)

    monkeypatch.setattr(between, "save_adapter", saving)
    paths = train(recipe.with_("adapter.modules_to_save", modules).with_("adapter.init", init))
    history = history_of(paths)
    assert history.failed is None, history.failed
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = {name: p.clone() for name, p in base.named_parameters()}
    loaded = PeftModel.from_pretrained(base, str(paths.adapter))
    torch.testing.assert_close(logits(loaded), at_end[0], rtol=1e-3, atol=1e-3)
    for module in modules:
        (name,) = (name for name in before if name.endswith(f"{module}.weight") and "layers" not in name)
        trained = loaded.get_parameter(f"base_model.model.{name.removesuffix('weight')}modules_to_save.default.weight")
        assert not torch.equal(trained, before[name]), module


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_masters_are_fp32_and_the_stream_stays_as_it_is(tiny: Path, method: str) -> None:
    from tests.core.test_vram_real_step import four_bit

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    if method == "qlora":
        four_bit(base, torch.bfloat16)
    section = AdapterSection(rank=4, modules_to_save=("embed_tokens", "lm_head"))
    model = attach_adapter(base, section, recompute="all")
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert len(wrappers) == 2
    for wrapper in wrappers:
        assert wrapper.modules_to_save["default"].weight.dtype == torch.float32
        assert wrapper.original_module.weight.dtype == torch.bfloat16
    seen: list[torch.dtype] = []
    base.model.layers[0].register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = model(torch.arange(8)[None]).logits
    assert seen == [torch.bfloat16]
    assert made.dtype == torch.bfloat16


def test_resumed_equals_uninterrupted(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe.with_("adapter.modules_to_save", ("lm_head",)).with_("method", "qlora")
    whole = train(recipe)
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    withdraw_all(parts)
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


@pytest.mark.parametrize(
    ("name", "words"), [("lm_hed", "which this model does not have"), ("down_proj", "held in 4 bits")]
)
def test_names_that_mean_nothing_are_refused(tiny: Path, name: str, words: str) -> None:
    from tests.core.test_vram_real_step import four_bit

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    four_bit(base, torch.bfloat16)
    with pytest.raises(JobFailed) as caught:
        attach_adapter(base, AdapterSection(modules_to_save=(name,)), recompute="none")
    assert words in str(caught.value)


def test_a_target_that_is_trained_whole_needs_no_adapter(train: Train, recipe: Recipe) -> None:
    history = history_of(train(recipe.with_("adapter.modules_to_save", ("down_proj",))))
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < history.train.losses[0]
