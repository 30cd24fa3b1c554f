"""Attention with sinks: the fused kernels give what a softmax with a column for the sink gives, and its gradients.

The kernels of cards run on cards only. Stand-ins with their arguments and layouts compute in plain torch, and torch's
own fake forms of them say whether the arguments are those that they take.
"""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core.errors import BadInput
from studio.core.recipe import AdapterSection, Recipe
from studio.jobs.base import attention, sinks
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.jobs.base.model_class import class_in, model_class
from studio.jobs.base.sinks import FAMILIES, SINK_ATTENTION, packed_sink_attention, sink_attention, sink_mask
from studio.jobs.train import packing
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.objectives.supervised import pack
from studio.jobs.train.packing import can_pack
from studio.jobs.train.row_isolation import ROW_ATTENTION, VARLEN_ATTENTION
from studio.jobs.train.step_model import StepModel
from tests.fakes.sink_kernels import Kernels, seen_by
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_packing import PADDED, TIGHT, loss_and_gradients, rows, stir

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SCALE = 0.25
MODULE: Any = None
KERNEL_FOR, FUNCTION = sinks.kernel_for, sinks._SinkAttention


def inputs(dtype: torch.dtype, rows: int = 9, keys: int = 9) -> list[Tensor]:
    """Queries, grouped keys and values, and sinks."""
    torch.manual_seed(0)
    shapes = ((2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 16), (4,))
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, own: Tensor, seen: Tensor) -> Tensor:
    """Return attention `[batch, seq, heads, head_dim]` as it is defined: a softmax with a column for the sink."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~seen, -torch.inf)
    column = own.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return (torch.cat([scores, column], -1).softmax(-1)[..., :-1] @ value).transpose(1, 2)


def compare(got: Tensor, given: list[Tensor], seen: Tensor, tolerance: float) -> None:
    """Compare an output and the gradients that it gives with those of the definition in fp64."""
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    wanted = plain(*exact, seen)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)
    weights = torch.randn_like(wanted)
    (wanted * weights).sum().backward()
    (got * weights.to(got.dtype)).sum().backward()
    for tensor, other in zip(given, exact, strict=True):
        assert tensor.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(tensor.grad.double(), other.grad, rtol=tolerance, atol=tolerance * 4)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)],
)
@pytest.mark.parametrize("window", [None, 3])
def test_output_and_gradients_are_those_of_a_softmax_with_a_sink(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    given = inputs(dtype)
    got, none = sink_attention(MODULE, *given[:3], None, s_aux=given[3], scaling=SCALE, sliding_window=window)
    assert none is None
    assert got.is_contiguous()
    compare(got, given, seen_by(9, 9, window), tolerance)


def test_padding_before_a_row_is_not_seen_and_what_sees_nothing_goes_to_the_sink() -> None:
    given = inputs(torch.float64)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[1, :4] = False
    mask = sink_mask(batch_size=2, q_length=9, kv_length=9, attention_mask=real, dtype=torch.float64, device=CPU)
    assert mask is not None
    got, _ = sink_attention(MODULE, *given[:3], mask, s_aux=given[3], scaling=SCALE)
    assert not got[1, :4].any()
    compare(got, given, seen_by(9, 9) & real[:, None, None, :], 1e-12)


@pytest.mark.parametrize(("rows", "keys"), [(1, 9), (4, 9)])
def test_queries_after_a_cache(rows: int, keys: int) -> None:
    given = inputs(torch.float64, rows, keys)
    mask = sink_mask(batch_size=2, q_length=rows, kv_length=keys, q_offset=keys - rows, dtype=torch.float64, device=CPU)
    assert (mask is None) == (rows == 1)
    got, _ = sink_attention(MODULE, *given[:3], mask, s_aux=given[3], scaling=SCALE)
    compare(got, given, seen_by(rows, keys), 1e-12)


def test_dropped_weights_are_refused() -> None:
    given = inputs(torch.float32)
    with pytest.raises(ValueError, match="eager"):
        sink_attention(MODULE, *given[:3], None, s_aux=given[3], dropout=0.1)


def tiny_config(family: str = "gpt_oss", **changes: Any) -> Any:
    values: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 259,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "eos_token_id": 257,
        "bos_token_id": 256,
        "pad_token_id": 258,
    }
    return AutoConfig.for_model(family, **{**values, **changes})


def tiny_sinks(family: str = "gpt_oss", **changes: Any) -> Any:
    """A tiny random model whose sinks differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
            elif parameter.dim() > 1:
                parameter.mul_(4.0)
    return model.eval()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_model_computes_as_it_does_eagerly(family: str) -> None:
    model = tiny_sinks(family)
    torch.manual_seed(1)
    ids = torch.randint(0, 255, (2, 17))
    at_end = torch.ones_like(ids)
    at_end[1, 12:] = 0
    at_start = at_end.flip(1)
    results = []
    for name in ("eager", SINK_ATTENTION):
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        model.zero_grad()
        loss = model(input_ids=ids, attention_mask=at_end, labels=ids.masked_fill(at_end == 0, -100)).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=at_start).logits[at_start.bool()]
        told = model.generate(ids[:, :8], attention_mask=at_start[:, :8], max_new_tokens=10, do_sample=False)
        results.append((loss.item(), gradients, logits, told))
    (wanted, right, eager, said), (loss, got, logits, told) = results
    assert loss == pytest.approx(wanted, rel=1e-6)
    torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-5)
    assert torch.equal(told, said)
    assert any(name.endswith("sinks") for name in right)
    for name, gradient in right.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max()) + 1e-9)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Kernels:
    """Take this processor for a card with the flash kernel."""
    made = Kernels()
    monkeypatch.setattr(sinks, "_aten", made)
    monkeypatch.setattr(sinks, "kernel_for", lambda device, dtype: "flash")
    return made


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("window", [None, 3, 40])
def test_a_cards_kernels_are_called_as_they_want_to_be(
    card: Kernels, monkeypatch: pytest.MonkeyPatch, kernel: str, window: int | None
) -> None:
    monkeypatch.setattr(sinks, "kernel_for", lambda device, dtype: kernel)
    given = inputs(torch.float64)
    named = {"batch_size": 2, "q_length": 9, "kv_length": 9, "dtype": torch.float64, "device": CPU}
    mask = sink_mask(**named) if window is None else sink_mask(**named, local_size=window)
    assert (mask is None) == (kernel == "flash" or window is None or window > 9)
    got, _ = sink_attention(MODULE, *given[:3], None, s_aux=given[3], scaling=SCALE, sliding_window=window)
    compare(got, given, seen_by(9, 9, window), 1e-12)
    assert card.called == [kernel]


