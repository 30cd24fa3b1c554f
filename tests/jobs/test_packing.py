"""Packed rows: none sees another, whatever the family; the loss and gradients are those of padded rows."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.train import packing
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.batches import Batcher, StepBatches, best_fit
from studio.jobs.train.objectives.supervised import pack
from studio.jobs.train.packing import batcher_for, can_pack
from studio.jobs.train.row_isolation import ROW_ATTENTION, row_attention
from studio.jobs.train.step_model import StepModel
from studio.runs.control import request, withdraw_all
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_families import FAMILIES, model_of
from tests.jobs.test_resume import at_step, weights

CPU = torch.device("cpu")
PADDED = Batcher(3, 0, CPU)
TIGHT = Batcher(3, 0, CPU, packed_tokens=60)


def rows(*lengths: int, seed: int = 4) -> list[Example]:
    made = []
    random = np.random.default_rng(seed)
    for length in lengths:
        ids = random.integers(3, 120, length).astype(np.int32)
        labels = np.where(np.arange(length) < length // 3, IGNORED, ids).astype(np.int32)
        made.append(Example(ids, labels))
    return made


def step_model_of(family: str, loss: Any = "chunked", **changes: Any) -> StepModel:
    if not changes:
        return StepModel(model_of(family), loss, nullcontext)
    before = FAMILIES[family]
    FAMILIES[family] = {**before, **changes}
    try:
        return StepModel(model_of(family), loss, nullcontext)
    finally:
        FAMILIES[family] = before


def loss_and_gradients(step_model: StepModel, batcher: Batcher) -> tuple[float, dict[str, torch.Tensor]]:
    step_model.eval()  # OPT and GPT-2 have dropout of their own
    step_model.zero_grad()
    total = 0.0
    for group in batcher.groups(rows(17, 9, 20, 4)):
        value = step_model(batcher.batch(group))
        value.backward()
        total += value.item()
    return total, {n: p.grad.clone() for n, p in step_model.named_parameters() if p.grad is not None}


def stir(step_model: StepModel) -> None:
    """Give B values: with zeros no gradient would reach A."""
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in step_model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)


NOT_PACKED = {"gemma2", "falcon", "stablelm"}
"""Gemma 2 is eager, Falcon's attention cannot be switched, StableLM's never gets `row_lengths`: all are found out."""

CASES: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in FAMILIES),
    ("mistral", {"sliding_window": 5}),
    ("gemma3_text", {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}),
]


@pytest.mark.parametrize(("family", "changes"), CASES)
@pytest.mark.parametrize("loss", ["chunked", pytest.param("full", marks=pytest.mark.slow)])
def test_no_row_sees_another(family: str, changes: dict[str, Any], loss: str) -> None:
    step_model = step_model_of(family, loss, **changes)
    stir(step_model)
    apart, wanted = loss_and_gradients(step_model, PADDED)
    if not can_pack(step_model, rows(12, 15), CPU):
        assert family in NOT_PACKED
        return
    assert family not in NOT_PACKED
    together, got = loss_and_gradients(step_model, TIGHT)
    assert together == pytest.approx(apart, rel=1e-5)
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)

    (first, second), (other,) = rows(12, 15), rows(12, seed=8)
    silent, changed = (Example(row.input_ids, np.full_like(row.labels, IGNORED)) for row in (first, other))
    with torch.no_grad():
        for place in (0, 1):
            pairs = [[one, second] if place == 0 else [second, one] for one in (silent, changed)]
            before, after = (float(step_model(pack(pair, CPU))) for pair in pairs)
            assert before == after, "what the other row says is seen"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.5, 0.02])
def test_a_model_that_mixes_tokens_is_found_out(dtype: torch.dtype, share: float) -> None:
    """A little of the token before, as a short convolution has it: at the border that is another row's."""
    step_model = step_model_of("llama").to(dtype)
    layer = step_model.causal.model.layers[0].mlp
    forward = layer.forward
    layer.forward = lambda hidden: forward(hidden + share * hidden.roll(1, dims=1))
    assert not can_pack(step_model, rows(12, 15), CPU)
    assert step_model.causal.config._attn_implementation == "sdpa"
    layer.forward = forward
    assert can_pack(step_model, rows(12, 15), CPU)


def test_lengths_that_are_ignored_are_found_out() -> None:
    """Rows that attend to each other: what a forward does that drops `row_lengths`."""
    step_model = step_model_of("llama")
    forward = step_model.causal.model.forward

    def dropping(row_lengths: object = None, **named: Any) -> Any:
        return forward(**named)

    step_model.causal.model.forward = dropping
    assert not can_pack(step_model, rows(12, 15), CPU)


