"""Attention: refused with the reason, eager said aloud, and torch's kernel for packed rows called as it wants to be.

The kernel itself runs on cards only; here a stand-in with its arguments computes in plain torch.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as kernel
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import sdpa_attention

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.base import attention
from studio.jobs.base.attention import attention_for
from studio.jobs.base.model_class import class_in
from studio.jobs.train import packing
from studio.jobs.train.batches import Batcher
from studio.jobs.train.packing import can_pack
from studio.jobs.train.row_isolation import ROW_ATTENTION, VARLEN_ATTENTION, packed_attentions
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_packing import PADDED, TIGHT, loss_and_gradients, rows, step_model_of, stir

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(scope="session")
def capped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Gemma 2, whose attention scores have a soft cap."""
    folder = tmp_path_factory.mktemp("models") / "capped"
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma2",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=259,
        query_pre_attn_scalar=16,
        eos_token_id=257,
        bos_token_id=256,
        pad_token_id=258,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_model_that_needs_eager_attention_gets_it_with_a_word(
    train: Train, recipe: Recipe, capped: Path, method: str
) -> None:
    recipe = recipe.with_("model.base", str(capped)).with_("method", method)
    history = history_of(train(recipe))
    assert history.failed is None, history.failed
    assert [warning.topic for warning in history.warnings] == ["attention"]
    asked = history_of(train(recipe.with_("train.attention", "eager")))
    assert not asked.warnings
    assert list(asked.train.losses) == list(history.train.losses)


def test_flash_attention_is_refused_where_it_cannot_run(train: Train, recipe: Recipe) -> None:
    failed = history_of(train(recipe.with_("train.attention", "flash_attention_2"))).failed
    assert failed is not None
    assert "CUDA cards only" in failed.message
    assert "cannot be loaded" not in failed.message


@pytest.mark.parametrize(
    ("capability", "dtype", "installed", "reason"),
    [
        ((7, 5), torch.float16, True, "this card has 7.5"),
        ((8, 6), torch.float32, True, "fp32"),
        ((8, 6), torch.bfloat16, False, "flash-attn is not installed"),
        ((9, 0), torch.bfloat16, True, ""),
    ],
)
def test_flash_attention_needs_card_format_and_package(
    monkeypatch: pytest.MonkeyPatch,
    tiny: Path,
    capability: tuple[int, int],
    dtype: torch.dtype,
    installed: bool,
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: installed)

    def found() -> str:
        return attention_for(class_in(tiny), "flash_attention_2", device=CUDA, dtype=dtype)

    if not reason:
        assert found() == "flash_attention_2"
        return
    with pytest.raises(BadInput, match=reason):
        found()


def test_what_may_keep_packed_rows_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packed_attentions("sdpa", CPU) == (ROW_ATTENTION,)
    assert packed_attentions("eager", CPU) == ()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert packed_attentions("sdpa", CUDA) == (VARLEN_ATTENTION, ROW_ATTENTION)
    assert packed_attentions("flash_attention_2", CUDA) == ("flash_attention_2",)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert packed_attentions("sdpa", CUDA) == (ROW_ATTENTION,)


@pytest.mark.parametrize(
    ("capability", "dtype", "grouped"),
    [((8, 0), torch.bfloat16, True), ((8, 0), torch.float32, False), ((7, 5), torch.float16, False)],
)
def test_heads_are_grouped_on_a_card_only_where_flash_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, grouped: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    key: Any = SimpleNamespace(device=CUDA, dtype=dtype, shape=(1, 2, 8, 16))
    assert attention.has_grouped_kernel(key) is grouped
    assert sdpa_attention.use_gqa_in_sdpa(None, key, key) is grouped


def test_repeated_keys_attend_as_grouped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watching(*args: Any, enable_gqa: bool = False, **named: Any) -> Tensor:
        asked.append(enable_gqa)
        return fused(*args, enable_gqa=enable_gqa, **named)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    step_model = step_model_of("llama")
    stir(step_model)
    results = []
    for grouped in (True, False):
        monkeypatch.setattr(attention, "has_grouped_kernel", lambda key, grouped=grouped: grouped)
        asked.clear()
        batcher = Batcher(1, 0, CPU)
        results.append(loss_and_gradients(step_model, batcher))
        assert set(asked) == {grouped}
    (wanted, gradients), (loss, got) = results
    assert loss == pytest.approx(wanted, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)


class Kernel:
    """`varlen_attn` in plain torch, with its signature; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0
        self.leaks = False

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        other_starts: Tensor,
        longest: int,
        other_longest: int,
        *,
        scale: float | None,
        window_size: tuple[int, int],
        enable_gqa: bool,
    ) -> Tensor:
        self.calls += 1
        assert starts.dtype == other_starts.dtype == torch.int32
        lengths = starts.diff().tolist()
        assert longest == other_longest == max(lengths)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        back, ahead = window_size
        assert ahead == 0
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
        place = torch.arange(len(row))
        behind = place[:, None] - place[None, :]
        seen = (behind >= 0) & (behind <= (back if back >= 0 else len(row)))
        if not self.leaks:
            seen &= row[:, None] == row[None, :]
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), value)


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """Take this processor for a card with the kernel."""
    made = Kernel()
    monkeypatch.setattr(kernel, "varlen_attn", made)
    ways = (VARLEN_ATTENTION, ROW_ATTENTION)
    monkeypatch.setattr(packing, "packed_attentions", lambda name, device: ways if name == "sdpa" else ())
    return made


@pytest.mark.parametrize(
    ("family", "changes"), [("llama", {}), ("qwen3", {}), ("granite", {}), ("mistral", {"sliding_window": 5})]
)
def test_one_kernel_call_for_all_rows(on_a_card: Kernel, family: str, changes: dict[str, Any]) -> None:
    step_model = step_model_of(family, "chunked", **changes)
    stir(step_model)
    apart, wanted = loss_and_gradients(step_model, PADDED)
    assert can_pack(step_model, rows(12, 15), CPU)
    assert step_model.causal.config._attn_implementation == VARLEN_ATTENTION
    on_a_card.calls = 0
    together, got = loss_and_gradients(step_model, TIGHT)
    assert on_a_card.calls > 0
    assert together == pytest.approx(apart, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)
    on_a_card.calls = 0
    assert loss_and_gradients(step_model, PADDED)[0] == pytest.approx(apart, rel=1e-6)
    assert on_a_card.calls == 0, "padded rows are transformers' business"


@pytest.mark.parametrize("fault", ["leaks", "missing"])
def test_a_kernel_that_leaks_or_fails_is_not_used(
    on_a_card: Kernel, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "leaks":
        on_a_card.leaks = True
    else:
        monkeypatch.delattr(kernel, "varlen_attn")
    step_model = step_model_of("llama")
    assert can_pack(step_model, rows(12, 15), CPU)
    assert step_model.causal.config._attn_implementation == ROW_ATTENTION


def test_dropout_of_scores_goes_row_by_row(on_a_card: Kernel) -> None:
    step_model = step_model_of("llama", "chunked", attention_dropout=0.5)
    assert can_pack(step_model, rows(12, 15), CPU)
    on_a_card.calls = 0
    step_model.train()
    assert float(step_model(TIGHT.batch(rows(12, 15))).detach()) > 0
    assert on_a_card.calls == 0
