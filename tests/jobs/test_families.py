"""The chunked loss against each family's own forward: it is used where it is the same, and left where it is not."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from studio.core.recipe import AdapterSection
from studio.jobs.train.adapter import attach_adapter
from studio.jobs.train.step_model import StepModel

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 120,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "falcon": {"new_decoder_architecture": False},
    "gpt_neox": {},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 2.0},
    "olmo2": {},
    "stablelm": {},
    "cohere": {"logit_scale": 0.0625},
    "glm": {},
    "opt": {"word_embed_proj_dim": 64, "ffn_dim": 96},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def model_of(family: str) -> Any:
    torch.manual_seed(1)
    values = {**SMALL, **FAMILIES[family]}
    if family == "falcon":
        del values["head_dim"]  # a property there
    config = AutoConfig.for_model(family, **values)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    return attach_adapter(model, AdapterSection(rank=4, alpha=8.0), recompute="all")


def batch() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    ids = torch.randint(3, 120, (2, 20))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    labels = ids.clone()
    labels[:, :8] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_both_losses_and_their_gradients_are_the_same(family: str) -> None:
    model = model_of(family)
    results = []
    for loss in ("full", "chunked"):
        step_model = StepModel(model, loss, nullcontext)  # type: ignore[arg-type]
        assert step_model.prove(batch()) is (loss == "chunked")
        model.train()
        model.zero_grad()
        value = step_model(batch())
        value.backward()
        results.append((value.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (full, wanted), (chunked, got) = results
    torch.testing.assert_close(chunked, full, rtol=1e-4, atol=1e-4)
    assert wanted.keys() == got.keys()
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-3, atol=1e-4 * float(gradient.abs().max()) + 1e-7)


def test_a_head_that_does_something_else_falls_back() -> None:
    model = model_of("llama")
    causal = model.get_base_model()
    forward = causal.forward

    def doubled(**inputs: Any) -> Any:
        output = forward(**inputs)
        output.logits = output.logits * 2
        return output

    causal.forward = doubled
    step_model = StepModel(model, "chunked", nullcontext)
    assert not step_model.prove(batch())
    full = StepModel(model, "full", nullcontext)
    torch.testing.assert_close(step_model(batch()), full(batch()))