class WrongBackward(torch.autograd.Function):
    """Right forward, and a gradient that is the neighbour's, or is not there."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, how: str) -> torch.Tensor:
        ctx.how = how
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gradient,) = gradients
        return {"mixed": gradient.roll(12, dims=2), "lost": gradient * 0.5, "nan": gradient * torch.nan}[ctx.how], None


@pytest.mark.parametrize("how", ["mixed", "lost", "nan"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_whose_backward_alone_is_wrong_is_found_out(
    monkeypatch: pytest.MonkeyPatch, how: str, dtype: torch.dtype
) -> None:
    step_model = step_model_of("llama").to(dtype)
    stir(step_model)

    def wrong(module: Any, query: Any, key: Any, value: Any, mask: Any, **named: Any) -> Any:
        if named.get("row_lengths") is not None:
            value = WrongBackward.apply(value, how)  # type: ignore[no-untyped-call]
        return row_attention(module, query, key, value, mask, **named)

    assert can_pack(step_model, rows(12, 15), CPU)
    step_model.causal.set_attn_implementation("sdpa")  # type: ignore[operator]
    monkeypatch.setitem(cast(Any, ALL_ATTENTION_FUNCTIONS)._global_mapping, ROW_ATTENTION, wrong)
    assert not can_pack(step_model, rows(12, 15), CPU)
    assert step_model.causal.config._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert all(parameter.grad is None for parameter in step_model.parameters())


@pytest.mark.parametrize("checkpointed", [True, False])
def test_the_proof_leaves_model_and_random_state_as_they_were(checkpointed: bool) -> None:
    """Its backward computes checkpointed layers again, as training's does, and leaves dropout out."""
    model = model_of("opt")
    model.train()
    if not checkpointed:
        cast(Any, model).activation_checkpointing_disable()
    step_model = StepModel(model, "chunked", nullcontext)
    before = {name: module.training for name, module in step_model.named_modules()}
    random = torch.get_rng_state()
    assert can_pack(step_model, rows(12, 15), CPU)
    assert {name: module.training for name, module in step_model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("word", "where", "error", "kind"),
    [
        ("on", "pack", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "out_of_memory"),
        ("auto", "_same_gradients", RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out_of_memory"),
        ("auto", "pack", RuntimeError("CUDA error: an illegal memory access was encountered"), "gpu_fault"),
    ],
)
def test_a_full_memory_or_a_failed_card_is_no_proof_that_rows_cannot_be_packed(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, word: str, where: str, error: Exception, kind: str
) -> None:
    def fails(*given: Any) -> Any:
        raise error

    monkeypatch.setattr(packing, where, fails)
    history = history_of(train(recipe.with_("train.packing", word)))
    assert history.failed is not None and history.failed.failure == kind
    assert not history.warnings
    assert history.phase is not None and history.phase.name == "choosing packed or padded rows"


@given(st.lists(st.integers(1, 40), min_size=1, max_size=40), st.integers(1, 60))
def test_best_fit_keeps_every_row_once_and_within_the_room(lengths: list[int], room: int) -> None:
    given_rows = sorted((Example(np.zeros(n, np.int32), np.zeros(n, np.int32)) for n in lengths), key=_length)[::-1]
    groups = best_fit(given_rows, room)
    assert sorted(id(row) for group in groups for row in group) == sorted(map(id, given_rows))
    assert all(len(group) == 1 or sum(map(_length, group)) <= room for group in groups)
    # Two groups that both fit into one would have been one.
    sizes = sorted(sum(map(_length, group)) for group in groups)
    assert len(sizes) < 2 or sizes[0] + sizes[1] > room


def _length(row: Example) -> int:
    return len(row.input_ids)


def test_packed_rows_restart_positions_and_predict_no_first_token() -> None:
    one, two = rows(4, 3)
    batch = pack([one, two], CPU)
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2]]
    assert batch["row_lengths"].tolist() == [4, 3]
    assert batch["cu_seq_lens_q"].tolist() == [0, 4, 7]
    assert batch["max_length_q"] == 4
    assert batch["labels"][0, 0] == batch["labels"][0, 4] == IGNORED
    assert batch["labels"][0, 5:].tolist() == two.labels[1:].tolist()


def test_every_epoch_has_every_row_and_the_longest_comes_first() -> None:
    some = rows(5, 30, 7, 9, 11, 3, 8)
    batches = StepBatches(some, PADDED, rows_per_step=3, seed=2)
    seen = [row for step in range(1, 8) for row in batches.rows_of(step)]
    assert batches.rows_of(1)[0] is some[1]
    for epoch in range(3):
        assert {id(row) for row in seen[7 * epoch : 7 * epoch + 7]} == {id(row) for row in some}
    assert len(batches.of_step(1)[0][0].input_ids) == 30
    assert [id(row) for row in seen] == [
        id(row) for step in range(1, 8) for row in StepBatches(some, TIGHT, rows_per_step=3, seed=2).rows_of(step)
    ]