def test_a_mask_leaves_the_flash_kernel_out(card: Kernels) -> None:
    given, real = inputs(torch.float64), torch.ones(2, 9, dtype=torch.bool)
    named = {"batch_size": 2, "q_length": 9, "kv_length": 9, "dtype": torch.float64, "device": CPU}
    real[1, 6:] = False
    assert sink_mask(**named, attention_mask=real) is None, "no token sees padding that comes after it"
    mask = sink_mask(**named, attention_mask=real.flip(1))
    got, _ = sink_attention(MODULE, *given[:3], mask, s_aux=given[3], scaling=SCALE)
    compare(got, given, seen_by(9, 9) & real.flip(1)[:, None, None, :], 1e-12)
    assert card.called == ["efficient"]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_rows_in_one_call(card: Kernels, window: int | None) -> None:
    given = [tensor[:1] if tensor.dim() == 4 else tensor for tensor in inputs(torch.float64)]
    given = [tensor.detach().requires_grad_() for tensor in given]
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    by_token = [tensor[0].transpose(0, 1) for tensor in given[:3]]
    got = packed_sink_attention(*by_token, given[3], starts=starts, longest=5, scale=SCALE, window=window)
    row = torch.tensor([0] * 4 + [1] * 5)
    compare(got[None], given, seen_by(9, 9, window) & (row[:, None] == row[None, :]), 1e-12)
    assert card.called == ["flash"]


