"""Exports as their users load them: quantised for real, as close to the merged model as said, with its tokenizer."""

import json
import tomllib
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForConditionalGeneration

from studio.core.events import Started
from studio.core.recipe import Recipe
from studio.core.recipe_parse import recipe_from_dict
from studio.jobs.export import quantised, work
from studio.jobs.export.model_card import Training, adapter_card
from studio.probe.adapter_folder import AdapterFound
from studio.probe.safetensors_file import SafetensorsHeader
from studio.runs.control import request
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from tests.fakes.families import make_family
from tests.fakes.small_disk import small_disk
from tests.fakes.tiny_model import CHAT_TEMPLATE, make_tiny_model
from tests.jobs.conftest import Train, history_of

Export = Callable[..., RunPaths]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Run the export job in this process; returns its run."""
    from studio.jobs.export.__main__ import _body

    def run(source: Path, out: Path, form: str, trained: str = "", **more: str) -> RunPaths:
        paths = RunPaths(tmp_path / f"export-{len(list(tmp_path.glob('export-*')))}")
        paths.root.mkdir()
        write_job(paths, ExportRequest(str(source), str(out), form, trained, **more))
        run_job(paths.root, _body)
        return paths

    return run


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "merged", dtype=torch.bfloat16)


@pytest.mark.parametrize(("form", "kind", "bits"), [("nf4", "Linear4bit", 4), ("int8", "Linear8bitLt", 8)])
def test_the_folder_loads_quantised_and_answers_alike(
    merged: Path, export: Export, tmp_path: Path, form: str, kind: str, bits: int
) -> None:
    paths = export(merged, tmp_path / "out", form)
    assert history_of(paths).finished is not None, history_of(paths).failed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    layers = [module for module in model.modules() if type(module).__name__ == kind]
    assert len(layers) == 14
    assert {layer.weight.dtype.itemsize for layer in layers} == {1}
    stored = sum(layer.weight.numel() for layer in layers) * 8 / bits
    assert stored == sum(p.numel() for n, p in _plain(merged).named_parameters() if n.endswith("proj.weight"))
    report = json.loads(paths.report.read_text())
    assert report["loss"]["tokens"] > 100
    assert 0 < report["loss"]["mean_kl"] < {"nf4": 2.0, "int8": 0.2}[form]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert not list(tmp_path.glob(".writing-*"))
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"], "who may read the folder may load the model"


@pytest.mark.parametrize("form", ["nf4", pytest.param("int8", marks=pytest.mark.slow)])
def test_the_towers_of_a_multimodal_model_stay_in_16_bit(export: Export, tmp_path: Path, form: str) -> None:
    merged = make_family(tmp_path / "merged", "gemma3")
    paths = export(merged, tmp_path / "out", form)
    assert history_of(paths).finished is not None, history_of(paths).failed
    before, after = (load_file(folder / "model.safetensors") for folder in (merged, tmp_path / "out"))
    towers = [name for name in before if "vision" in name or "projector" in name]
    assert towers
    assert all(torch.equal(before[name], after[name]) for name in towers)
    model = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    quantised = [name for name, module in model.named_modules() if "bitsandbytes" in type(module).__module__]
    assert len(quantised) == 14
    assert all(name.startswith("model.language_model.layers.") for name in quantised)
    report = json.loads(paths.report.read_text())
    assert 0 < report["loss"]["mean_kl"] < {"nf4": 2.0, "int8": 0.2}[form]
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'model = Gemma3ForConditionalGeneration.from_pretrained("out")' in card


def test_the_card_of_a_multimodal_adapter_names_the_checkpoints_class(
    recipe: Recipe, train: Train, export: Export, tmp_path: Path
) -> None:
    base = make_family(tmp_path / "base", "qwen3_vl", dtype=torch.float32)
    run = train(recipe.with_("model.base", str(base)))
    export(run.adapter, tmp_path / "tuned", "peft", str(run.root))
    code = (tmp_path / "tuned" / "README.md").read_text().split("```python")[1].split("```")[0]
    code = code.replace('"tuned"', repr(str(tmp_path / "tuned"))).replace('"BASE_MODEL"', repr(str(base)))
    made: dict[str, Any] = {}
    exec(code, made)  # noqa: S102  the lines that the card tells its reader to run
    model = made["model"].get_base_model()
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert all(bool(weight.any()) for name, weight in model.named_parameters() if "lora_B" in name)


def _plain(folder: Path) -> torch.nn.Module:
    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder)
    return model


def test_a_stopped_export_leaves_nothing(
    merged: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = quantised.keep_files

    def stopping(source: Path, scratch: Path) -> None:
        keep(source, scratch)
        request(RunPaths(tmp_path / "export-0"), "stop")

    monkeypatch.setattr(quantised, "keep_files", stopping)
    finished = history_of(export(merged, tmp_path / "out", "nf4")).finished
    assert finished is not None
    assert finished.outcome == "stopped"
    assert not list(tmp_path.glob("*out*"))


def test_a_full_disk_leaves_nothing(
    merged: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, scratch: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantised, "keep_files", full)
    failed = history_of(export(merged, tmp_path / "out", "nf4")).failed
    assert failed is not None
    assert failed.failure == "disk_full"
    assert not list(tmp_path.glob("*out*"))


def test_a_real_disk_that_fills_up_while_a_model_is_exported(
    merged: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.probe.export.check_space", lambda *called: None)  # others may fill it later
    with small_disk(tmp_path / "small", "100k") as disk:
        paths = export(merged, disk / "out", "nf4")
        failed = history_of(paths).failed
        assert failed is not None
        assert failed.failure == "disk_full", failed
        assert f"disk of {disk} is full" in failed.message
        assert list(disk.iterdir()) == []


def test_a_memory_without_room_is_seen_before_the_model_is_loaded(
    merged: Path, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(1000))
    failed = history_of(export(merged, tmp_path / "out", "nf4")).failed
    assert failed is not None
    assert "of memory" in failed.message
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_an_adapter_is_merged_before_it_is_quantised(
    recipe: Recipe, train: Train, export: Export, tiny: Path, tmp_path: Path
) -> None:
    run = train(recipe)
    paths = export(run.adapter, tmp_path / "out", "nf4", str(run.root), base=str(tiny))
    assert history_of(paths).finished is not None, history_of(paths).failed
    merge = history_of(RunPaths(paths.root / "merge")).finished
    assert merge is not None
    assert merge.result["base"] == str(tiny)
    text = (tmp_path / "out" / "README.md").read_text()
    for word in (
        "nf4 through bitsandbytes",
        "KL to that model",
        "optimizer steps: 5",
        "data: data.jsonl",
        "tokens seen",
    ):
        assert word in text
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize("page", ["| a | b |", "## What\n\nMerge onto the original.\n\n| a | b |"])
def test_a_card_quotes_the_audit_of_its_run_once(
    recipe: Recipe, train: Train, export: Export, tmp_path: Path, page: str
) -> None:
    run = train(recipe)
    advice = "Merge onto the original."
    audit = {"schema": 1, "recommendation": {"sentence": advice}, "markdown": page}
    (run.root / "audit.json").write_text(json.dumps(audit))
    export(run.adapter, tmp_path / "tuned", "peft", str(run.root))
    text = (tmp_path / "tuned" / "README.md").read_text()
    quoted = text.partition("## Audit\n\n")[2]
    assert quoted.startswith(page if advice in page else f"{advice}\n\n{page}")
    assert text.count(advice) == 1


def test_what_is_quantised_already_is_refused(merged: Path, export: Export, tmp_path: Path) -> None:
    export(merged, tmp_path / "once", "nf4")
    failed = history_of(export(tmp_path / "once", tmp_path / "twice", "int8")).failed
    assert failed is not None
    assert "quantised already" in failed.message
    assert not (tmp_path / "twice").exists()


def test_an_adapter_goes_out_with_a_card_that_works(
    recipe: Recipe, train: Train, export: Export, tiny: Path, tmp_path: Path
) -> None:
    run = train(recipe.with_("data.last_answer_only", True).with_("data.learn", ["answer", "calls"]))
    paths = export(run.adapter, tmp_path / "tuned", "peft", str(run.root))
    assert history_of(paths).finished is not None, history_of(paths).failed
    out = tmp_path / "tuned"
    assert "of answers only answer and calls, the last of each conversation learnt" in (out / "README.md").read_text()
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (run.adapter / name).read_bytes()
    text = (out / "README.md").read_text()
    losses = history_of(run).train.losses
    for word in ("Rank 4, alpha 8", "optimizer steps: 5", f"{losses[0]:.3f}", f"{losses[-1]:.3f}", "--max-lora-rank 4"):
        assert word in text
    assert "base_model:" not in text, "a folder of this computer is no model's name"
    kept = tomllib.loads(text.split("```toml")[1].split("```")[0])
    assert recipe_from_dict(kept).train == recipe.train
    assert str(tmp_path.parent) not in text.replace(str(out), "")
    assert "# LoRA adapter for tiny" in text
    code = text.split("```python")[1].split("```")[0].replace('"tuned"', repr(str(out)))
    made: dict[str, Any] = {}
    exec(code, made)  # noqa: S102  the lines that the card tells its reader to run
    assert type(made["model"]).__name__ == "PeftModelForCausalLM"
    assert made["tokenizer"].eos_token == "<|im_end|>"


def test_an_adapter_without_its_run_has_a_card_too(
    recipe: Recipe, train: Train, export: Export, tmp_path: Path
) -> None:
    export(train(recipe).adapter, tmp_path / "tuned", "peft")
    text = (tmp_path / "tuned" / "README.md").read_text()
    assert "## Use" in text
    assert "## Training" not in text
    assert "## Recipe" not in text


@pytest.mark.parametrize(
    ("said", "front", "title"),
    [
        ("/home/me/hub/models--owner--some-name/snapshots/01ab", "base_model: owner/some-name", "owner/some-name"),
        ("/home/me/models/mine", "", "mine"),
        ("a: [b]", 'base_model: "a: [b]"', "a: [b]"),
    ],
)
def test_a_base_is_named_as_others_know_it(said: str, front: str, title: str) -> None:
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["a"], "base_model_name_or_path": said}
    text = adapter_card(AdapterFound(Path("x"), config, SafetensorsHeader({}, {}, 0)), "tuned [x]", Training())
    assert (front in text) and (bool(front) or "base_model:" not in text)
    assert f"# LoRA adapter for {title}\n" in text
    assert "--lora-modules 'tuned=./tuned [x]'" in text
    assert "/home" not in text


def test_rslora_is_said_and_the_widest_rank_counts() -> None:
    config = {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"v_proj": 32}, "target_modules": ["b", "a"],
              "base_model_name_or_path": "owner/name"}  # fmt: skip
    text = adapter_card(AdapterFound(Path("x"), config, SafetensorsHeader({}, {}, 0)), "tuned", Training())
    assert "base_model: owner/name" in text
    assert "on a, b." in text
    assert "vllm serve owner/name --enable-lora --lora-modules tuned=./tuned --max-lora-rank 32" in text
    assert "sqrt(rank)" in text


def test_a_merge_that_native_code_ended_is_told_with_its_reason(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "export" / "merge")
    paths.root.mkdir(parents=True)
    history = History(started=Started(at=1.0, job="merge"))
    assert work._ended_early(paths, history).kind == "merge_crashed"
    paths.output.write_text("Fatal Python error: Segmentation fault\n")
    failure = work._ended_early(paths, history)
    assert failure.kind == "native_crash"
    assert "lora-studio runs resume RUN" in failure.advice, "the export's name is put in by its reader"
