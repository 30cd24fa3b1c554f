"""Several adapters, each with a weight, into one base; a checkpoint in place of a run's last adapter."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from studio.core.events import Phase
from studio.core.recipe import Recipe
from studio.jobs.base.weights import tensor_files
from studio.jobs.base.weights.skeleton import build_skeleton
from studio.jobs.base.weights.tensor_files import TensorFiles
from studio.jobs.merge import steps
from studio.jobs.merge.steps import MergeSteps
from studio.probe.adapter_folder import best_of, find_adapter, list_checkpoints
from studio.runs.job import read_job, write_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import MergeRequest, Weighted
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base, our_merge, tensors_of

WEIGHTS = (0.7, -0.25, 1.0)
KINDS: tuple[dict[str, Any], ...] = (
    {"target_modules": "all-linear"},
    {"target_modules": ATTENTION, "r": 2, "use_rslora": True},
    {"target_modules": ["q_proj", "embed_tokens"]},
)


def _loaded(base: Path, adapters: list[Path]) -> PeftModel:
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(adapters[0]), adapter_name="0"
    )
    for place, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(str(adapter), str(place))
    return model.eval()


def _pefts(base: Path, adapters: list[Path], folder: Path) -> dict[str, Tensor]:
    """The tensors after `set_scale` on each and peft's fp32 merge of all, cast once."""
    model = _loaded(base, adapters)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for place, weight in enumerate(WEIGHTS[: len(adapters)]):
                module.set_scale(str(place), weight)
    names = [str(place) for place in range(len(adapters))]
    model.merge_and_unload(adapter_names=names).to(torch.bfloat16).save_pretrained(folder)
    return tensors_of(folder)


def _ours(base: Path, adapters: list[Path]) -> MergeSteps:
    (first, weight), *more = [
        (find_adapter(path), by) for path, by in zip(adapters, WEIGHTS[: len(adapters)], strict=True)
    ]
    return MergeSteps(build_skeleton(base, first, weight, *more), TensorFiles(base))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "llama", tie_word_embeddings=False, hidden_size=256, intermediate_size=512)


@pytest.fixture
def adapters(tmp_path: Path, base: Path) -> list[Path]:
    return [make_adapter(tmp_path / f"adapter-{place}", base, **kind) for place, kind in enumerate(KINDS)]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("smallest", [0, 2**30])
def test_every_bit_is_that_of_pefts_weighted_merge(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, smallest: int
) -> None:
    monkeypatch.setattr(steps, "SMALLEST_ROW_SUM_BYTES", smallest)
    monkeypatch.setattr(tensor_files, "BLOCK_ELEMENTS", 4096)
    made = _ours(base, adapters[:count])
    assert bool([step for step in made.steps if step.row_sum]) is (smallest == 0)
    ours, theirs = our_merge(made), _pefts(base, adapters[:count], tmp_path / "peft")
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if not torch.equal(ours[key], theirs[key])] == []


def test_it_is_the_sum_that_add_weighted_adapter_makes(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    linear = adapters[:2]
    model = _loaded(base, linear)
    model.add_weighted_adapter(["0", "1"], list(WEIGHTS[:2]), "both", combination_type="cat")
    model.set_adapter("both")
    model.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "cat")
    theirs, ours = tensors_of(tmp_path / "cat"), our_merge(_ours(base, linear))
    assert max(float((theirs[key] - ours[key].float()).abs().max()) for key in theirs) < 0.02  # bf16 of numbers below 4


def test_the_whole_job(base: Path, adapters: list[Path], merge: Merge, tmp_path: Path) -> None:
    more = (Weighted(str(adapters[1]), -0.25), Weighted(str(adapters[2])))
    paths = merge(adapters[0], base, tmp_path / "out", weight=0.7, more=more)
    assert history_of(paths).finished is not None, history_of(paths).failed
    ours, theirs = tensors_of(tmp_path / "out"), _pefts(base, adapters, tmp_path / "peft")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    report = json.loads(paths.report.read_text())
    assert [one["weight"] for one in report["adapters"]] == [0.7, -0.25, 1.0]
    assert report["closeness"]["mean_kl"] < 1e-3
    assert len(report["side_by_side"]) == 2
    assert report["side_by_side"][0].keys() == {"prompt", "separate", "merged"}
    told = [
        event for event in read_events(paths.events) if isinstance(event, Phase) and event.detail.startswith("text")
    ]
    assert {event.detail for event in told} == {"text of base + adapter", "text of the merged model"}
    shares = [event.fraction or 0.0 for event in told]
    assert shares == sorted(shares)
    assert len(shares) > 8, "a token at a time"
    assert 0.5 < shares[-1] <= 1.0


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"target_modules": ATTENTION, "use_dora": True}, "use_dora"),
        ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3]}}, "trainable_token_indices"),
    ],
)
def test_what_has_no_half_is_refused_by_name(
    base: Path, merge: Merge, tmp_path: Path, kind: dict[str, Any], said: str
) -> None:
    adapter = make_adapter(tmp_path / "whole", base, **kind)
    failed = history_of(merge(adapter, base, tmp_path / "out", weight=0.5)).failed
    assert failed is not None
    assert said in failed.message
    assert not list(tmp_path.glob("*out*"))