class Context:
    """What autograd gives a function: its own aborts on fake tensors of a card, and so do casts (of the sinks)."""

    needs_input_grad = (True, True, True, False)
    call: Any
    saved_tensors: tuple[Any, ...]

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_fake_tensors_of_a_card(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """torch's own declarations of the operators take these arguments and give these shapes."""
    gradients: list[Any] = []

    def there_and_back(*given: Any) -> Tensor:
        context = Context()
        made = FUNCTION.forward(context, *given)
        gradients[:] = zip(FUNCTION.backward(context, torch.empty_like(made)), given, strict=True)
        return made

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(FUNCTION, "apply", there_and_back)
    assert KERNEL_FOR(CUDA, dtype) == ("flash" if dtype == torch.bfloat16 else "efficient")
    with FakeTensorMode(), torch.no_grad():
        query, own = torch.empty(2, 4, 9, 16, dtype=dtype, device="cuda"), torch.empty(4, dtype=dtype, device="cuda")
        key = torch.empty(2, 2, 9, 16, dtype=dtype, device="cuda")
        for window in (None, 3):
            got, _ = sink_attention(MODULE, query, key, key, None, s_aux=own, sliding_window=window)
            assert (got.shape, got.dtype, got.device.type) == ((2, 9, 4, 16), dtype, "cuda")
            for gradient, given in gradients[:3]:
                assert (gradient.shape, gradient.dtype, gradient.device.type) == (given.shape, dtype, "cuda")
        if dtype == torch.bfloat16:
            rows = [tensor.select(0, 0).transpose(0, 1) for tensor in (query, key, key)]
            starts = torch.empty(3, dtype=torch.int32, device="cuda")
            packed = packed_sink_attention(*rows, own, starts=starts, longest=5, scale=None, window=3)
            assert packed.shape == (9, 4, 16)
            assert [gradient.shape for gradient, _ in gradients[:3]] == [tensor.shape for tensor in rows]


def saved(folder: Path, **changes: Any) -> Path:
    tiny_sinks(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("packing", ["off", "on"])
def test_gpt_oss_is_trained_as_it_is_eagerly_without_a_word(
    train: Train, recipe: Recipe, tmp_path: Path, packing: str
) -> None:
    recipe = recipe.with_("model.base", str(saved(tmp_path / "base"))).with_("train.packing", packing)
    recipe = recipe.with_("adapter.targets", ("q_proj", "k_proj", "v_proj", "o_proj"))
    history = history_of(train(recipe))
    assert history.failed is None, history.failed
    assert not [warning for warning in history.warnings if warning.topic == "attention"]
    eager = history_of(train(recipe.with_("train.attention", "eager").with_("train.packing", "off")))
    assert list(history.train.losses) == pytest.approx(list(eager.train.losses), rel=1e-5)


def packable() -> StepModel:
    model = tiny_sinks(vocab_size=120, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.set_attn_implementation(SINK_ATTENTION)
    section = AdapterSection(rank=4, alpha=8.0, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    step_model = StepModel(attach_adapter(model, section, recompute="all"), "chunked", nullcontext)
    stir(step_model)
    return step_model


@pytest.mark.parametrize("way", [ROW_ATTENTION, VARLEN_ATTENTION])
def test_packed_rows_of_gpt_oss_do_not_see_each_other(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    step_model = packable()
    apart, wanted = loss_and_gradients(step_model, PADDED)
    if way == VARLEN_ATTENTION:
        card: Kernels = request.getfixturevalue("card")
        monkeypatch.setattr(packing, "packed_attentions", lambda name, device: (VARLEN_ATTENTION,))
    assert can_pack(step_model, rows(12, 15), CPU)
    assert step_model.causal.config._attn_implementation == way
    together, got = loss_and_gradients(step_model, TIGHT)
    assert together == pytest.approx(apart, rel=1e-5)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-8)
    (first, second), (other,) = rows(12, 15), rows(12, seed=8)
    silent, changed = (Example(row.input_ids, np.full_like(row.labels, IGNORED)) for row in (first, other))
    with torch.no_grad():
        before, after = (float(step_model(pack([one, second], CPU))) for one in (silent, changed))
    assert before == after
    if way == VARLEN_ATTENTION:
        assert set(card.called) == {"flash"}
    loose, _ = loss_and_gradients(step_model, PADDED)
    assert loose == pytest.approx(apart, rel=1e-6), "padded rows, as a held-out evaluation has them"


def test_what_it_cannot_compute_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.attention_of(model_class(tiny_config()), CPU) == SINK_ATTENTION
    assert attention.attention_of(model_class(tiny_config()), CUDA) == SINK_ATTENTION
    assert attention.attention_of(model_class(tiny_config(head_dim=12)), CUDA) == "eager"
    assert attention.attention_of(model_class(tiny_config(attention_dropout=0.1)), CPU) == "eager"
    assert attention.attention_of(model_class(tiny_config()), torch.device("mps")) == "eager"
    monkeypatch.setattr(sinks, "_aten", SimpleNamespace())
    assert attention.attention_of(model_class(tiny_config()), CPU) == "eager"


def test_a_torch_without_the_operator_is_said(
    train: Train, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sinks, "_aten", SimpleNamespace())
    recipe = recipe.with_("model.base", str(saved(tmp_path / "base"))).with_("train.steps", 1)
    history = history_of(train(recipe.with_("adapter.targets", ("q_proj",))))
    assert history.failed is None, history.failed
    assert [warning.topic for warning in history.warnings] == ["attention"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_are_tried_before_they_are_used(card: Kernels, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    if dtype != torch.float32:
        monkeypatch.undo()  # the stand-ins would not keep the format
    assert attention.sinks_are_right(CPU, dtype)


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
@pytest.mark.parametrize("fault", ["forward", "backward", "window", "missing", "memory"])
def test_a_kernel_that_errs_is_not_used(
    card: Kernels, monkeypatch: pytest.MonkeyPatch, kernel: Any, fault: str
) -> None:
    monkeypatch.setattr(sinks, "kernel_for", lambda device, dtype: kernel)
    assert attention.sinks_are_right(CPU, torch.float32)
    name = {"flash": "_flash_attention_forward", "efficient": "_scaled_dot_product_efficient_attention"}[kernel]
    back = name.replace("_forward", "") + "_backward"
    right, right_back = getattr(card, name), getattr(card, back)

    def erring(*given: Any, **named: Any) -> Any:
        if fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if fault == "window" and kernel == "flash":
            named["window_size_left"] = -1
            given = (*given[:8], True, *given[9:])
        out, sums, *rest = right(*given, **named)
        return (out, sums * (1.44 if fault == "forward" else 1), *rest)  # a logarithm to base 2, say

    def erring_back(*given: Any, **named: Any) -> Any:
        found = right_back(*given, **named)
        return (found[1], found[0], *found[2:]) if fault == "backward" else found

    if fault == "missing":
        monkeypatch.setattr(card, name, None, raising=False)
    else:
        monkeypatch.setattr(card, name, erring, raising=False)
        monkeypatch.setattr(card, back, erring_back, raising=False)
    if fault == "memory":
        with pytest.raises(torch.OutOfMemoryError):
            attention.sinks_are_right(CPU, torch.float32)
        return
    assert attention.sinks_are_right(CPU, torch.float32) == (fault == "window" and kernel == "efficient")


def test_flash_attention_2_has_no_sinks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_config().save_pretrained(tmp_path)
    monkeypatch.setattr(attention, "_require_flash", lambda device, dtype: None)
    with pytest.raises(BadInput, match="no attention sinks"):
        attention.attention_for(class_in(tmp_path), "flash_attention_2", device=CUDA, dtype=torch.bfloat16)
