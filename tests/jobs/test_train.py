"""The training job on a tiny model: pinned losses, both methods, and that settings which must not matter do not."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.core.recipe import Recipe
from studio.jobs.base.data.encode import encode_rows
from studio.jobs.train import adapter, between, trainable_model
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.between import held_out_losses
from studio.jobs.train.objectives.supervised import collate
from studio.probe.data import read_data
from tests.jobs.conftest import Train, history_of

PINNED_LORA = [7.856718, 7.96576, 7.261149, 6.066514, 5.892199]
PINNED_QLORA = [7.909226, 8.178411, 7.696021, 6.286551, 5.775383]


def losses(train: Train, recipe: Recipe) -> list[float]:
    history = history_of(train(recipe))
    assert history.failed is None, history.failed
    return list(history.train.losses)


def test_pinned_losses_of_lora(train: Train, recipe: Recipe) -> None:
    assert losses(train, recipe) == pytest.approx(PINNED_LORA, rel=2e-4)


def test_pinned_losses_of_qlora(train: Train, recipe: Recipe) -> None:
    assert losses(train, recipe.with_("method", "qlora")) == pytest.approx(PINNED_QLORA, rel=2e-3)


def test_equals_a_plain_loop_of_peft_and_torch(train: Train, recipe: Recipe, tiny: Path) -> None:
    """The same rows through transformers' own loss and a loop of ten lines, without any of our arithmetic."""
    paths = train(recipe)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    data = read_data(Path(recipe.data.path))
    examples, _ = encode_rows(data.rows, tokenizer, seq_len=recipe.train.seq_len, warn=print)
    torch.manual_seed(recipe.train.seed)
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.train.learning_rate, weight_decay=0.0)
    batcher = Batcher(2, tokenizer.pad_token_id, torch.device("cpu"))
    seen = []
    for step in range(1, 6):
        (rows,) = StepBatches(examples, batcher, rows_per_step=2, seed=recipe.train.seed).of_step(step)
        loss = model(**collate(rows, tokenizer.pad_token_id, torch.device("cpu"))).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert list(history_of(paths).train.losses) == pytest.approx(seen, rel=1e-4)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.loss", "full"),
        ("train.recompute", "all"),
        pytest.param("train.attention", "eager", marks=pytest.mark.slow),
        ("train.packing", "on"),
        pytest.param("train.packing", "auto", marks=pytest.mark.slow),
    ],
)
def test_what_only_saves_memory_changes_no_loss(train: Train, recipe: Recipe, path: str, value: object) -> None:
    assert losses(train, recipe.with_(path, value)) == pytest.approx(losses(train, recipe), rel=1e-4)


def test_accumulation_changes_no_loss(train: Train, recipe: Recipe) -> None:
    whole = recipe.with_("train.micro_batch", 4)
    parts = recipe.with_("train.micro_batch", 1).with_("train.accumulation", 4)
    assert losses(train, parts) == pytest.approx(losses(train, whole), rel=1e-4)


@pytest.mark.parametrize("method", ["lora", "qlora"])
@pytest.mark.parametrize(
    "variant", ["plain", *(pytest.param(one, marks=pytest.mark.slow) for one in ("rslora", "dora"))]
)
def test_overfits_one_batch(train: Train, recipe: Recipe, method: str, variant: str) -> None:
    recipe = recipe.with_("method", method).with_("train.micro_batch", 6).with_("train.steps", 60)
    recipe = recipe.with_("train.learning_rate", 1e-2).with_("adapter.rank", 16)
    if variant != "plain":
        recipe = recipe.with_(f"adapter.{variant}", True)
    seen = losses(train, recipe)
    assert seen[-1] < 0.1 * seen[0]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_every_optimizer_trains_and_paging_falls_back_with_a_word(train: Train, recipe: Recipe, optimizer: str) -> None:
    history = history_of(train(recipe.with_("train.optimizer", optimizer).with_("train.steps", 20)))
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < history.train.losses[0]
    said = [warning.message for warning in history.warnings if warning.topic == "optimizer"]
    assert len(said) == (1 if optimizer.startswith("paged") else 0)


