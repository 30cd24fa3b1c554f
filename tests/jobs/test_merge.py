"""Merging a trained adapter: the folder behaves like base + adapter, and nothing unusable is taken or left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.jobs.merge.job import write_steps
from studio.probe.merge import check_merge
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from studio.runs.scratch import merge_scratch
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import Merge, Train, history_of

IDS = torch.tensor([[256, 117, 110, 111, 257, 256, 100, 111, 115]])


@torch.no_grad()
def _logits(folder: Path, adapter: Path | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if adapter:
        model = PeftModel.from_pretrained(model, str(adapter))
    logits: Tensor = model.eval()(input_ids=IDS).logits[0].float()
    return logits


def _failure(paths: RunPaths) -> str:
    failed = history_of(paths).failed
    assert failed is not None
    return failed.message


@pytest.fixture
def adapter(recipe: Recipe, train: Train) -> Path:
    """Five steps of LoRA on the tiny model."""
    return train(recipe).adapter


@pytest.mark.parametrize(("method", "dtype", "close"), [("lora", "fp32", 1e-4), ("qlora", "bf16", 0.6)])
def test_the_merged_model_answers_as_base_and_adapter(
    recipe: Recipe, train: Train, merge: Merge, tmp_path: Path, method: str, dtype: str, close: float
) -> None:
    base = make_tiny_model(tmp_path / "base", dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    recipe = recipe.with_("method", method).with_("model.base", str(base)).with_("model.dtype", dtype)
    trained = train(recipe).adapter
    paths = merge(trained, base, tmp_path / "out")
    history = history_of(paths)
    assert history.finished is not None, history.failed
    merged, separate = _logits(tmp_path / "out"), _logits(base, trained)
    assert (merged - separate).abs().max() < close
    assert (_logits(base) - separate).abs().max() > 2 * close, "the adapter must change more than rounding does"
    assert _dtypes(tmp_path / "out") == _dtypes(base)
    assert json.loads(paths.report.read_text())["merged"] == str(tmp_path / "out")


def _dtypes(folder: Path) -> set[torch.dtype]:
    return {p.dtype for p in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters()}


def test_the_adapters_tokenizer_and_template_win(adapter: Path, merge: Merge, tiny: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(adapter)
    merge(adapter, tiny, tmp_path / "out")
    merged = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert merged.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi!"
    assert merged.eos_token == "<|im_end|>"


def test_a_base_that_only_the_adapter_names(adapter: Path, merge: Merge, tmp_path: Path) -> None:
    history: History = history_of(merge(adapter, "", tmp_path / "out"))
    assert history.finished is not None, history.failed


def _config_of(adapter: Path, **changes: object) -> None:
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(table | changes))


def _remove_config(adapter: Path) -> None:
    (adapter / "adapter_config.json").unlink()


def _remove_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def _cut_weights(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _only_pickle(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_remove_config, "is no adapter folder"),
        (_remove_weights, "lacks adapter_model.safetensors"),
        (_cut_weights, "corrupt or truncated"),
        (_only_pickle, "only as a pickle"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("[]"), "is not a JSON object"),
        (lambda adapter: _config_of(adapter, peft_type="IA3"), "of the kind IA3"),
    ],
)
def test_a_damaged_adapter_is_refused_before_and_in_the_job(
    adapter: Path, merge: Merge, tiny: Path, tmp_path: Path, damage: Callable[[Path], object], said: str
) -> None:
    damage(adapter)
    with pytest.raises(BadInput, match=said):
        check_merge(MergeRequest(str(adapter), str(tiny), str(tmp_path / "out")))
    assert said in _failure(merge(adapter, tiny, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_output_that_holds_something_is_left_alone(adapter: Path, merge: Merge, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "not empty" in _failure(merge(adapter, tiny, out))
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_while_it_writes_the_folder_is_the_runs_own(
    adapter: Path, merge: Merge, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners: list[str] = []

    def write_all(*words: Any, **named: Any) -> None:
        owners.append(merge_scratch(tmp_path / "out").owner)
        write_steps(*words, **named)

    monkeypatch.setattr("studio.jobs.merge.job.write_steps", write_all)
    paths = merge(adapter, tiny, tmp_path / "out")
    assert owners == [paths.name]
    assert not merge_scratch(tmp_path / "out").owner


def test_a_missing_base_is_named(adapter: Path, merge: Merge, tmp_path: Path) -> None:
    failure = _failure(merge(adapter, tmp_path / "gone", tmp_path / "out"))
    assert "gone" in failure
    assert "--base" in failure
    assert not (tmp_path / "out").exists()


def test_a_quantised_base_is_refused_with_the_right_way(
    adapter: Path, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    base = make_tiny_model(tmp_path / "four-bit")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="original 16-bit model"):
        check_merge(MergeRequest(str(adapter), str(base), str(tmp_path / "out")))
    assert "erase most" in _failure(merge(adapter, base, tmp_path / "out"))
