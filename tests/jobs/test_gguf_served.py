"""Models as people tune them, in their hub's form: trained, then served by peft on the original class and by llama.cpp.

Needs the package index once, as `test_golden.py` does.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer

from studio.core.errors import JobFailed
from studio.core.recipe import Recipe
from studio.jobs.base.data.template import render
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.base.tokenizer import stop_ids
from studio.jobs.export.gguf import ask_llama
from studio.jobs.export.gguf_view import make_view
from studio.jobs.train import job
from studio.probe.data import Message
from tests.fakes import families
from tests.fakes.warm_llama import WarmLlamaTool
from tests.jobs import test_gguf_families
from tests.jobs.conftest import QUESTIONS, Merge, Train, history_of
from tests.jobs.test_gguf_families import _export, _kl, _tokenizer

pytestmark = pytest.mark.slow
tools = test_gguf_families.tools

TOKENIZERS = {"gemma3": "gemma", "qwen3_5": "qwen", "mistral3": "llama", "gpt_oss": "qwen"}
TEXT: dict[str, dict[str, Any]] = {
    # What llama.cpp has written into its code: a layer of six that sees all, and positions of Qwen3.5 in three parts.
    "gemma3": {"num_hidden_layers": 6, "layer_types": [*["sliding_attention"] * 5, "full_attention"]},
    "qwen3_5": {
        "head_dim": 32,
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
            "mrope_section": [2, 1, 1],
        },
    },
}
ANSWER_TOKENS = 12


def make(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **hub: Any) -> Any:
    """Write a checkpoint with a tokenizer that llama.cpp reads, and return the tokenizer."""
    own = _tokenizer(TOKENIZERS[name], folder.with_name("tokenizer"))
    tokenizer = AutoTokenizer.from_pretrained(own)
    words = len(tokenizer)
    sizes = {
        "vocab_size": words + 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = families.FAMILIES[name]
    values = {**made.values}
    for key, token in made.values.items():
        if key.endswith(("token_id", "token_index")) and key not in sizes:
            values[key] = words + token % 8  # none that a text has
    if "text_config" in values:
        values["text_config"] = {**values["text_config"], **sizes, **TEXT.get(name, {})}
    else:
        values |= sizes
    monkeypatch.setitem(families.FAMILIES, name, replace(made, values=values, **hub))
    families.make_family(folder, name, dtype=torch.bfloat16)
    tokenizer.save_pretrained(folder)
    return tokenizer


@torch.no_grad()
def logits(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


@torch.no_grad()
def answered(model: Any, prompts: list[list[int]], stops: list[int]) -> list[list[int]]:
    """Return prompts with what the model says next, greedily, to the end of its answer.

    What a model would say behind that was never trained: there two tokens may be as good as equally likely.
    """
    made = [[*row] for row in prompts]
    for row in made:
        for _ in range(ANSWER_TOKENS):
            row.append(int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax()))
            if row[-1] in stops:
                break
    return made


def converted(tool: LlamaTool, base: Path, folder: Path) -> Path:
    file = folder / "bare.gguf"
    tool.run("convert", make_view(folder / "bare", [base], weights=base), file, "f16", "bare", "default")
    return file


def says(found: Tensor, rows: list[list[int]], prompts: list[list[int]]) -> bool:
    """Return whether the largest logit before each token of the answers is that token's."""
    start = 0
    for row, prompt in zip(rows, prompts, strict=True):
        said = found[start : start + len(row)].argmax(-1).tolist()
        if said[len(prompt) - 1 : -1] != row[len(prompt) :]:
            return False
        start += len(row)
    return True


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[PeftModel]:
    """The models that training jobs of this process have trained."""
    kept: list[PeftModel] = []
    prepare = job.trainable_model

    def keeping(*given: Any, **named: Any) -> Any:
        made = prepare(*given, **named)
        kept.append(made[0])
        return made

    monkeypatch.setattr(job, "trainable_model", keeping)
    return kept


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_trained_model_says_the_same_tokens_everywhere(
    name: str,
    tools: Path,
    recipe: Recipe,
    train: Train,
    merge: Merge,
    trained: list[PeftModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = tmp_path / "base"
    tokenizer = make(name, base, monkeypatch)
    changes = {
        **{"model.base": str(base), "adapter.targets": ("q_proj", "v_proj", "o_proj")},
        **{"adapter.rank": 8, "train.learning_rate": 2e-2, "train.steps": 100, "train.micro_batch": 6},
    }
    for path, value in changes.items():
        recipe = recipe.with_(path, value)
    paths = train(recipe)
    history = history_of(paths)
    assert history.failed is None, history.failed
    assert history.train.losses[-1] < 0.2 * history.train.losses[0]
    asked = [render(tokenizer, [[Message("user", question)]], ask=True)[0] for question, _ in QUESTIONS]
    learnt = trained[0].get_base_model().float().eval()
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in asked]
    rows = answered(learnt, prompts, stop_ids(tokenizer, None))
    wanted = logits(learnt, rows)

    plain = getattr(transformers, families.FAMILIES[name].architecture).from_pretrained(base, dtype=torch.float32)
    assert not says(logits(plain, rows), rows, prompts), "the adapter must change what is said"
    served = PeftModel.from_pretrained(plain, str(paths.adapter))
    torch.testing.assert_close(logits(served, rows), wanted, atol=1e-4, rtol=1e-4)

    tool = WarmLlamaTool(tools, tmp_path / "tool.log", lambda: None)
    merged = tmp_path / "merged"
    assert history_of(merge(paths.adapter, base, merged)).failed is None
    for form, far in {"f16": 1e-3, "q8_0": 1e-2}.items():
        file, _ = _export(tmp_path, merged, form)
        found = llama_logits(tool, file, rows, tmp_path)
        assert _kl(found, wanted) < far
        assert says(found, rows, prompts), form
    lora, _ = _export(tmp_path, paths.adapter, "lora-gguf", base=str(base))
    bare = converted(tool, base, tmp_path)
    found = llama_logits(tool, bare, rows, tmp_path, str(lora))
    assert _kl(found, wanted) < 1e-3
    assert says(found, rows, prompts)


@pytest.mark.parametrize("said", [1, None])
def test_qwen3_5_without_the_layer_for_further_tokens(
    said: int | None, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers writes it: without their tensors, with or without the number of such layers in the config."""
    hub = {"text_config": {"mtp_num_hidden_layers": said, "full_attention_interval": 2}}
    tokenizer = make("qwen3_5", tmp_path / "base", monkeypatch, unread={}, hub=hub)
    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(tmp_path / "base", dtype=torch.float32)
    prompts = [tokenizer("What is this?").input_ids]
    rows = answered(model.eval(), prompts, stop_ids(tokenizer, None))
    tool = WarmLlamaTool(tools, tmp_path / "tool.log", lambda: None)
    ask_llama(tool, make_view(tmp_path / "asked", [tmp_path / "base"]), tokenizer, "x", tmp_path / "vocabulary.gguf")
    found = llama_logits(tool, converted(tool, tmp_path / "base", tmp_path), rows, tmp_path)
    assert _kl(found, logits(model, rows)) < 1e-3
    assert says(found, rows, prompts)


def test_windows_that_llama_cpp_does_not_have_are_refused(
    tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TEXT, "gemma3", {})  # every second layer sees all
    make("gemma3", tmp_path / "base", monkeypatch)
    tool = LlamaTool(tools, tmp_path / "tool.log", lambda: None)
    view = make_view(tmp_path / "asked", [tmp_path / "base"])
    with pytest.raises(JobFailed, match=r"config has layer_types = .*llama.cpp cannot do"):
        tool.run("vocab", view, tmp_path / "vocabulary.gguf", "x")
