"""Our step against the plain one, whole logits and padded rows, in fp32 to 1e-5: losses and adapter gradients.

Over every kind of head, on LoRA and on NF4; and a curve of thirty steps. Padded and packed rows are both ours.
"""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core import loss_chunk
from studio.core.recipe import AdapterSection, TrainSection
from studio.jobs.base.load import _keep_packing as keep_packing
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.loop import LoopParts, train
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.optimizer import build_optimizer
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel
from tests.core.test_vram_real_step import four_bit
from tests.fakes.live_bytes import LiveBytes
from tests.jobs.test_families import FAMILIES, SMALL
from tests.jobs.test_packing import PADDED, rows, stir

CPU = torch.device("cpu")
TIGHT = replace(PADDED, packed_tokens=60)

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "untied": ("llama", {"tie_word_embeddings": False}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "head with bias": ("phi", {}, {}),
    "soft cap": ("gemma2", {}, {}),
    "divided logits": ("granite", {}, {}),
    "multiplied logits": ("cohere", {}, {}),
    "adapter on the head": ("llama", {"tie_word_embeddings": False}, {"targets": ("q_proj", "down_proj", "lm_head")}),
    "adapter on the tied head": ("llama", {"tie_word_embeddings": True}, {"targets": ("q_proj", "lm_head")}),
    "trained head": ("llama", {"tie_word_embeddings": False}, {"modules_to_save": ("lm_head",)}),
    "trained head, once tied": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ("lm_head",)}),
    "trained head with soft cap": ("gemma2", {}, {"modules_to_save": ("lm_head",)}),
    "trained embeddings": ("qwen2", {"tie_word_embeddings": False}, {"modules_to_save": ("embed_tokens",)}),
    "dora": ("qwen2", {}, {"dora": True}),
    "checkpointing": ("llama", {}, {}),
}


def step_model_of(case: str, method: str, loss: Any, autocast: Any = nullcontext) -> StepModel:
    family, changes, section = CASES[case]
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **{**SMALL, "intermediate_size": 128, **FAMILIES[family], **changes})
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        base.get_output_embeddings().weight.mul_(10.0)
    if method == "nf4":
        four_bit(base, torch.float32)
        keep_packing(base)
    base.requires_grad_(False)
    adapter = AdapterSection(rank=4, alpha=8.0, **section)
    recompute: Any = "all" if case == "checkpointing" else "none"
    step_model = StepModel(attach_adapter(base, adapter, recompute=recompute), loss, autocast)
    stir(step_model)
    return step_model.train()


def result_of(step_model: StepModel, batcher: Batcher) -> tuple[float, dict[str, torch.Tensor]]:
    step_model.zero_grad()
    values = [step_model(batcher.batch(group)) for group in batcher.groups(rows(17, 9, 20, 4))]
    torch.stack(values).sum().backward()
    gradients = {name: p.grad.clone() for name, p in step_model.named_parameters() if p.grad is not None}
    return float(torch.stack(values).sum().detach()), gradients


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "nf4"])
@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_to_five_digits(case: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_chunk, "WORKSPACE_BYTES", 10 * 120 * 7)
    monkeypatch.setattr(loss_chunk, "_LEAST_TOKENS", 1)
    wanted_loss, wanted = result_of(step_model_of(case, method, "full"), PADDED)
    ours = step_model_of(case, method, "chunked")
    assert ours.prove(PADDED.batch(rows(20)))
    ways = [PADDED, TIGHT] if can_pack(ours, rows(12, 15), CPU) else [PADDED]
    assert len(ways) == (1 if "soft cap" in case else 2)
    for way in ways:
        loss, gradients = result_of(ours, way)
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert gradients.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert gradient.norm() > 0, name
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["untied", "tied", "head with bias", "soft cap", "multiplied logits", "trained head"])
def test_in_16_bits_no_farther_from_fp32_than_the_plain_step(case: str, dtype: torch.dtype) -> None:
    """The loss is summed in fp32 on both paths; what differs is rounding, and ours must not round more."""

    def distance(loss: Any) -> tuple[float, float]:
        def autocast() -> Any:
            return torch.autocast("cpu", dtype=dtype)

        value, gradients = result_of(step_model_of(case, "lora", loss, autocast), PADDED)
        apart = [(gradients[name] - gradient).norm() / gradient.norm() for name, gradient in exact.items()]
        return abs(value - exact_loss) / exact_loss, float(torch.stack(apart).mean())

    exact_loss, exact = result_of(step_model_of(case, "lora", "full"), PADDED)
    (plain_loss, plain), (ours_loss, ours) = distance("full"), distance("chunked")
    assert ours <= 1.1 * plain
    assert ours_loss <= plain_loss + 1e-4
    assert 1e-4 < plain < 0.2, "it was computed in 16 bits"


def run(step_model: StepModel, batcher: Batcher, steps: int, after: Any = lambda progress: False) -> list[float]:
    losses: list[float] = []

    def emit(kind: type, **fields: Any) -> None:
        if kind.__name__ == "StepDone":
            losses.append(fields["loss"])

    optimizer = build_optimizer(
        step_model.named_parameters(),
        kind="adamw_torch",
        learning_rate=2e-3,
        weight_decay=0.0,
        device=CPU,
        warn=print,
    )
    parts = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        batches=StepBatches(rows(17, 9, 20, 4, 11, 25), batcher, rows_per_step=4, seed=1),
        device=CPU,
        memory=MemoryWatch(emit, CPU),
        emit=emit,
    )
    section = TrainSection(learning_rate=2e-3)
    train(parts, section, steps, TrainState(step=0, tokens=0, seconds=0.0, scaler={}), after)
    return losses


@pytest.mark.parametrize("method", ["lora", pytest.param("nf4", marks=pytest.mark.slow)])
def test_thirty_steps_overlap(method: str) -> None:
    plain = run(step_model_of("untied", method, "full"), PADDED, 30)
    ours = step_model_of("untied", method, "chunked")
    assert can_pack(ours, rows(12, 15), CPU)
    assert run(ours, TIGHT, 30) == pytest.approx(plain, rel=1e-3)
    assert plain[-1] < 0.8 * plain[0]


def test_nothing_but_optimizer_state_is_alive_between_steps() -> None:
    step_model = step_model_of("untied", "lora", "chunked")
    can_pack(step_model, rows(12, 15), CPU)
    alive: list[int] = []
    with LiveBytes() as storages:
        for tensor in (*step_model.parameters(), *step_model.buffers()):
            storages.track(tensor)
        loaded = storages.live

        def after(progress: TrainState) -> bool:
            alive.append(storages.live - loaded)
            return False

        run(step_model, TIGHT, 5, after)
    trained = [parameter for parameter in step_model.parameters() if parameter.requires_grad]
    moments = 2 * sum(parameter.numel() * 4 for parameter in trained)
    # Beside the moments: a step count of each parameter and what the loop itself reads after a step, all of it scalars.
    assert moments <= alive[-1] <= moments + 4 * len(trained) + 256
    assert alive[-1] == alive[-2]
