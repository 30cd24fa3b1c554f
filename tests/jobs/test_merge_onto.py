"""Which base a QLoRA adapter is merged into: the original one, what it was trained against, never another one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.recipe import Recipe
from studio.jobs.base import progress
from studio.jobs.base.load import FourBit, load_base
from studio.jobs.base.weights.dequantized import quantised_parameters, through_four_bits
from studio.probe.models import find_base
from studio.runs.control import request
from studio.runs.layout import RunPaths
from studio.runs.requests import Weighted
from studio.runs.status import Status, run_status
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import Merge, Train, history_of
from tests.jobs.merge_cases import ATTENTION, IDS, make_adapter, make_base, our_merge, our_steps, tensors_of


@torch.no_grad()
def _logits(base: Path, adapter: Path | None, method: str) -> Tensor:
    model = load_base(
        find_base(str(base)),
        method=method,  # type: ignore[arg-type]
        dtype=torch.bfloat16,
        quant=FourBit(),
        attention="sdpa",
        device=torch.device("cpu"),
    )
    wrapped = PeftModel.from_pretrained(model, str(adapter)) if adapter else model
    logits: Tensor = wrapped.eval()(input_ids=IDS).logits[0].float()
    return logits


def _apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


def test_dequantized_is_closest_to_the_run_and_original_is_not(tmp_path: Path, merge: Merge) -> None:
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules="all-linear")
    trained = _logits(base, adapter, "qlora")
    reports = {}
    for onto in ("original", "dequantized"):
        paths = merge(adapter, base, tmp_path / onto, onto=onto)
        assert history_of(paths).finished is not None, history_of(paths).failed
        reports[onto] = json.loads(paths.report.read_text())
        assert reports[onto]["closeness"]["mean_kl"] < 1e-3
    near, far = (_logits(tmp_path / onto, None, "lora") for onto in ("dequantized", "original"))
    assert _apart(near, trained) < _apart(far, trained) / 4
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "dequantized").values()} == {torch.bfloat16}


def test_layers_without_an_adapter_go_through_four_bits_too(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    plain = our_steps(base, adapter)
    changed = quantised_parameters(plain.skeleton.clean)
    assert "lm_head.weight" not in changed
    assert len(changed) == 14
    steps = our_steps(base, adapter, change=through_four_bits(FourBit(), torch.bfloat16), changed=changed)
    before, after = our_merge(plain), our_merge(steps)
    assert {key for key in before if not torch.equal(before[key], after[key])} == changed


def test_an_evaluation_before_the_merge_changes_nothing(tmp_path: Path) -> None:
    # On a CPU bitsandbytes repacks 4-bit weights at the first forward in evaluation mode; peft's merge into them is
    # then garbage. Ours reads the base from its files.
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)
    changed = quantised_parameters(our_steps(base, adapter).skeleton.clean)
    more = {"change": through_four_bits(FourBit(), torch.bfloat16), "changed": changed}
    before = our_merge(our_steps(base, adapter, **more))
    _logits(base, adapter, "qlora")
    after = our_merge(our_steps(base, adapter, **more))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_another_base_of_equal_shape_is_refused(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    run = train(recipe)
    other = make_tiny_model(tmp_path / "other", seed=7)
    paths = merge(run.adapter, other, tmp_path / "out", run=str(run.root))
    failed = history_of(paths).failed
    assert failed is not None
    assert "is not the base that this adapter was trained on" in failed.message
    assert not (tmp_path / "out").exists()
    paths = merge(run.adapter, tiny, tmp_path / "out", run=str(run.root))
    assert history_of(paths).finished is not None
    assert history_of(paths).warnings == []


@pytest.mark.parametrize("weighted", [False, True])
def test_one_other_tensor_is_enough_also_for_the_base_of_a_second_adapter(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path, weighted: bool
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny, base)
    run = train(recipe.with_("model.base", str(base)))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    first = make_adapter(tmp_path / "first", base, target_modules=ATTENTION) if weighted else run.adapter
    more = {"more": (Weighted(str(run.adapter)),)} if weighted else {"run": str(run.root)}
    failed = history_of(merge(first, base, tmp_path / "out", **more)).failed
    assert failed is not None
    assert failed.failure == "bad_input"
    assert f"1 of its {len(tensors)} tensors hold other numbers (model.norm.weight)" in failed.message
    assert not (tmp_path / "out").exists()


def test_a_run_that_does_not_say_what_it_was_trained_on_is_merged_with_a_word(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path
) -> None:
    run = train(recipe)
    lines = [line for line in run.events.read_text().splitlines() if '"Identified"' not in line]
    run.events.write_text("\n".join(lines) + "\n")
    history = history_of(merge(run.adapter, tiny, tmp_path / "out", run=str(run.root)))
    assert history.finished is not None
    assert ["the base could not be compared" in event.message for event in history.warnings] == [True]


def test_a_stop_ends_the_reading_of_the_base(
    recipe: Recipe, train: Train, merge: Merge, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = train(recipe)
    real = progress.fingerprint

    def asking(folder: Path, tell: Any) -> Any:
        request(RunPaths(tmp_path / "merge-0"), "stop")
        tell(0.5)
        return real(folder, tell)

    monkeypatch.setattr(progress, "fingerprint", asking)
    paths = merge(run.adapter, tiny, tmp_path / "out", run=str(run.root))
    assert run_status(paths) is Status.stopped
    assert not (tmp_path / "out").exists()


def test_a_changed_config_of_the_right_base_is_said(recipe: Recipe, train: Train, merge: Merge, tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base")
    run = train(recipe.with_("model.base", str(base)))
    table = json.loads((base / "config.json").read_text()) | {"rms_norm_eps": 1e-3}
    (base / "config.json").write_text(json.dumps(table))
    history = history_of(merge(run.adapter, base, tmp_path / "out", run=str(run.root)))
    assert history.finished is not None
    assert ["config.json" in event.message for event in history.warnings] == [True]


def test_layers_that_lie_the_other_way_round_are_rounded_as_4_bits_round_them(tmp_path: Path, merge: Merge) -> None:
    base = make_base(tmp_path / "base", "gpt2", torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, target_modules=["c_attn"], fan_in_fan_out=True)
    paths = merge(adapter, base, tmp_path / "out", onto="dequantized")
    assert history_of(paths).finished is not None, history_of(paths).failed
    key = "transformer.h.0.mlp.c_fc.weight"  # not adapted: what is left of it is what 4 bits keep
    before, after = tensors_of(base)[key], tensors_of(tmp_path / "out")[key]
    assert before.shape[0] != before.shape[1]
    kept = through_four_bits(FourBit(), torch.bfloat16)("", before.t()).t().float()
    assert not torch.equal(after, before)
    assert torch.equal(after, kept)
