"""Architectures besides Llama, tiny and random, all the way: merge, GGUF, llama.cpp, and the same tokens and answers.

Needs the package index once, as `test_golden.py` does. What a converter refuses is in `test_gguf_job.py`.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from studio.core.errors import JobFailed
from studio.jobs.base.data.template import render, with_system_folded
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.export import work as export_work
from studio.jobs.export.gguf import ask_llama
from studio.jobs.export.gguf_view import make_view
from studio.jobs.export.golden import CONVERSATIONS, golden_texts
from studio.probe.data import Message
from studio.probe.llama_tools import TOOLS_VARIABLE, is_whole, tools_folder
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from tests.fakes.go_template import HAS_GO, ollama_prompts
from tests.fakes.tokenizers import CHATML, qwen_folder, sentencepiece_folder
from tests.fakes.warm_llama import WarmLlamaTool
from tests.jobs.conftest import Merge, history_of

pytestmark = pytest.mark.slow

INST = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if m.role == 'user' %}"
    "{{ ' [INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ENDS = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
SHAPE: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
HEADS = {"head_dim": 64}
SLIDING = {"query_pre_attn_scalar": 64, "sliding_window": 128}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "qwen2": (Qwen2Config, "qwen", {}),
    "qwen3": (Qwen3Config, "qwen", {**HEADS, "tie_word_embeddings": True}),
    # llama.cpp always makes the chosen experts' weights add up to one, as every published Qwen3 MoE model does.
    "qwen3_moe": (Qwen3MoeConfig, "qwen", {**HEADS, **EXPERTS, "norm_topk_prob": True}),
    "qwen2_moe": (Qwen2MoeConfig, "qwen", {**EXPERTS, "shared_expert_intermediate_size": 256}),
    "mistral": (MistralConfig, "llama", {"sliding_window": None}),
    "mixtral": (MixtralConfig, "llama", {"num_local_experts": 4, "sliding_window": None}),
    "phi3": (Phi3Config, "phi3", {"num_key_value_heads": 4, "original_max_position_embeddings": 512}),
    "gemma2": (Gemma2Config, "gemma", {**HEADS, **SLIDING}),
    "gemma3": (Gemma3TextConfig, "gemma", {**HEADS, **SLIDING, "num_hidden_layers": 6}),
    "gpt2": (GPT2Config, "qwen", {}),
    # The files must say the base of the rotary frequencies; Falcon 2 has another than llama.cpp takes it to be.
    "gpt_neox": (GPTNeoXConfig, "qwen", {"rotary_pct": 0.5, "rotary_emb_base": 500.0}),
    "falcon": (FalconConfig, "qwen", {}),
    "falcon2": (FalconConfig, "qwen", {"new_decoder_architecture": True, "num_kv_heads": 2, "rope_theta": 500.0}),
}
EMBEDDED = ("embed", "lm_head", "wte", "wpe")
TARGETS = {
    "qwen3_moe": "all-linear", "qwen2_moe": "all-linear",
    "phi3": ["qkv_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"], "gpt_neox": ["query_key_value", "dense"],
    "falcon": ["query_key_value", "dense"], "falcon2": ["query_key_value", "dense"],
}  # fmt: skip
BOUNDS = {"q8_0": (7, 0.01), "q4_k_m": (15, 0.15)}
"""llama.cpp's number of the file type and the KL in nats a token, at the most. Measured: .0013 and .032 (mixtral)."""


@dataclass(frozen=True)
class Parts:
    """A base, an adapter on it with the tokenizer that a training run would save, and their answers."""

    base: Path
    adapter: Path
    rows: list[list[int]]
    wanted: Tensor
    without: Tensor


@pytest.fixture(scope="module")
def tools() -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        if is_whole(tools_folder()):
            patch.setenv(TOOLS_VARIABLE, str(tools_folder()))
        try:
            folder = ensure_tools(lambda words: None, lambda: None)
        except JobFailed as failed:
            pytest.skip(str(failed))
        patch.setenv(TOOLS_VARIABLE, str(folder))
        patch.setattr(export_work, "LlamaTool", WarmLlamaTool)
        yield folder
    WarmLlamaTool.end()


