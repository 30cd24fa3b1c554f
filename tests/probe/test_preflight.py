import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from studio.core.errors import BadInput
from studio.core.recipe import Recipe
from studio.launch.start import prepare, start
from studio.probe.cards import Card
from studio.probe.device import Sight
from studio.probe.merge import check_merge
from studio.probe.preflight import check_training
from studio.probe.space import _LONGEST_INSIDE_BYTES, check_out, check_place, check_space
from studio.runs.job import read_job
from studio.runs.layout import new_run
from studio.runs.recipe_file import load_recipe, shipped_recipes
from studio.runs.requests import MergeRequest
from tests.fakes.runs import MODULE
from tests.fakes.small_disk import small_disk


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = ({"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(20))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_shipped_demo_passes_on_this_machine() -> None:
    report = check_training(load_recipe(shipped_recipes()["demo"]))
    assert report.base.kind == "embedded"
    assert len(report.data.rows) > 500


def test_what_is_checked_is_what_is_written_with_absolute_paths(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = check_training(Recipe().with_("data.path", data.name))
    assert report.recipe.data.path == str(data)
    paths = prepare(report.recipe, tmp_path / "runs", 1e9)
    assert read_job(paths, Recipe) == report.recipe


def test_all_problems_of_the_recipe_come_at_once() -> None:
    broken = Recipe().with_("adapter.rank", 0).with_("train.micro_batch", -1)
    with pytest.raises(BadInput, match=r"(?s)adapter\.rank.*train\.micro_batch"):
        check_training(broken)


def test_too_few_rows_to_hold_some_out_are_refused(data: Path) -> None:
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(BadInput, match="too few"):
        check_training(Recipe().with_("data.path", str(data)))
    alone = Recipe().with_("data.path", str(data)).with_("eval.rows", 0).with_("eval.samples", 0)
    assert len(check_training(alone).data.rows) == 1


def test_fewer_held_out_rows_than_asked_are_a_note(data: Path) -> None:
    report = check_training(Recipe().with_("data.path", str(data)).with_("eval.rows", 100))
    assert any("100" in note for note in report.notes)


def test_the_file_of_held_out_rows_is_checked_too(data: Path) -> None:
    recipe = Recipe().with_("data.path", str(data))
    with pytest.raises(BadInput, match=r"data\.eval_path"):
        check_training(recipe.with_("data.eval_path", str(data.with_name("missing.jsonl"))))
    with pytest.raises(BadInput, match=r"data\.eval_path: all .* rows of .* are trained on"):
        check_training(recipe.with_("data.eval_path", str(data)))
    other = data.with_name("other.jsonl")
    other.write_text(json.dumps({"prompt": "never asked", "completion": "never said"}))
    report = check_training(recipe.with_("data.eval_path", str(other)))
    assert report.recipe.data.eval_path == str(other)


def test_without_a_driver_only_a_card_that_torch_finds_will_do(data: Path) -> None:
    recipe = Recipe().with_("data.path", str(data))
    two = [Card(0, "Orin", capability=(8, 7)), Card(1, "Orin", capability=(8, 7))]
    for cards, device in (([], "cuda"), ([], "cuda:0"), (two[:1], "cuda:1")):
        sight = Sight(None, ask=lambda masked: cards)  # noqa: B023  used at once
        with pytest.raises(BadInput, match=r"no NVIDIA driver answers .* and torch finds .* Set it to auto or cpu"):
            check_training(recipe.with_("device.device", device), sight=sight)
        assert check_training(recipe, sight=sight).notes == check_training(recipe.with_("device.device", "cpu")).notes
    for there in (two, None):
        sight = Sight(None, ask=lambda masked: there)  # noqa: B023
        notes = check_training(recipe.with_("device.device", "cuda:1"), sight=sight).notes
        assert any("no NVIDIA driver answers" in note for note in notes), "and it may start"


def test_a_card_that_is_not_there_is_refused(data: Path) -> None:
    recipe = Recipe().with_("data.path", str(data)).with_("device.device", "cuda:1")
    with pytest.raises(BadInput, match=r"cuda:0 \(Card\)"):
        check_training(recipe, sight=Sight([Card(0, "Card")]))
    report = check_training(recipe, sight=Sight([Card(0, "Card", "GPU-a"), Card(1, "Card", "GPU-b")]))
    assert report.place.environment["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_a_nearly_full_disk_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "not" / "there" / "yet")
    usage: Any = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**6))
    with pytest.raises(BadInput, match="1 MB are free"):
        check_space(tmp_path)


def test_as_long_a_path_as_is_taken_holds_everything_that_a_run_writes(tmp_path: Path) -> None:
    """The longest names of a checkpoint, an adapter and an export's merge, made for real."""
    room = os.pathconf("/", "PC_PATH_MAX") - 1 - _LONGEST_INSIDE_BYTES - len(os.fsencode(tmp_path))
    root = tmp_path.joinpath(*["d" * 99] * (room // 100), "d" * (room % 100 - 1))
    check_place(root)
    paths = new_run(root, "n" * 100, 0.0)
    for longest in (
        paths.root / "merge" / "checkpoints" / ".writing-step-00000120" / f"{'f' * 100}.safetensors",
        paths.root / "audit" / ".walk-of-a-variant.part" / f"{'f' * 100}.{'a' * 8}.part",
    ):
        longest.parent.mkdir(parents=True)
        longest.write_text("")
    with pytest.raises(BadInput, match="too long"):
        check_place(root / "d")


@pytest.mark.parametrize("name", [os.fsdecode(b"mod\xefl"), "m" * 250])
def test_an_output_whose_hidden_name_cannot_be_made_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"not UTF-8|too long"):
        check_out(tmp_path / name)


def test_a_read_only_disk_is_named_before_the_start(data: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1g") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(BadInput, match=r"its disk is read-only. Choose another place with --runs-dir or LORA_"):
            start(Recipe().with_("data.path", str(data)), disk / "runs", module=MODULE)
        with pytest.raises(BadInput, match=r"cannot be made.*read-only.*--out"):
            check_out(disk / "out")


def test_a_merge_needs_an_adapter_a_base_and_an_empty_place(tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    request = MergeRequest(adapter=str(adapter), base="embedded", out=str(out))
    with pytest.raises(BadInput, match="no adapter folder"):
        check_merge(request)
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({"base_model.model.x.lora_A.weight": np.ones((1, 1), np.float32)}, adapter / "adapter_model.safetensors")
    check_merge(request)
    out.mkdir()
    check_merge(request)
    (out / "something").write_text("")
    with pytest.raises(BadInput, match="not empty"):
        check_merge(request)
    with pytest.raises(BadInput, match="nowhere"):
        check_merge(MergeRequest(adapter=str(adapter), base="./nowhere", out=str(tmp_path / "new")))
