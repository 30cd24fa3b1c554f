"""Our merge against peft's own in fp32, bit by bit, for every kind of adapter on several families."""

from pathlib import Path
from typing import Any

import pytest
import torch

from studio.jobs.base.weights import tensor_files
from studio.jobs.merge import row_sums, steps
from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base, our_merge, our_steps, pefts_merge

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "dora": {"target_modules": ATTENTION, "use_dora": True},
    "patterns": {
        "target_modules": ATTENTION,
        "rank_pattern": {"v_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 3},
    },
    "some layers": {"target_modules": ATTENTION, "layers_to_transform": [1]},
    "embeddings and head": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    "modules_to_save": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
    "a norm saved": {"target_modules": ATTENTION, "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 256]}},
    "lora bias": {"target_modules": ["q_proj"], "lora_bias": True},
    "biases": {"target_modules": ATTENTION, "bias": "all"},
}
FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "mixtral", "qwen3_moe")
FAST = ("qwen2", "mixtral")
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TABLE = [
    *[("llama", kind) for kind in KINDS if kind not in {"lora bias", "biases"}],
    *[("qwen2", kind) for kind in KINDS],
    *[("gemma2", kind) for kind in KINDS if kind not in {"lora bias", "biases"}],
    *[("gemma", kind) for kind in KINDS if kind not in {"lora bias", "biases"}],
    *[(family, kind) for family in ("mixtral", "qwen3_moe") for kind in KINDS if kind not in {"lora bias", "biases"}],
]


def _case(family: str, *more: Any) -> Any:
    """A case for every run of the tests, or for the slow ones."""
    return pytest.param(family, *more, marks=() if family in FAST else pytest.mark.slow)


@pytest.mark.parametrize(("family", "kind"), [_case(*row) for row in TABLE])
def test_every_bit_is_that_of_pefts_fp32_merge(tmp_path: Path, family: str, kind: str) -> None:
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS[kind])
    _same(our_merge(our_steps(base, adapter)), pefts_merge(base, adapter, tmp_path / "peft"))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("more", [{}, {"target_modules": ATTENTION}, {"target_modules": []}])
def test_fused_experts_go_back_to_one_tensor_each(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, **EXPERTS, **{"target_modules": ATTENTION, **more})
    _same(our_merge(our_steps(base, adapter)), pefts_merge(base, adapter, tmp_path / "peft"))


@pytest.mark.parametrize("family", [_case(one) for one in FAMILIES])
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_a_larger_vocabulary(tmp_path: Path, family: str, more: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, vocabulary=264, target_modules=ATTENTION, **more)
    _same(our_merge(our_steps(base, adapter)), pefts_merge(base, adapter, tmp_path / "peft", 264))


@pytest.mark.parametrize("family", [_case(one) for one in FAMILIES])
@pytest.mark.parametrize("kind", ["plain", "dora", "tokens"])
def test_a_tied_head_that_is_not_adapted(tmp_path: Path, family: str, kind: str) -> None:
    base = make_base(tmp_path / "base", family, tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, **{**KINDS[kind], "target_modules": ATTENTION})
    _same(our_merge(our_steps(base, adapter)), pefts_merge(base, adapter, tmp_path / "peft"))


LARGER = {"hidden_size": 256, "intermediate_size": 512}
ODD = {"target_modules": "all-linear", "lora_alpha": 12}
"""A scaling of 3: no power of two, so that the product itself is scaled and rounded."""


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        _case(name, kind)
        for name in ("llama", "qwen2", "gemma2")
        for kind in ("plain", "scaling 3", "rslora", "patterns")
    ]
    + [_case("qwen2", "biases"), _case("mixtral", "plain"), _case("qwen3_moe", "plain")],
)
def test_rows_summed_in_blocks_have_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    monkeypatch.setattr(steps, "SMALLEST_ROW_SUM_BYTES", 0)
    monkeypatch.setattr(tensor_files, "BLOCK_ELEMENTS", 4096)
    base = make_base(tmp_path / "base", family, tie_word_embeddings=False, **LARGER)
    adapter = make_adapter(tmp_path / "adapter", base, **(KINDS | {"scaling 3": ODD})[kind])
    made = our_steps(base, adapter)
    summed = [step for step in made.steps if step.row_sum]
    assert len(summed) >= 4
    most = 0
    for step in summed:
        assert step.row_sum is not None
        blocks = [
            block.clone()
            for block in made.blocks(step.row_sum, step.outputs[0], lambda size: memoryview(bytearray(size)))
        ]
        most = max(most, len(blocks))
        assert torch.equal(torch.cat(blocks), made.compute(step)[step.outputs[0].key])
    assert most > 1
    _same(our_merge(made), pefts_merge(base, adapter, tmp_path / "peft"))


def test_a_product_whose_blocks_have_other_bits_is_left_to_peft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "SMALLEST_ROW_SUM_BYTES", 0)
    monkeypatch.setattr(row_sums.RowSums, "_way", lambda self, b, a: row_sums.Way.WHOLE)
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, **KINDS["plain"])
    made = our_steps(base, adapter)
    assert not [step for step in made.steps if step.row_sum]
    _same(our_merge(made), pefts_merge(base, adapter, tmp_path / "peft"))


@pytest.mark.parametrize(
    ("scaling", "size", "exact"),
    [(2.0, 1.0, True), (0.25, 1.0, True), (3.0, 1.0, False), (2.0, 1e-20, False), (0.5, 1e30, False)],
)
def test_only_an_exact_scaling_is_put_before_the_product(scaling: float, size: float, exact: bool) -> None:
    torch.manual_seed(0)
    b, a = torch.randn(32, 4) * size, torch.randn(4, 32) * size
    assert row_sums.scales_exactly(b, a, scaling) is exact
    if exact:
        assert torch.equal((b * scaling) @ a, (b @ a) * scaling)


def test_conv1d_weights_lie_the_other_way_round(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gpt2")
    adapter = make_adapter(
        tmp_path / "adapter", base, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, bias="all"
    )
    _same(our_merge(our_steps(base, adapter)), pefts_merge(base, adapter, tmp_path / "peft"))


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    different = [key for key in theirs if not torch.equal(ours[key], theirs[key])]
    assert different == []