def _tokenizer(kind: str, folder: Path) -> Path:
    if kind == "qwen":
        special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": CHATML}
        return qwen_folder(folder, special, **named)
    if kind == "gemma":
        special = ("<start_of_turn>", "<end_of_turn>")
        return sentencepiece_folder(folder, TURNS, kind="GemmaTokenizer", special=special, add_bos_token=True)
    if kind == "phi3":
        special = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
        more = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "add_bos_token": False, "legacy": False}
        return sentencepiece_folder(folder, ENDS, kind="LlamaTokenizer", special=special, **more)
    return sentencepiece_folder(folder, INST, kind="LlamaTokenizer", special=(), add_bos_token=True, legacy=False)


@torch.no_grad()
def _make(family: str, folder: Path) -> Parts:
    config, kind, more = FAMILIES[family]
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer(kind, base))
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(config(**{**SHAPE, "vocab_size": len(tokenizer), **ids, **more}))
    for name, parameter in model.named_parameters():
        scale = 0.1 if parameter.dim() == 1 else 0.03 if any(word in name for word in EMBEDDED) else 0.06
        parameter.add_(torch.randn_like(parameter) * scale)
    model.to(torch.bfloat16).save_pretrained(base)
    rows = [tokenizer(text, add_special_tokens=False).input_ids for text in golden_texts(tokenizer)]
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = _logits(plain, rows)
    targets = TARGETS.get(family, ["q_proj", "v_proj", "o_proj"])
    # Of Mixtral not the router: a merged one that chooses another expert for one token would say nothing of the files.
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if family == "mixtral" else None
    wanted = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, target_parameters=experts)
    adapted = get_peft_model(plain, wanted)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    adapted.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    return Parts(base, adapter, rows, _logits(adapted, rows), without)


