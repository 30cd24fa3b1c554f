"""PiSSA and LoftQ: what they promise at the start, and that what is saved works on the ordinary base."""

import shutil
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from studio.core.errors import JobFailed
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.base.load import FourBit, load_base
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.train import between
from studio.jobs.train.adapter import attach_adapter, save_adapter
from studio.jobs.train.trainable_model import init_loftq, init_pissa, low_rank, stored_weight
from studio.probe.models import find_base
from studio.runs.control import request, withdraw_all
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_resume import at_step, weights

IDS = torch.arange(24).unsqueeze(0)
PATTERNS = {"rank_pattern": (("down_proj", 6), ("layers.0.self_attn.q_proj", 2)), "alpha_pattern": (("v_proj", 3.0),)}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def shaken(model: PeftModel) -> PeftModel:
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def four_bit_base(folder: Path) -> torch.nn.Module:
    options = {"quant": FourBit(), "attention": "sdpa", "device": torch.device("cpu")}
    return load_base(find_base(str(folder)), method="qlora", dtype=torch.float32, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, PATTERNS])
def test_a_pissa_start_is_the_base_and_what_is_saved_is_the_trained_model(
    tiny: Path, tmp_path: Path, rslora: bool, patterns: dict[str, str]
) -> None:
    plain = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    section = AdapterSection(rank=4, alpha=24.0, init="pissa", rslora=rslora, **patterns)
    model = attach_adapter(base, section, recompute="none")
    start = init_pissa(model)
    assert all(tensor.any() for tensor in start.values())
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    trained = logits(shaken(model))
    assert (trained - plain).abs().max() > 0.5
    save_adapter(model, tiny_tokenizer(), tmp_path / "adapter", start)
    fresh = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-3, atol=1e-3)
    assert len({path.stat().st_mode for path in (tmp_path / "adapter").iterdir()}) == 1, "a copy serves others too"


def test_pissa_takes_the_largest_directions(tiny: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    before = torch.linalg.svdvals(base.model.layers[0].mlp.up_proj.weight)
    init_pissa(model := attach_adapter(base, AdapterSection(rank=8, init="pissa"), recompute="none"))
    after = torch.linalg.svdvals(model.get_base_model().model.layers[0].mlp.up_proj.get_base_layer().weight)
    torch.testing.assert_close(after[:-8], before[8:], rtol=1e-3, atol=1e-3)


def test_pissa_on_transposed_weights_and_tied_heads() -> None:
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=300, n_positions=32))
    plain = logits(base)
    targets = ("c_attn", "lm_head")
    model = attach_adapter(base, AdapterSection(rank=4, targets=targets, init="pissa"), recompute="none")
    init_pissa(model)
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)


def test_loftq_repairs_what_quantisation_lost(tiny: Path) -> None:
    """Every layer comes nearer to its 16-bit weight by just what the best rank-r picture of the loss allows."""
    model = attach_adapter(four_bit_base(tiny), AdapterSection(rank=16, alpha=64.0), recompute="none")
    assert init_loftq(model, tiny) == 14
    exact = load_file(tiny / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        layer = model.get_base_model().get_submodule(name)
        held = layer.get_base_layer().weight
        lost = exact[f"{name}.weight"] - dequantize_4bit(held.data, held.quant_state)
        left = lost - layer.get_delta_weight("default").detach()
        best = torch.linalg.svdvals(lost)[16:].norm()
        assert left.norm() == pytest.approx(best.item(), rel=1e-3)
        assert left.norm() < 0.8 * lost.norm()


def test_loftq_brings_the_outputs_nearer_to_the_16_bit_model(tiny: Path) -> None:
    exact = logits(AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32))
    model = attach_adapter(four_bit_base(tiny), AdapterSection(rank=32, alpha=64.0), recompute="none")
    before = (logits(model) - exact).norm()
    init_loftq(model, tiny)
    assert (logits(model) - exact).norm() < 0.7 * before


def test_a_folder_without_the_weight_is_said(tiny: Path, tmp_path: Path) -> None:
    files, name = TensorFiles(tiny), "layers.0.mlp.up_proj.weight"
    found = stored_weight(files, name, (128, 64), prefix="model")
    assert torch.equal(found, stored_weight(files, f"model.{name}", (128, 64), prefix="model"))
    with pytest.raises(JobFailed, match="of shape"):
        stored_weight(files, name, (64, 128), prefix="model")
    save_file({"x": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with pytest.raises(JobFailed, match="hold no 16-bit weight x"):
        stored_weight(TensorFiles(tmp_path), "x", (2,), prefix="")


def test_the_randomised_decomposition_is_as_good_as_the_exact_one() -> None:
    """On the flat spectrum of rounding noise, its hardest case."""
    torch.manual_seed(0)
    noise = torch.randn(600, 900)
    first, second = low_rank(noise, 16)
    best = torch.linalg.svdvals(noise)[16:].norm()
    assert (noise - second @ first).norm() == pytest.approx(best.item(), rel=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("qlora", "loftq"), ("lora", "gaussian")])
def test_overfits_one_batch(train: Train, recipe: Recipe, method: str, init: str) -> None:
    recipe = recipe.with_("method", method).with_("adapter.init", init).with_("adapter.rank", 16)
    recipe = recipe.with_("train.micro_batch", 6).with_("train.steps", 60).with_("train.learning_rate", 5e-3)
    history = history_of(train(recipe))
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < 0.1 * history.train.losses[0]
    assert [warning.topic for warning in history.warnings] == (["adapter"] if init == "loftq" else [])


@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("qlora", "loftq")])
def test_the_saved_adapter_is_what_was_trained(
    train: Train, recipe: Recipe, tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str, init: str
) -> None:
    at_end: list[torch.Tensor] = []
    save = between.save_adapter

    def saving(model: PeftModel, *rest: object) -> int:
        at_end.append(logits(model))
        return save(model, *rest)

    monkeypatch.setattr(between, "save_adapter", saving)
    paths = train(recipe.with_("method", method).with_("adapter.init", init))
    options = {}
    if method == "qlora":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, **options)
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # else its evaluation rounds to bf16 on processors that have it
    loaded = logits(PeftModel.from_pretrained(base, str(paths.adapter)))
    torch.testing.assert_close(loaded, at_end[0], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "init"), [("lora", "pissa"), ("qlora", "loftq")])
def test_resumed_equals_uninterrupted(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, method: str, init: str
) -> None:
    recipe = recipe.with_("method", method).with_("adapter.init", init).with_("adapter.lora_plus_ratio", 4.0)
    whole = train(recipe)
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    withdraw_all(parts)
    train(recipe, again=parts)
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


def test_a_checkpoint_of_another_start_is_refused(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed recipe is refused before anything is loaded; under its own recipe a foreign checkpoint is."""
    from studio.runs.job import write_job

    changed, runs = recipe.with_("adapter.init", "pissa"), []
    for each in (recipe, changed):
        at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
        runs.append(train(each))
        withdraw_all(runs[-1])
    paths, other = runs
    write_job(paths, changed)
    train(changed, again=paths)
    failed = history_of(paths).failed
    assert failed is not None
    assert failed.failure == "bad_input"
    assert "adapter.init: 'default' -> 'pissa'" in failed.message
    shutil.rmtree(other.checkpoints)
    shutil.copytree(paths.checkpoints, other.checkpoints)
    train(changed, again=other)
    failed = history_of(other).failed
    assert failed is not None
    assert failed.failure == "checkpoint_mismatch"
