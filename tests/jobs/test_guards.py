"""Each guard against a silently wasted run, provoked by a model or data that really has the fault."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from studio.core.errors import JobFailed
from studio.core.events import Failed
from studio.core.recipe import Recipe
from studio.jobs.train.between import Between
from studio.jobs.train.guards import MovementGuard, check_adapter, doubts_about_pairs, shortened
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


def warnings_of(train: Train, recipe: Recipe) -> list[str]:
    history = history_of(train(recipe))
    assert history.failed is None, history.failed
    return [warning.message for warning in history.warnings if warning.topic == "adapter"]


def second_layer_unread(model: torch.nn.Module) -> None:
    """The second layer's attention is multiplied by zero: what its queries, keys and values are is never seen."""
    model.model.layers[1].self_attn.o_proj.weight.zero_()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.weight_decay": 0.1},
        {"adapter.init": "pissa", "train.weight_decay": 0.1},
        {"adapter.dora": True},
        {"method": "qlora", "model.dtype": "bf16"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()) or "plain",
)
def test_modules_whose_output_is_never_used_are_named(
    train: Train, recipe: Recipe, tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = recipe.with_("model.base", broken_model(tmp_path / "dead", second_layer_unread))
    recipe = recipe.with_("adapter.targets", ("q_proj", "v_proj", "up_proj"))
    for path, value in changes.items():
        recipe = recipe.with_(path, value)
    (said,) = warnings_of(train, recipe)
    assert said.startswith("2 of 6 adapted modules have not moved in the first 3 steps")
    assert said.endswith("model.layers.1.self_attn.q_proj, model.layers.1.self_attn.v_proj")


@pytest.mark.parametrize(
    "changes",
    [
        {"train.warmup_fraction": 0.6, "train.schedule": "cosine"},
        {"adapter.init": "pissa"},
        {"adapter.dora": True, "adapter.modules_to_save": ("embed_tokens",)},
        {"model.dtype": "fp16", "train.learning_rate": 1e-4},
        {"adapter.lora_plus_ratio": 16.0, "adapter.rslora": True, "train.optimizer": "adamw_8bit"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)
def test_of_a_sound_model_nothing_is_named(train: Train, recipe: Recipe, changes: dict[str, object]) -> None:
    for path, value in changes.items():
        recipe = recipe.with_(path, value)
    assert warnings_of(train, recipe) == []


def test_a_resumed_run_watches_again(
    train: Train, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_("model.base", broken_model(tmp_path / "dead", second_layer_unread))
    recipe = recipe.with_("adapter.targets", ("v_proj", "up_proj"))
    after_step = Between.after_step
    monkeypatch.setattr(Between, "after_step", lambda self, state: state.step == 2 or after_step(self, state))
    paths = train(recipe)
    monkeypatch.undo()
    train(recipe, again=paths)
    history = history_of(paths)
    assert history.failed is None
    assert list(history.train.steps) == [1, 2, 3, 4, 5]
    assert [warning.message.rpartition(": ")[2] for warning in history.warnings if warning.topic == "adapter"] == [
        "model.layers.1.self_attn.v_proj"
    ]


def test_a_kind_of_module_of_which_none_moves_ends_the_run(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model multiplies with the weight itself, as fused kernels do: the adapter in its place is never called."""

    def past_the_adapter(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * linear(x, self.up_proj.weight))

    monkeypatch.setattr(LlamaMLP, "forward", past_the_adapter)
    seen = failure(train, recipe)
    assert (seen.failure, seen.step) == ("dead_modules", 3)
    assert "none of the adapted up_proj modules has moved in 3 steps" in seen.message
    assert "model.layers.{0-1}.mlp.up_proj" in seen.message
    assert seen.advice.endswith("[down_proj, gate_proj, k_proj, o_proj, q_proj, v_proj]")
    targets = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "v_proj")
    assert warnings_of(train, recipe.with_("adapter.targets", targets)) == []


class Experts(torch.nn.Module):
    """Two layers of four experts, of which all tokens go to the first and the third."""

    def __init__(self) -> None:
        super().__init__()
        layer = lambda: torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))})  # noqa: E731
        self.layers = torch.nn.ModuleList(layer() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["experts"][0](x) + layer["experts"][2](x)
        return x


def test_experts_that_no_token_chose_are_not_called_dead() -> None:
    model = get_peft_model(Experts(), LoraConfig(r=2, target_modules=r".*experts\.\d"))
    said: list[str] = []
    guard = MovementGuard(model, said.append)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(1, 4):
        model(torch.ones(3, 4)).sum().backward()
        guard.see_gradients()
        optimizer.step()
        optimizer.zero_grad()
        guard.after_step(step)
    assert said == [
        "4 of 8 adapted modules belong to experts that no token chose in the first 3 steps: "
        "layers.{0-1}.experts.1, layers.{0-1}.experts.3"
    ]


def test_long_lists_of_modules_are_shortened() -> None:
    names = [f"model.layers.{layer}.mlp.{name}" for name in ("up", "down") for layer in (0, 1, 2, 3, 7, 9, 10)]
    assert shortened(names) == "model.layers.{0-3,7,9-10}.mlp.up, model.layers.{0-3,7,9-10}.mlp.down"
    assert shortened(["lm_head", "model.layers.4.mlp.up"]) == "lm_head, model.layers.4.mlp.up"
    assert shortened([f"block.{letter}" for letter in "abcdefg"]).endswith("block.e and 2 more")


def test_adapter_of_zeros_is_no_success(train: Train, recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.with_("model.base", broken_model(tmp_path / "dead", no_gradient)).with_("train.steps", 2)
    assert failure(train, recipe.with_("adapter.targets", ("v_proj",))).failure == "adapter_zero"


def test_adapter_with_nan_is_no_success() -> None:
    weights = {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.tensor([[1.0, torch.nan]])}
    with pytest.raises(JobFailed) as caught:
        check_adapter(weights)
    assert caught.value.kind == "adapter_nonfinite"
    check_adapter({name: weight.nan_to_num() for name, weight in weights.items()})


def test_held_out_pairs_below_chance_are_told_beyond_noise_alone() -> None:
    before = {"chosen_logp": -10.0}
    found = doubts_about_pairs({"accuracy": 0.3, "chosen_logp": -10.0}, before, pairs=100, tokens=20)
    assert found.keys() == {"accuracy"}
    assert "preferred in 30% of 100 held-out pairs, less than chance" in found["accuracy"]
    for accuracy, pairs in ((0.45, 100), (0.0, 3), (1.0, 100), (0.5, 10_000)):
        assert doubts_about_pairs({"accuracy": accuracy, "chosen_logp": -10.0}, before, pairs=pairs, tokens=20) == {}


def test_chosen_answers_that_become_unlikely_are_told_by_token() -> None:
    before = {"chosen_logp": -20.0}
    found = doubts_about_pairs({"accuracy": 1.0, "chosen_logp": -40.0}, before, pairs=9, tokens=20)
    assert found.keys() == {"chosen"}
    assert "0.37 times as likely a token as before the first step" in found["chosen"]
    for now, tokens in ((-29.0, 20.0), (-20.4, 1.0), (-5.0, 20.0)):
        assert doubts_about_pairs({"accuracy": 1.0, "chosen_logp": now}, before, pairs=9, tokens=tokens) == {}