@torch.no_grad()
def _logits(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


def _kl(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours[:, : theirs.shape[1]], theirs[:, : ours.shape[1]]
    return float(
        kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="none").sum(-1).mean()
    )


def _export(folder: Path, source: Path, form: str, **more: str) -> tuple[Path, dict[str, Any]]:
    from studio.jobs.export.__main__ import _body

    paths, out = RunPaths(folder / f"export-{form}"), folder / f"out-{form}"
    paths.root.mkdir()
    write_job(paths, ExportRequest(str(source), str(out), form, **more))
    run_job(paths.root, _body)
    history = history_of(paths)
    assert history.finished is not None, history.failed
    return next(out.glob("*.gguf")), json.loads(paths.report.read_text())


def _asks_as_in_training(file: Path, tokenizer: Any, tool: LlamaTool, folder: Path) -> bool:
    """Hold what Ollama makes of the Modelfile against the training; False where it has no template of its own."""
    modelfile = (file.parent / "Modelfile").read_text()
    if "TEMPLATE" not in modelfile:
        return False
    trims = "| trim" in tokenizer.chat_template  # which Ollama's templates cannot: for it words must have no such ends
    turns = [
        [(role, words.strip() if trims else words) for role, words in conversation[:-1]]  # each ends with an answer
        for conversation in CONVERSATIONS
    ]
    asked, answered = folder / "asked.json", folder / "answered.json"
    asked.write_text(json.dumps(ollama_prompts(modelfile, turns)))
    tool.run("tokens", file, asked, answered, "default")
    found = [row["with_added"] for row in json.loads(answered.read_text())["rows"]]  # as Ollama has them
    said = [[Message(role, words) for role, words in each] for each in turns]
    texts = [
        made if made is not None else render(tokenizer, [with_system_folded(each)], ask=True)[0]
        for each, made in zip(said, render(tokenizer, said, ask=True), strict=True)
    ]
    assert found == [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    return True


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_reads_and_answers_in_llama_cpp_as_it_was_trained(
    family: str, tools: Path, merge: Merge, tmp_path: Path
) -> None:
    parts = _make(family, tmp_path)
    tool = WarmLlamaTool(tools, tmp_path / "tool.log", lambda: None)
    # What an export of the adapter finds out before it merges.
    trained = AutoTokenizer.from_pretrained(parts.adapter)
    view = make_view(tmp_path / "asked", [parts.base, parts.adapter], weights=parts.base)
    asked = ask_llama(tool, view, trained, "tuned", tmp_path / "vocabulary.gguf")
    assert ("Phi-3" in asked.name) == (family == "phi3")

    merged = tmp_path / "merged"
    assert history_of(merge(parts.adapter, parts.base, merged)).finished is not None
    file, report = _export(tmp_path, merged, "f16")
    assert report["golden"]["conversations"] == 5
    assert report["golden"]["ends_with_stop"] is True
    assert report["golden"]["composes"] == (FAMILIES[family][1] == "qwen")
    assert report["golden"]["bos_doubled"] == (family in {"mistral", "mixtral", "gemma2", "gemma3"})
    if HAS_GO:
        assert _asks_as_in_training(file, trained, tool, tmp_path) == (family != "phi3")
    found = {"f16": _kl(llama_logits(tool, file, parts.rows, tmp_path), parts.wanted)}
    for form, (number, _) in BOUNDS.items():
        tool.run("quantize", file, tmp_path / f"{form}.gguf", str(number))
        found[form] = _kl(llama_logits(tool, tmp_path / f"{form}.gguf", parts.rows, tmp_path), parts.wanted)
    lora, lora_report = _export(tmp_path, parts.adapter, "lora-gguf", base=str(parts.base))
    changed = _kl(parts.without, parts.wanted)
    print(family, found, "lora", lora_report["loss"]["mean_kl"], "without", changed, report["loss"])
    assert changed > 0.02, "the adapter must change the answers"
    assert lora.stat().st_size > 10_000
    assert lora_report["loss"]["mean_kl"] < 1e-3
    assert 0 < found["f16"] < 1e-3
    assert found["q8_0"] < BOUNDS["q8_0"][1]
    assert found["f16"] < found["q4_k_m"] < BOUNDS["q4_k_m"][1]


def test_a_tensor_that_has_no_place_is_found_out_from_the_base(tools: Path, tmp_path: Path) -> None:
    base = _tokenizer("qwen", tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = GPT2Config(n_embd=256, n_layer=1, n_head=4, vocab_size=len(tokenizer), add_cross_attention=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    tool = WarmLlamaTool(tools, tmp_path / "tool.log", lambda: None)
    ask_llama(tool, make_view(tmp_path / "asked", [base]), tokenizer, "x", tmp_path / "vocabulary.gguf")
    view = make_view(tmp_path / "with-weights", [base], weights=base)
    with pytest.raises(JobFailed, match=r"Can not map tensor .transformer\.h\.0\.crossattention"):
        ask_llama(tool, view, tokenizer, "x", tmp_path / "again.gguf")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FalconConfig(alibi=True), "alibi = True"),
        (FalconConfig(parallel_attn=False), "parallel_attn = False"),
        (FalconConfig(ffn_hidden_size=100), "ffn_hidden_size = 100"),
        (GPT2Config(n_inner=100), "n_inner = 100"),
        (GPT2Config(activation_function="relu"), "activation_function = 'relu'"),
        (GPT2Config(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx = True"),
        (GPTNeoXConfig(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), "rope_parameters"),
        (GPTNeoXConfig(hidden_act="silu"), "hidden_act = 'silu'"),
    ],
)
def test_a_form_of_a_family_that_llama_cpp_does_not_run_is_refused_from_the_config(
    config: Any, said: str, tools: Path, tmp_path: Path
) -> None:
    base = _tokenizer("qwen", tmp_path / "base")
    config.architectures = {"gpt2": ["GPT2LMHeadModel"], "falcon": ["FalconForCausalLM"]}.get(
        config.model_type, ["GPTNeoXForCausalLM"]
    )
    config.save_pretrained(base)
    tool = LlamaTool(tools, tmp_path / "tool.log", lambda: None)
    with pytest.raises(JobFailed, match=f"config has {re.escape(said)}.*llama.cpp cannot do"):
        tool.run("vocab", make_view(tmp_path / "asked", [base]), tmp_path / "vocabulary.gguf", "x")
