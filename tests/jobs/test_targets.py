"""Which modules are trained: layers, ranks and alphas by module, the rate of B; names that mean nothing are refused."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from studio.core.errors import JobFailed
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.optimizer import build_optimizer, set_learning_rate
from tests.jobs.conftest import Train, history_of


def adapted(tiny: Path, **section: object) -> dict[str, tuple[int, float]]:
    """Rank and scaling of every adapted module."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    return seen(attach_adapter(base, AdapterSection(rank=4, alpha=8.0, **section), recompute="none"))  # type: ignore[arg-type]


def seen(model: PeftModel) -> dict[str, tuple[int, float]]:
    layers = [(name, module) for name, module in model.get_base_model().named_modules() if hasattr(module, "lora_A")]
    return {name: (module.lora_A["default"].out_features, module.scaling["default"]) for name, module in layers}


def test_only_the_chosen_layers(tiny: Path) -> None:
    every, second = adapted(tiny), adapted(tiny, layers=(1,))
    assert len(every) == 14
    assert set(second) == {name for name in every if ".layers.1." in name}
    assert set(adapted(tiny, layers=(0,), targets=("q_proj",))) == {"model.layers.0.self_attn.q_proj"}
    assert set(adapted(tiny, layers=(0, 1))) == set(every)


def test_ranks_and_alphas_by_module(tiny: Path) -> None:
    seen = adapted(
        tiny, rank_pattern=(("down_proj", 2), ("layers.1.self_attn.q_proj", 16)), alpha_pattern=(("v_proj", 32.0),)
    )
    assert seen["model.layers.0.mlp.down_proj"] == (2, 4.0)
    assert seen["model.layers.0.self_attn.q_proj"] == (4, 2.0)
    assert seen["model.layers.1.self_attn.q_proj"] == (16, 0.5)
    assert seen["model.layers.1.self_attn.v_proj"] == (4, 8.0)


def test_of_two_names_that_fit_a_module_the_first_counts_also_once_it_is_saved(tiny: Path, tmp_path: Path) -> None:
    """peft writes the names in alphabetical order, in which the shorter one would come first."""
    base = AutoModelForCausalLM.from_pretrained(tiny)
    section = AdapterSection(
        rank=4,
        alpha=8.0,
        rank_pattern=(("layers.1.mlp.down_proj", 16), ("down_proj", 2)),
        alpha_pattern=(("layers.0.mlp.up_proj", 32.0), ("(down|up)_proj", 2.0)),
    )
    model = attach_adapter(base, section, recompute="none")
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny), str(tmp_path))

    assert seen(again) == seen(model)
    found = {name.removeprefix("model.layers."): value for name, value in seen(model).items()}
    assert (found["0.mlp.down_proj"], found["1.mlp.down_proj"]) == ((2, 1.0), (16, 0.125))
    assert (found["0.mlp.up_proj"], found["1.mlp.up_proj"]) == ((4, 8.0), (4, 0.5))
    assert found["0.self_attn.q_proj"] == (4, 2.0)


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")  # peft says it too
@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"layers": (0, 1, 2)}, "layer 2; this model has 2"),
        ({"rank_pattern": (("dwn_proj", 2),)}, "adapter.rank_pattern names 'dwn_proj'"),
        ({"alpha_pattern": (("q_proj", 2.0),), "targets": ("v_proj",)}, "adapter.alpha_pattern names 'q_proj'"),
    ],
)
def test_names_that_mean_nothing_are_refused(tiny: Path, section: dict[str, object], words: str) -> None:
    with pytest.raises(JobFailed) as caught:
        adapted(tiny, **section)
    assert words in str(caught.value)


@pytest.mark.parametrize("kind", ["adamw_torch", "adamw_8bit"])
def test_lora_plus_moves_b_faster(kind: str) -> None:
    """AdamW's first step has the size of the rate, whatever the gradient."""
    first, second = (nn.Parameter(torch.zeros(64, 64)) for _ in "AB")
    named = [("x.lora_A.default.weight", first), ("x.lora_B.default.weight", second)]
    optimizer = build_optimizer(
        named,
        kind=kind,  # type: ignore[arg-type]
        learning_rate=1e-3,
        weight_decay=0.0,
        lora_plus_ratio=16.0,
        device=torch.device("cpu"),
        warn=print,
    )
    set_learning_rate(optimizer, 2e-3)
    (3 * first.sum() + 5 * second.sum()).backward()
    optimizer.step()
    assert first.abs().mean().item() == pytest.approx(2e-3, rel=0.02)
    assert second.abs().mean().item() == pytest.approx(3.2e-2, rel=0.02)


def test_whole_modules_have_a_rate_of_their_own() -> None:
    whole, first, second = (nn.Parameter(torch.zeros(64, 64)) for _ in range(3))
    named = [
        ("base.lm_head.modules_to_save.default.weight", whole),
        ("x.lora_A.default.weight", first),
        ("x.lora_B.default.weight", second),
    ]
    optimizer = build_optimizer(
        named,
        kind="adamw_torch",
        learning_rate=1e-3,
        weight_decay=0.0,
        lora_plus_ratio=4.0,
        whole_rate_ratio=0.1,
        device=torch.device("cpu"),
        warn=print,
    )
    set_learning_rate(optimizer, 2e-3)
    sum((parameter.sum() for parameter in (whole, first, second)), start=torch.zeros(())).backward()
    optimizer.step()
    moved = [parameter.abs().mean().item() for parameter in (whole, first, second)]
    assert moved == pytest.approx([2e-4, 2e-3, 8e-3], rel=0.02)


def test_lora_plus_overfits_sooner_than_plain(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("train.micro_batch", 6).with_("train.steps", 20).with_("train.learning_rate", 1e-3)
    last = {}
    for ratio in (1.0, 16.0):
        history = history_of(train(recipe.with_("adapter.lora_plus_ratio", ratio)))
        assert history.failed is None, history.failed
        last[ratio] = history.train.losses[-1] / history.train.losses[0]
    assert last[16.0] < 0.5 * last[1.0]
