"""Our merge against peft's own in fp32, bit by bit, for every kind of adapter on several families."""

from pathlib import Path
from typing import Any

import pytest
import torch

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
EXPERTS = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
TABLE = [
    *[("llama", kind) for kind in KINDS if kind not in {"lora bias", "biases"}],
    *[("qwen2", kind) for kind in KINDS],
    *[("gemma2", kind) for kind in KINDS if kind not in {"lora bias", "biases"}],
    *[(family, kind) for family in ("mixtral", "qwen3_moe") for kind in ("plain", "dora", "modules_to_save")],
]


@pytest.mark.parametrize(("family", "kind"), TABLE)
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