@pytest.mark.parametrize(
    ("close", "packs", "rounds"), [(0.5, True, 2), (0.99, False, 2), (2.0, False, 2), (9.0, False, 1)]
)
def test_auto_takes_the_faster_way_and_draws_no_random_number(
    monkeypatch: pytest.MonkeyPatch, close: float, packs: bool, rounds: int
) -> None:
    step_model = step_model_of("llama")
    calls = []

    def seconds(model: StepModel, some: Any, batcher: Batcher) -> float:
        calls.append(batcher.packed_tokens)
        torch.rand(3)
        return close if batcher.packed_tokens else 1.0

    monkeypatch.setattr(packing, "_step_seconds", seconds)
    told: list[str] = []
    before = torch.get_rng_state()
    found = batcher_for(
        "auto",
        step_model,
        lambda way: rows(12, 15),
        PADDED,
        seq_len=15,
        before=None,
        tell=lambda name, fraction=None, detail="": told.append(detail),  # type: ignore[arg-type]
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert found.packed_tokens == (45 if packs else 0)
    assert calls == [0, *[0, 45] * rounds]
    assert told[-1].endswith("packed" if packs else "padded")


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_no_room_to_pack_means_padded(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def seconds(model: StepModel, some: Any, batcher: Batcher) -> float:
        if batcher.packed_tokens:
            raise error
        return 1.0

    monkeypatch.setattr(packing, "_step_seconds", seconds)
    told: list[str] = []
    ways: dict[str, Any] = {"seq_len": 15, "before": None}
    ways["tell"] = lambda name, fraction=None, detail="": told.append(detail)
    assert batcher_for("auto", step_model_of("llama"), lambda way: rows(12, 15), PADDED, **ways) is PADDED
    assert "memory was full" in told[-1]


def test_a_kernel_that_the_card_lacks_means_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacks(*given: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(packing, "pack", lacks)
    assert not can_pack(step_model_of("llama"), rows(12, 15), CPU)


def test_measuring_leaves_no_gradient() -> None:
    step_model = step_model_of("llama")
    stir(step_model)
    assert packing._step_seconds(step_model, rows(12, 15), PADDED) > 0
    assert all(parameter.grad is None for parameter in step_model.parameters())


@pytest.mark.parametrize("method", [pytest.param("lora", marks=pytest.mark.slow), "qlora"])
def test_packed_training_has_the_losses_of_padded_training(train: Train, recipe: Recipe, method: str) -> None:
    recipe = recipe.with_("method", method).with_("train.micro_batch", 3).with_("train.accumulation", 2)
    recipe = recipe.with_("eval.rows", 1).with_("train.recompute", "all").with_("train.group_by_length", False)
    padded, tight = (history_of(train(recipe.with_("train.packing", word))) for word in ("off", "on"))
    assert tight.failed is None, tight.failed
    assert not tight.warnings
    assert list(tight.train.losses) == pytest.approx(list(padded.train.losses), rel=1e-4)
    assert [event.loss for event in tight.evals] == pytest.approx([event.loss for event in padded.evals], rel=1e-4)


def test_what_was_measured_to_be_faster_changes_no_row_of_a_step(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe.with_("train.packing", "auto").with_("train.group_by_length", True).with_("train.micro_batch", 3)
    losses = []
    for better in (2, 3):  # the padded way, the packed one
        monkeypatch.setattr(packing, "choose", lambda *given, better=better: given[better])
        losses.append(list(history_of(train(recipe)).train.losses))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_eager_attention_is_padded_with_a_word(train: Train, recipe: Recipe) -> None:
    history = history_of(train(recipe.with_("train.packing", "on").with_("train.attention", "eager")))
    assert history.failed is None
    assert [warning.topic for warning in history.warnings] == ["packing"]


@pytest.mark.parametrize("faster", ["packed", "padded"])
def test_a_resumed_run_goes_on_as_it_began(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, faster: str
) -> None:
    """Whatever was measured at the start; measuring again could find otherwise."""
    recipe = recipe.with_("train.packing", "auto").with_("adapter.dropout", 0.2)
    seen: list[bool] = []
    forward = StepModel.forward

    def watching(self: StepModel, batch: dict[str, Any]) -> torch.Tensor:
        if self.training:
            seen.append("row_lengths" in batch)
        return forward(self, batch)

    monkeypatch.setattr(StepModel, "forward", watching)
    times = {True: 0.1 if faster == "packed" else 9.0, False: 1.0}
    monkeypatch.setattr(packing, "_step_seconds", lambda model, some, way: times[way.packed_tokens > 0])
    whole = train(recipe)
    at_step(monkeypatch, 2, lambda self: request(self.worker.paths, "stop"))
    parts = train(recipe)
    withdraw_all(parts)
    monkeypatch.setattr(packing, "_step_seconds", lambda *rest: pytest.fail("measured again"))
    train(recipe, again=parts)
    assert set(seen) == {faster == "packed"}
    assert list(history_of(parts).train.losses) == list(history_of(whole).train.losses)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(parts)[name], weight), name


def test_generation_and_padded_batches_are_untouched_by_the_switch(tiny: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    model = attach_adapter(base, AdapterSection(rank=4), recompute="none").eval()
    ids = torch.arange(20).reshape(2, 10)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 258}
    before = model.generate(**asked)
    assert can_pack(StepModel(model, "chunked", nullcontext), rows(12, 15), CPU)
    assert base.config._attn_implementation == ROW_ATTENTION
    assert torch.equal(model.generate(**asked), before)
