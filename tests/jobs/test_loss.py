"""The chunked loss against the plain one: values and gradients, for every kind of head."""

import pytest
import torch
from torch import nn

from studio.core import loss_chunk
from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.head_form import HeadForm
from studio.jobs.train.head import chunked_loss_sum, shifted


def reference(hidden: torch.Tensor, head: nn.Module, labels: torch.Tensor, form: HeadForm) -> torch.Tensor:
    logits = head(hidden).float() * form.scale
    if form.softcap:
        logits = form.softcap * torch.tanh(logits / form.softcap)
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORED)


def inputs(dtype: torch.dtype, bias: bool = False) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    torch.manual_seed(3)
    hidden = torch.randn(2, 33, 16, dtype=dtype, requires_grad=True)
    head = nn.Linear(16, 50, bias=bias, dtype=dtype)
    labels = torch.randint(0, 50, (2, 33))
    labels[0, :20] = IGNORED
    return hidden, head, labels


@pytest.mark.parametrize("form", [HeadForm(), HeadForm(softcap=2.0), HeadForm(scale=0.125), HeadForm(3.0, 2.0)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained_head", [False, True])
def test_equals_plain_cross_entropy(
    form: HeadForm, bias: bool, trained_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_chunk, "WORKSPACE_BYTES", 10 * 50 * 7)
    monkeypatch.setattr(loss_chunk, "_LEAST_TOKENS", 1)
    hidden, head, labels = inputs(torch.float32, bias)
    head.requires_grad_(trained_head)
    theirs = reference(hidden, head, labels, form)
    wanted = torch.autograd.grad(theirs * 0.3, [hidden, *(head.parameters() if trained_head else [])])
    ours = chunked_loss_sum(hidden, head, labels, form)
    got = torch.autograd.grad(ours * 0.3, [hidden, *(head.parameters() if trained_head else [])])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
def test_16_bit_gradients_are_those_of_fp32_up_to_rounding(dtype: torch.dtype, tolerance: float) -> None:
    hidden, head, labels = inputs(dtype)
    head.requires_grad_(False)
    (got,) = torch.autograd.grad(chunked_loss_sum(hidden, head, labels, HeadForm()), [hidden])
    exact = hidden.detach().float().requires_grad_()
    (wanted,) = torch.autograd.grad(reference(exact, head.float(), labels, HeadForm()), [exact])
    assert (got.float() - wanted).norm() / wanted.norm() < tolerance


def test_masked_tokens_never_reach_the_head() -> None:
    hidden, head, labels = inputs(torch.float32)
    head.requires_grad_(False)
    seen: list[int] = []
    plain_linear = nn.functional.linear

    def counting(rows: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape[0])
        return plain_linear(rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.functional, "linear", counting)
        chunked_loss_sum(hidden, head, labels, HeadForm())
    assert sum(seen) == int((labels != IGNORED).sum())


def test_all_masked_is_zero_with_a_graph() -> None:
    hidden, head, labels = inputs(torch.float32)
    loss = chunked_loss_sum(hidden, head, torch.full_like(labels, IGNORED), HeadForm())
    loss.backward()
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()


def test_shift_lets_each_position_predict_the_next() -> None:
    assert shifted(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORED]]


def test_chunk_is_bounded_by_memory_and_by_tokens() -> None:
    assert loss_chunk.loss_chunk_tokens(128_256, 4096) * 128_256 * loss_chunk.LOGIT_BYTES <= loss_chunk.WORKSPACE_BYTES
    assert loss_chunk.loss_chunk_tokens(100, 7) == 7
    assert loss_chunk.loss_chunk_tokens(10**9, 4096) == 64
