"""A forward pass with weights left in their files gives what the loaded model gives, and holds little of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from studio.jobs.base.weights import tensor_files
from studio.jobs.base.weights.skeleton import build_clean, build_skeleton
from studio.jobs.base.weights.streamed import adapted_logits, folder_logits, most_lent, streamed_logits
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.probe.adapter_folder import find_adapter
from tests.jobs.merge_cases import ATTENTION, IDS, adapted, make_adapter, make_base, our_steps

MASK = torch.ones_like(IDS)


@pytest.fixture(autouse=True)
def _many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_files, "BLOCK_ELEMENTS", 1000)


@torch.no_grad()
def _loaded(model: nn.Module) -> Tensor:
    logits: Tensor = model.eval()(input_ids=IDS, attention_mask=MASK).logits
    return logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gemma2", "mixtral", "qwen3_moe", "gpt2"])
def test_a_folder_answers_as_the_loaded_model(tmp_path: Path, family: str, tied: bool) -> None:
    base = make_base(tmp_path / "base", family, tie_word_embeddings=tied)
    whole = _loaded(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert (folder_logits(base, IDS, MASK) - whole).abs().max() < 1e-4


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ATTENTION, "use_dora": True},
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 256]}},
    ],
)
def test_base_and_adapter_answer_as_loaded(tmp_path: Path, config: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    logits = adapted_logits(build_skeleton(base, find_adapter(adapter)), base, IDS, MASK)
    assert (logits - _loaded(adapted(base, adapter))).abs().max() < 1e-4


def test_matrices_of_a_plain_model_are_never_whole_in_memory(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    steps = our_steps(base, make_adapter(tmp_path / "adapter", base, target_modules="all-linear"))
    norms = 2 * 64
    assert most_lent(steps.skeleton.adapted, steps, "base_model.model.") == norms
    dora = our_steps(base, make_adapter(tmp_path / "dora", base, target_modules=["down_proj"], use_dora=True))
    assert most_lent(dora.skeleton.adapted, dora, "base_model.model.") > 64 * 96


class _LooksAtAWeight(nn.Module):
    """Computes with the weight of a layer that it does not call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        layer: Any = self.inner
        return nn.functional.linear(layer.up_proj(hidden), layer.down_proj.weight)


class _Odd:
    """The weights of such a model."""

    def __init__(self, files: TensorFiles) -> None:
        self.files = files

    def read(self, name: str) -> Tensor:
        return self.files.read(self.key_of(name))

    def key_of(self, name: str) -> str:
        key = name.replace(".inner", "")
        return key if key in self.files.tensors else "model.embed_tokens.weight"


def test_a_layer_that_is_not_called_is_lent(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32)

    def odd(model: Any) -> Any:
        model.model.layers[1].mlp = _LooksAtAWeight(model.model.layers[1].mlp)
        return model

    whole = _loaded(odd(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)))
    logits = streamed_logits(odd(build_clean(base)), _Odd(TensorFiles(base)), IDS, MASK)
    assert (logits - whole).abs().max() < 1e-4
