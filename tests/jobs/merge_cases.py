"""Tiny models of several families, adapters of every kind on them, and peft's own fp32 merge of the two."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)

from studio.jobs.base.weights.skeleton import build_skeleton
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge.steps import MergeSteps
from studio.probe.adapter_folder import find_adapter
from tests.fakes.tiny_model import tiny_config, tiny_tokenizer

ATTENTION = ["q_proj", "v_proj"]
IDS = torch.tensor([[256, 117, 110, 111, 257, 256, 100, 111, 115]])
_SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 128, "eos_token_id": 257,
    "bos_token_id": 256, "pad_token_id": 258,
}  # fmt: skip
FAMILIES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": tiny_config,
    "qwen2": lambda **more: Qwen2Config(**{**_SHAPE, **more}),
    "gemma": lambda **more: GemmaConfig(**{**_SHAPE, "head_dim": 16, **more}),
    "gemma2": lambda **more: Gemma2Config(**{**_SHAPE, "head_dim": 16, **more}),
    "mixtral": lambda **more: MixtralConfig(**{**_SHAPE, "num_local_experts": 4, **more}),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **{**_SHAPE, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, **more}
    ),
    "gpt2": lambda **more: GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=259, n_positions=128, eos_token_id=257, bos_token_id=256, **more
    ),
}


def make_base(folder: Path, family: str, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random model with its tokenizer; small shards, so that there are several."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](**changes)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # biases and norms too: all-equal ones hide mistakes
    model.save_pretrained(folder, max_shard_size="60KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def make_adapter(folder: Path, base: Path, *, vocabulary: int | None = None, **config: Any) -> Path:
    """Write an adapter whose every tensor is random, as if it had been trained."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **config}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path, vocabulary: int | None = None) -> PeftModel:
    """Base and adapter through peft, all in fp32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if vocabulary:
        model.resize_token_embeddings(vocabulary)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


def pefts_merge(base: Path, adapter: Path, folder: Path, vocabulary: int | None = None) -> dict[str, Tensor]:
    """The tensors on disk after peft's merge in fp32, cast once to bf16."""
    merged = adapted(base, adapter, vocabulary).merge_and_unload(safe_merge=True)
    merged.to(torch.bfloat16).save_pretrained(folder)
    return tensors_of(folder)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder."""
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def our_steps(base: Path, adapter: Path, **more: Any) -> MergeSteps:
    """What our merge would do."""
    return MergeSteps(build_skeleton(base, find_adapter(adapter)), TensorFiles(base), **more)


def our_merge(steps: MergeSteps) -> dict[str, Tensor]:
    """The tensors that our merge makes."""
    made = {}
    for step in steps.steps:
        if step.copies is None:
            made |= steps.compute(step)
        else:
            made[step.outputs[0].key] = steps.files.read(step.copies).to(step.outputs[0].dtype)
    return made