@pytest.mark.parametrize(
    ("method", "dtype"), [("lora", "bf16"), ("lora", "fp16"), ("qlora", "bf16"), ("qlora", "fp32")]
)
def test_weights_are_held_as_the_method_says(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, method: str, dtype: str
) -> None:
    seen: list[PeftModel] = []
    attach = trainable_model.attach_adapter
    attached = lambda *args, **named: seen.append(attach(*args, **named)) or seen[0]  # noqa: E731
    monkeypatch.setattr(trainable_model, "attach_adapter", attached)
    history = history_of(train(recipe.with_("method", method).with_("model.dtype", dtype)))
    assert history.failed is None, history.failed
    wanted = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    model = seen[0].get_base_model()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32, name
        elif method == "qlora" and ".layers." in name and "_proj" in name:
            assert isinstance(parameter, bnb.nn.Params4bit), name
            assert parameter.quant_state.quant_type == "nf4"
            assert parameter.quant_state.nested
        else:
            assert parameter.dtype == wanted, name


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_the_adapter_is_what_was_trained(
    train: Train, recipe: Recipe, tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    ids = torch.arange(20).unsqueeze(0)
    at_end: list[torch.Tensor] = []
    save = between.save_adapter

    def logits(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def saving(model: PeftModel, *rest: object) -> int:
        at_end.append(logits(model))
        return save(model, *rest)

    monkeypatch.setattr(between, "save_adapter", saving)
    paths = train(recipe.with_("method", method))
    assert history_of(paths).finished is not None
    options = {}
    if method == "qlora":
        from transformers import BitsAndBytesConfig

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
    untrained = logits(base)
    loaded = logits(PeftModel.from_pretrained(base, str(paths.adapter)))
    torch.testing.assert_close(loaded, at_end[0], rtol=1e-4, atol=1e-4)
    assert (loaded - untrained).abs().max() > 0.05
    assert AutoTokenizer.from_pretrained(paths.adapter).chat_template


def test_events_tell_the_whole_story(train: Train, recipe: Recipe) -> None:
    recipe = recipe.with_("eval.rows", 1).with_("eval.samples", 1).with_("eval.every", 2).with_("eval.sample_tokens", 4)
    paths = train(recipe.with_("train.checkpoint_every", 2))
    history = history_of(paths)
    assert history.planned is not None
    assert (history.planned.total_steps, history.planned.rows, history.planned.held_out_rows) == (5, 5, 1)
    assert (
        history.planned.trainable_parameters
        == 4 * sum(i + o for i, o in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]) * 2
    )
    assert list(history.train.steps) == [1, 2, 3, 4, 5]
    assert [event.step for event in history.evals] == [0, 2, 4, 5]
    assert [event.step for event in history.samples] == [0, 5]
    assert [(saved.what, saved.step) for saved in history.saved] == [
        ("checkpoint", 2),
        ("checkpoint", 4),
        ("checkpoint", 5),
        ("adapter", 5),
    ]
    assert max(history.memory.resident_bytes) > 50 * 2**20
    assert history.finished is not None
    assert history.finished.outcome == "done"


@pytest.mark.parametrize("fails_at", [1, 2])
def test_a_first_batch_that_is_too_large_to_evaluate_is_told_as_evaluating(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    calls = []

    def full(*args: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == fails_at:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return held_out_losses(*args, **named)

    monkeypatch.setattr(between, "held_out_losses", full)
    failed = history_of(train(recipe.with_("eval.rows", 1).with_("train.steps", 2))).failed
    assert failed is not None
    assert failed.failure == "out_of_memory"
    assert "the card's memory is full while evaluating" in failed.message


class _OnAFullCard(torch.Tensor):
    """Weights on a card that has no byte left: they can be copied away, and nothing can be computed of them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") not in ("detach", "to", "cpu", "__get__"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        with torch._C.DisableTorchFunctionSubclass():
            made = func(*args, **(kwargs or {}))
            copied = "cpu" in args or getattr(func, "__name__", "") == "cpu"
            return made.as_subclass(torch.Tensor if copied else cls) if isinstance(made, torch.Tensor) else made


def test_saving_takes_nothing_of_the_card(train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = adapter.adapter_weights
    monkeypatch.setattr(
        adapter,
        "adapter_weights",
        lambda model: {name: weight.as_subclass(_OnAFullCard) for name, weight in weights(model).items()},
    )
    paths = train(recipe.with_("train.steps", 2))
    assert history_of(paths).failed is None
    assert (paths.adapter / "adapter_model.safetensors").is_file()


def test_unknown_target_names_the_nearest(train: Train, recipe: Recipe) -> None:
    failed = history_of(train(recipe.with_("adapter.targets", ("q_prj",)))).failed
    assert failed is not None
    assert failed.failure == "unknown_targets"
    assert "q_proj" in failed.message


@pytest.mark.slow
def test_the_resident_peak_is_the_process_own() -> None:
    """Of a child, getrusage begins at what its parent held."""
    ballast = bytearray(os.urandom(2**20)) * 400
    code = (
        "import torch; from studio.jobs.train.memory import MemoryWatch; "
        "MemoryWatch(lambda kind, **seen: print(seen['resident_bytes'], seen['resident_peak_bytes']), "
        "torch.device('cpu')).see('load', 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    now, peak = map(int, done.stdout.split())
    assert now <= peak < now + len(ballast) / 2
