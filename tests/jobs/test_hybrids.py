"""Training of hybrids: which modules are adapted, packing, padding, checkpointing, merge, resume and audit."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from studio.core.direct_weights import not_adapted
from studio.core.events import Phase, Planned
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.audit.serving import CONTEXT_TOKENS, serving
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.between import Between
from studio.jobs.train.objectives.supervised import collate, pack
from studio.jobs.train.packing import can_pack
from studio.jobs.train.row_isolation import stateful_layers
from studio.jobs.train.step_model import StepModel
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.audit_cases import examples
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.hybrid_cases import HYBRIDS, config_of, make_hybrid
from tests.jobs.test_audit_run import assert_figures_of_the_whole_model

SLOW = pytest.mark.slow
CPU = torch.device("cpu")
IDS = torch.tensor([[256, 117, 110, 111, 257, 256, 100, 111, 115]])

NOT_PACKED = {"mamba", "falcon_mamba", "jamba"}
"""Their layers do not hand on where rows end."""

TARGETS = {
    "qwen3_5_text": "in_proj_qkv in_proj_z in_proj_a in_proj_b out_proj q_proj k_proj v_proj o_proj gate_proj up_proj "
    "down_proj",
    "lfm2": "in_proj out_proj q_proj k_proj v_proj w1 w2 w3",
    "granitemoehybrid": "in_proj q_proj k_proj v_proj o_proj input_linear output_linear",
    "nemotron_h": "in_proj q_proj k_proj v_proj o_proj up_proj down_proj",
    "falcon_h1": "in_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "bamba": "in_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "jamba": "in_proj x_proj out_proj q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
    "mamba": "in_proj",
    "falcon_mamba": "in_proj",
    "mamba2": "in_proj",
}
"""What `all-linear` adapts."""
QUICK = ("qwen3_5_text", "lfm2", "nemotron_h")
FAMILIES = [name if name in QUICK else pytest.param(name, marks=SLOW) for name in HYBRIDS]


def weights(paths: RunPaths) -> dict[str, torch.Tensor]:
    return load_file(paths.adapter / "adapter_model.safetensors")


def kinds(adapter: dict[str, torch.Tensor]) -> set[str]:
    return {name.split(".lora_")[0].rpartition(".")[2] for name in adapter}


def step_model_of(folder: Path, *, checkpointed: bool = True, loss: str = "chunked") -> StepModel:
    torch.manual_seed(1)
    model = attach_adapter(
        AutoModelForCausalLM.from_pretrained(folder),
        AdapterSection(rank=4, alpha=8.0),
        recompute="all" if checkpointed else "none",
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # with zeros no gradient would reach A
                parameter.normal_(std=0.05)
    return StepModel(model, loss, nullcontext)  # type: ignore[arg-type]


def gradients(step_model: StepModel, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    step_model.train()
    step_model.zero_grad()
    step_model(batch).backward()
    return {name: p.grad.clone() for name, p in step_model.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_hybrid_trains_and_every_adapted_module_moves(
    train: Train, recipe: Recipe, tmp_path: Path, family: str, method: str
) -> None:
    recipe = recipe.with_("model.base", str(make_hybrid(tmp_path / family, family))).with_("method", method)
    recipe = recipe.with_("train.recompute", "all").with_("train.packing", "on").with_("train.micro_batch", 6)
    paths = train(recipe.with_("train.steps", 5).with_("train.learning_rate", 2e-3))
    history = history_of(paths)
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < history.train.losses[0]
    topics = {warning.topic for warning in history.warnings}
    # Mamba's dt_proj stays in 16 bit, which is much of a layer as small as this one: the run says so.
    precision = {"precision"} if (family, method) == ("mamba", "qlora") else set()
    assert topics - {"calibration"} == precision | ({"packing"} if family in NOT_PACKED else set())
    (planned,) = [event for event in read_events(paths.events) if isinstance(event, Planned)]
    assert planned.loss_path == "chunked"
    seen = weights(paths)
    assert all(weight.any() for weight in seen.values())
    if family in TARGETS:
        assert kinds(seen) == set(TARGETS[family].split())
    assert not kinds(seen) & not_adapted(family).keys()
    details = [event.detail for event in read_events(paths.events) if isinstance(event, Phase)]
    left_out = {name for name in not_adapted(family) if any(f"leaves out {name}" in detail for detail in details)}
    assert bool(left_out) is bool(not_adapted(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_has_the_gradients_of_a_row_alone_whatever_is_beside_it(tmp_path: Path, family: str) -> None:
    """Padded or packed, with checkpoints or without; and both losses are the same."""
    step_model = step_model_of(make_hybrid(tmp_path / family, family))
    short, long = examples(11, 37)
    alone, other = (gradients(step_model, collate([row], 258, CPU)) for row in (short, long))
    wanted = {name: alone[name] + other[name] for name in alone}
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    assert_same(gradients(step_model, collate([long, short], 258, CPU)), wanted)
    assert step_model.prove(collate([long], 258, CPU))
    plain = step_model_of(tmp_path / family, checkpointed=False, loss="full")
    assert_same(gradients(plain, collate([short], 258, CPU)), alone)
    assert can_pack(step_model, [short, long], CPU) is (family not in NOT_PACKED)
    if family not in NOT_PACKED:
        assert_same(gradients(step_model, pack([short, long], CPU)), wanted)


@pytest.mark.parametrize("family", ["qwen3_5_text", "lfm2", "mamba2"])
def test_without_a_call_per_row_the_state_leaks_and_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    step_model = step_model_of(make_hybrid(tmp_path / family, family))
    assert stateful_layers(step_model.causal)
    monkeypatch.setattr("studio.jobs.train.packing.call_by_row", lambda causal: None)
    assert not can_pack(step_model, examples(11, 37), CPU)


def test_a_leak_of_the_kernel_that_only_training_takes_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mamba layers take another kernel in training than in evaluation."""
    step_model = step_model_of(make_hybrid(tmp_path / "nemotron_h", "nemotron_h"))
    (mixer,) = stateful_layers(step_model.causal)
    assert can_pack(step_model, examples(11, 37), CPU)
    forward = mixer.forward

    def leaking(hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
        output: torch.Tensor = forward(hidden_states, **named)
        return output + 0.01 * output.roll(1, dims=1) if mixer.training else output

    monkeypatch.setattr(mixer, "forward", leaking)
    assert not can_pack(step_model, examples(11, 37), CPU)


@pytest.mark.parametrize(
    "family",
    ["lfm2", *(pytest.param(name, marks=SLOW) for name in ("qwen3_5_text", "nemotron_h", "mamba2"))],
)
def test_merge_and_resume(
    train: Train, merge: Merge, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    base = make_hybrid(tmp_path / family, family)
    recipe = recipe.with_("model.base", str(base)).with_("train.packing", "on").with_("train.learning_rate", 1e-3)
    whole = train(recipe)
    after_step = Between.after_step
    monkeypatch.setattr(Between, "after_step", lambda self, state: state.step == 2 or after_step(self, state))
    parts = train(recipe)
    monkeypatch.undo()
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name

    history = history_of(merge(whole.adapter, base, tmp_path / "out"))
    assert history.finished is not None, history.failed
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()(input_ids=IDS).logits
        plain = AutoModelForCausalLM.from_pretrained(base).eval()
        before = plain(input_ids=IDS).logits
        adapted = PeftModel.from_pretrained(plain, str(whole.adapter)).eval()(input_ids=IDS).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-3)
    assert (adapted - before).abs().max() > 0.01


@pytest.mark.parametrize(
    "family",
    [
        "falcon_h1",
        *(pytest.param(name, marks=SLOW) for name in ("qwen3_5_text", "lfm2", "mamba2", "jamba")),
    ],
)
def test_an_audit_has_the_figures_of_the_whole_model(train: Train, recipe: Recipe, tmp_path: Path, family: str) -> None:
    base = make_hybrid(tmp_path / family, family, dtype=torch.bfloat16)
    recipe = recipe.with_("model.base", str(base)).with_("method", "qlora").with_("model.dtype", "bf16")
    assert_figures_of_the_whole_model(train(recipe.with_("eval.rows", 2)), base, tmp_path / "audit")


def test_only_layers_with_attention_keep_what_grows_with_the_conversation() -> None:
    cache = {family: serving(config_of(family), 0).cache_bytes for family in ("qwen3_5_text", "falcon_h1", "mamba2")}
    per_layer = 2 * 2 * 16 * 2 * CONTEXT_TOKENS  # keys and values of 2 heads of 16 numbers, in 16 bit
    assert cache == {"qwen3_5_text": per_layer, "falcon_h1": 2 * per_layer, "mamba2": 0}