def test_a_request_with_several_adapters_is_read_as_it_was_written(tmp_path: Path) -> None:
    request = MergeRequest("/a", "base", "/out", weight=0.5, more=(Weighted("/b=c", 2.0), Weighted("/d", -1.0)))
    paths = RunPaths(tmp_path)
    write_job(paths, request)
    assert read_job(paths, MergeRequest) == request
    assert request.weighted == (("/a", 0.5), ("/b=c", 2.0), ("/d", -1.0))


def test_a_checkpoint_is_merged_in_place_of_the_adapter(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    run = train(
        recipe.with_("train.checkpoint_every", 2)
        .with_("train.keep_checkpoints", 5)
        .with_("eval.rows", 2)
        .with_("eval.every", 2)
    )
    found = list_checkpoints(run)
    assert [one.step for one in found] == [2, 4, 5]
    assert [one.folder is None for one in found] == [False, False, True]
    best = best_of(found)
    assert best is not None
    assert best.loss == min(one.loss for one in found if one.loss is not None)
    chosen = found[0].folder
    assert chosen is not None
    paths = merge(run.adapter, tiny, tmp_path / "out", run=str(run.root), checkpoint=str(chosen))
    assert history_of(paths).finished is not None, history_of(paths).failed
    weights = load_file(chosen / "adapter.safetensors")
    a, b = (weights[f"base_model.model.model.layers.0.self_attn.q_proj.lora_{part}.weight"] for part in "AB")
    key = "model.layers.0.self_attn.q_proj.weight"
    before, after = tensors_of(tiny)[key], tensors_of(tmp_path / "out")[key]
    assert torch.equal(after, before + (b @ a) * 2.0)
    merge(run.adapter, tiny, tmp_path / "last")
    assert not torch.equal(after, tensors_of(tmp_path / "last")[key])


def test_a_checkpoint_of_a_run_that_changed_its_base_fits_the_ordinary_one(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    run = train(recipe.with_("adapter.init", "pissa").with_("train.checkpoint_every", 2))
    found = list_checkpoints(run)
    chosen = found[0].folder
    assert chosen is not None
    paths = merge(run.adapter, tiny, tmp_path / "out", run=str(run.root), checkpoint=str(chosen))
    assert history_of(paths).finished is not None, history_of(paths).failed
    now, start = load_file(chosen / "adapter.safetensors"), load_file(chosen / "initial.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    moved = now[name.format("B")] @ now[name.format("A")] - start[name.format("B")] @ start[name.format("A")]
    key = "model.layers.0.self_attn.q_proj.weight"
    before, after = tensors_of(tiny)[key], tensors_of(tmp_path / "out")[key]
    assert (after - before - moved * 2.0).abs().max() < 1e-5
    assert (after - before).abs().max() > 1e-3


def test_a_broken_checkpoint_is_refused(recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path) -> None:
    run = train(recipe.with_("train.checkpoint_every", 2))
    chosen = sorted(run.checkpoints.glob("step-*"))[0]
    (chosen / "complete.json").unlink()
    failed = history_of(merge(run.adapter, tiny, tmp_path / "out", checkpoint=str(chosen))).failed
    assert failed is not None
    assert "is damaged: it has no complete.json" in failed.message
    assert not list(tmp_path.glob("*out*"))


def test_a_checkpoint_whose_weights_were_damaged_is_refused_and_is_not_the_best(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    run = train(
        recipe.with_("train.checkpoint_every", 2)
        .with_("train.keep_checkpoints", 5)
        .with_("eval.rows", 2)
        .with_("eval.every", 2)
    )
    folders = sorted(run.checkpoints.glob("step-*"))
    for folder in folders:
        with (folder / "adapter.safetensors").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
    found = list_checkpoints(run)
    assert [(one.step, one.damage) for one in found] == [
        (2, "adapter.safetensors is not what was saved"),
        (4, "adapter.safetensors is not what was saved"),
        (5, ""),
    ]
    assert best_of(found) == found[-1]
    failed = history_of(merge(run.adapter, tiny, tmp_path / "out", checkpoint=str(folders[0]))).failed
    assert failed is not None
    assert "is damaged: adapter.safetensors is not what was saved" in failed.message
