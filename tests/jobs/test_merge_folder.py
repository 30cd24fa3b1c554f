"""The merged folder as its users load it: tied heads, added tokens, shards, killed and stopped merges, full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from studio.jobs.merge import job, shards, write_steps
from studio.jobs.merge.__main__ import _body
from studio.runs.control import request
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import MergeRequest
from tests.fakes.runs import CHECKOUT
from tests.fakes.small_disk import small_disk
from tests.jobs.conftest import Merge, history_of
from tests.jobs.merge_cases import ATTENTION, IDS, adapted, make_adapter, make_base, tensors_of

TIED: dict[str, tuple[dict[str, Any], bool]] = {
    "neither": ({"target_modules": ATTENTION}, True),
    "head adapted": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "embedding adapted": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "both adapted": ({"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, False),
    "head saved": ({"target_modules": ATTENTION, "modules_to_save": ["lm_head"]}, False),
    "embedding saved": ({"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]}, False),
    "saved and tied": (
        {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        True,
    ),
    "tokens": ({"target_modules": ATTENTION, "trainable_token_indices": {"embed_tokens": [3, 256]}}, True),
}


@torch.no_grad()
def _merged_logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits: Tensor = model.eval()(input_ids=IDS).logits
    return logits


@torch.no_grad()
def _meant_logits(base: Path, adapter: Path, vocabulary: int | None = None) -> Tensor:
    logits: Tensor = adapted(base, adapter, vocabulary)(input_ids=IDS).logits
    return logits


def _failure(paths: RunPaths) -> str:
    failed = history_of(paths).failed
    assert failed is not None
    return failed.message


@pytest.mark.slow
@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_answers_as_trained(tmp_path: Path, merge: Merge, kind: str) -> None:
    config, stays_tied = TIED[kind]
    base = make_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=True)
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    paths = merge(adapter, base, tmp_path / "out")
    assert history_of(paths).finished is not None, history_of(paths).failed
    assert (_merged_logits(tmp_path / "out") - _meant_logits(base, adapter)).abs().max() < 2e-4
    assert AutoConfig.from_pretrained(tmp_path / "out").tie_word_embeddings is stays_tied
    report = json.loads(paths.report.read_text())
    assert report["untied"] is not stays_tied
    assert report["closeness"]["largest_logit_difference"] < 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}])
def test_added_tokens_come_with_the_adapter(tmp_path: Path, merge: Merge, more: dict[str, Any]) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=False)
    adapter = make_adapter(tmp_path / "adapter", base, vocabulary=264, target_modules=ATTENTION, **more)
    paths = merge(adapter, base, tmp_path / "out")
    assert history_of(paths).finished is not None, history_of(paths).failed
    assert AutoConfig.from_pretrained(tmp_path / "out").vocab_size == 264
    assert _merged_logits(tmp_path / "out").shape[-1] == 264
    assert (_merged_logits(tmp_path / "out") - _meant_logits(base, adapter, 264)).abs().max() < 2e-4


def test_a_head_that_stayed_short_is_refused(tmp_path: Path, merge: Merge) -> None:
    base = make_base(tmp_path / "base", "llama", torch.float32, tie_word_embeddings=False)
    adapter = make_adapter(
        tmp_path / "adapter",
        base,
        vocabulary=264,
        target_modules=ATTENTION,
        modules_to_save=["embed_tokens", "lm_head"],
    )
    table = json.loads((adapter / "adapter_config.json").read_text()) | {"modules_to_save": ["embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps(table))
    _weights(adapter, lambda weights: [weights.pop(key) for key in list(weights) if "lm_head" in key])
    assert "lm_head.weight has the shape [259, 64]" in _failure(merge(adapter, base, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "llama", tie_word_embeddings=False)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, target_modules="all-linear")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "SHARD_BYTES", 50_000)


def test_many_shards_are_the_same_model(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(adapter, base, tmp_path / "one")
    monkeypatch.setattr(job, "SHARD_BYTES", 50_000)
    merge(adapter, base, tmp_path / "many")
    one, many = tensors_of(tmp_path / "one"), tensors_of(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[key], many[key]) for key in one)
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert torch.equal(_merged_logits(tmp_path / "one"), _merged_logits(tmp_path / "many"))
    assert {path.name for path in (tmp_path / "many").iterdir()} - set(files) == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors.index.json",
    }  # fmt: skip


@pytest.mark.slow
def test_another_format_is_written_into_the_config(base: Path, adapter: Path, merge: Merge, tmp_path: Path) -> None:
    merge(adapter, base, tmp_path / "out", dtype="fp32")
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float32}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.float32
    assert (_merged_logits(tmp_path / "out") - _meant_logits(base, adapter)).abs().max() < 2e-4


KILLED = """
import os, signal, sys, time
from pathlib import Path
from studio.jobs.merge import job, write_steps
from studio.jobs.merge.__main__ import _body
from studio.runs.job_process import run_job
job.SHARD_BYTES = 50_000
write = write_steps._write
def dying(file, output, *more):
    last = file._final
    if last.name.split("-")[1] == last.name.split("-")[3][:5]:
        while not list(last.parent.glob("model-*.safetensors")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    write(file, output, *more)
write_steps._write = dying
run_job(Path(sys.argv[1]), _body)
"""


@pytest.mark.slow
def test_a_merge_that_was_killed_goes_on_with_its_whole_shards(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, small_shards: None
) -> None:
    out, killed = tmp_path / "out", RunPaths(tmp_path / "killed")
    killed.root.mkdir()
    write_job(killed, MergeRequest(str(adapter), str(base), str(out)))
    ended = subprocess.run(
        [sys.executable, "-c", KILLED, str(killed.root)], cwd=CHECKOUT, capture_output=True, check=False
    )
    assert ended.returncode == -9
    assert not out.exists()
    left = sorted(path.name for path in (tmp_path / ".merging-out").glob("model-*.safetensors"))
    assert left
    paths = merge(adapter, base, out)
    report = json.loads(paths.report.read_text())
    assert report["kept_shards"] == left
    merge(adapter, base, tmp_path / "fresh")
    kept, fresh = tensors_of(out), tensors_of(tmp_path / "fresh")
    assert kept.keys() == fresh.keys()
    assert all(torch.equal(kept[key], fresh[key]) for key in fresh)
    assert not list(tmp_path.glob(".merging-*"))


@pytest.mark.slow
def test_a_damaged_shard_of_a_killed_merge_is_made_anew(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, small_shards: None
) -> None:
    out, killed = tmp_path / "out", RunPaths(tmp_path / "killed")
    killed.root.mkdir()
    write_job(killed, MergeRequest(str(adapter), str(base), str(out)))
    subprocess.run([sys.executable, "-c", KILLED, str(killed.root)], cwd=CHECKOUT, capture_output=True, check=False)
    left = sorted((tmp_path / ".merging-out").glob("model-*.safetensors"))
    data = bytearray(left[0].read_bytes())
    data[-10_000] ^= 1  # header and length are as they should be
    left[0].write_bytes(data)
    report = json.loads(merge(adapter, base, out).report.read_text())
    assert report["kept_shards"] == [path.name for path in left[1:]]
    merge(adapter, base, tmp_path / "fresh")
    anew, fresh = tensors_of(out), tensors_of(tmp_path / "fresh")
    assert all(torch.equal(anew[key], fresh[key]) for key in fresh)


@pytest.mark.slow
def test_shards_of_another_adapter_are_not_taken_up(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, small_shards: None
) -> None:
    aside = tmp_path / ".merging-out"
    merge(adapter, base, tmp_path / "first")
    shutil.copytree(tmp_path / "first", aside)
    (aside / ".merge-plan").write_text("of something else")
    paths = merge(adapter, base, tmp_path / "out")
    assert json.loads(paths.report.read_text())["kept_shards"] == []


def test_a_stopped_merge_leaves_nothing(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = write_steps._write

    def stopping(*called: Any) -> None:
        request(RunPaths(tmp_path / "merge-0"), "stop")
        write(*called)

    monkeypatch.setattr(write_steps, "_write", stopping)
    finished = history_of(merge(adapter, base, tmp_path / "out")).finished
    assert finished is not None
    assert finished.outcome == "stopped"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".merging-*"))


def test_a_merge_that_is_stopped_while_it_is_checked_leaves_nothing(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_back = job.read_back

    def stopping(*called: Any) -> int:
        request(RunPaths(tmp_path / "merge-0"), "stop")
        return read_back(*called)

    monkeypatch.setattr(job, "read_back", stopping)
    monkeypatch.setattr(job, "compare_logits", lambda *called: pytest.fail("the stop was not heeded"))
    finished = history_of(merge(adapter, base, tmp_path / "out")).finished
    assert finished is not None
    assert finished.outcome == "stopped"
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_without_room_is_seen_before_anything_is_written(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shards.shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 1000))
    assert "are free" in _failure(merge(adapter, base, tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_a_disk_that_fills_up_leaves_nothing(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Any, *called: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(write_steps, "_write", full)
    failed = history_of(merge(adapter, base, tmp_path / "out")).failed
    assert failed is not None
    assert failed.failure == "disk_full"
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
def test_a_real_disk_that_fills_up_while_it_is_written(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_shards: None
) -> None:
    monkeypatch.setattr(shards, "_SPARE_BYTES", -(10**9))  # others may fill a disk after it was looked at
    with small_disk(tmp_path / "small", "160k") as disk:
        paths = merge(adapter, base, disk / "out")
        failed = history_of(paths).failed
        assert failed is not None
        assert failed.failure == "disk_full"
        assert "free some space" in failed.advice
        assert "runs resume RUN" in failed.advice
        assert list(disk.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        run_job(paths.root, _body)  # as a resume does
        assert history_of(paths).finished is not None
        assert tensors_of(disk / "out")


@pytest.mark.slow
def test_what_appears_at_the_output_meanwhile_is_kept_and_so_is_the_model(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = job.write_folder_files

    def meanwhile(*called: Any, **more: Any) -> None:
        written(*called, **more)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.txt").write_text("the user's")

    monkeypatch.setattr(job, "write_folder_files", meanwhile)
    failed = history_of(merge(adapter, base, tmp_path / "out")).failed
    assert failed is not None
    assert failed.failure == "output_taken"
    assert str(tmp_path / "out-2") in failed.message
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert (_merged_logits(tmp_path / "out-2") - _meant_logits(base, adapter)).abs().max() < 2e-2


def _weights(adapter: Path, change: Any) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change(weights)
    save_file(weights, adapter / "adapter_model.safetensors")


def _config(adapter: Path, **changes: Any) -> None:
    table = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(table | changes))


_Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda a: _weights(a, lambda w: w.update({f"{_Q}.lora_C.weight": torch.zeros(2)})), "belong to no layer"),
        (lambda a: _weights(a, lambda w: w.pop(f"{_Q}.lora_A.weight")), "not there"),
        (lambda a: _weights(a, lambda w: w[f"{_Q}.lora_B.weight"].fill_(float("nan"))), "NaN or infinity"),
        (lambda a: _weights(a, lambda w: w.update({f"{_Q}.lora_A.weight": torch.zeros(4, 32)})), "does not fit"),
        (lambda a: _config(a, target_modules=["c_attn"]), "does not fit"),
        (lambda a: _config(a, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
        (lambda a: _config(a, alora_invocation_tokens=[1, 2]), "alora_invocation_tokens"),
        (lambda a: _config(a, something_new=True), "something_new"),
        (lambda a: _config(a, init_lora_weights="pissa_niter_4"), "path_initial_model_for_weight_conversion"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, damage: Any, said: str
) -> None:
    damage(adapter)
    assert said in _failure(merge(adapter, base, tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_an_adapter_of_another_architecture_is_refused(tmp_path: Path, base: Path, merge: Merge) -> None:
    other = make_base(tmp_path / "other", "gpt2")
    adapter = make_adapter(tmp_path / "adapter", other, target_modules=["c_attn"], fan_in_fan_out=True)
    assert "does not fit" in _failure(merge(adapter, base, tmp_path / "out"))


@pytest.mark.parametrize(
    "damage",
    [lambda path: path.unlink(), lambda path: path.write_bytes(b"\xff" * 64), lambda path: path.write_bytes(b"")],
)
def test_a_broken_shard_of_the_base_is_named(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, damage: Any
) -> None:
    shard = sorted(base.glob("model-*.safetensors"))[1]
    damage(shard)
    assert shard.name in _failure(merge(adapter, base, tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


def test_a_merge_that_another_one_writes_is_refused(base: Path, adapter: Path, merge: Merge, tmp_path: Path) -> None:
    from filelock import FileLock

    with FileLock(tmp_path / ".merging-out.lock"):
        assert "another job" in _failure(merge(adapter, base, tmp_path / "out"))


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="there is no folder here that even root cannot write in")
def test_a_folder_that_cannot_be_written_is_named(base: Path, adapter: Path, merge: Merge) -> None:
    assert "nothing can be written in /proc" in _failure(merge(adapter, base, Path("/proc/out")))


def test_the_tokenizer_of_the_base_serves_where_the_adapter_has_none(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path
) -> None:
    assert not (adapter / "tokenizer.json").exists()
    merge(adapter, base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"


@pytest.mark.parametrize("adds", [False, True])
def test_the_bases_sentencepiece_file_stays_where_no_token_was_added(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, adds: bool
) -> None:
    (base / "tokenizer.model").write_bytes(b"pieces")
    tokenizer = AutoTokenizer.from_pretrained(base)
    if adds:
        tokenizer.add_tokens(["<new>"], special_tokens=True)
    tokenizer.save_pretrained(adapter)
    (adapter / "tokenizer.model").unlink(missing_ok=True)
    merge(adapter, base, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.model").is_file() is not adds


def test_a_memory_without_room_is_seen_before_anything_is_written(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory_type = namedtuple("memory_type", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory_type(1000))
    assert "of memory" in _failure(merge(adapter, base, tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("qwen2", {"target_modules": "all-linear", "use_dora": True}),
        ("gemma2", {"target_modules": "all-linear"}),
        ("mixtral", {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}),
        ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": ["experts.gate_up_proj"]}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
)
def test_the_whole_job_on_every_family(
    tmp_path: Path, merge: Merge, family: str, config: dict[str, Any], small_shards: None
) -> None:
    base = make_base(tmp_path / "base", family, torch.float32)
    adapter = make_adapter(tmp_path / "adapter", base, **config)
    paths = merge(adapter, base, tmp_path / "out")
    assert history_of(paths).finished is not None, history_of(paths).failed
    assert (_merged_logits(tmp_path / "out") - _meant_logits(base, adapter)).abs().max() < 2e-4
    closeness = json.loads(paths.report.read_text())["closeness"]
    assert closeness["same_top_token"] == 1.0
    assert closeness["largest_logit_difference"] < 2e-4


def test_a_model_that_cannot_be_run_in_pieces_is_merged_and_said(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*called: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(job, "compare_logits", broken)
    paths = merge(adapter, base, tmp_path / "out")
    assert json.loads(paths.report.read_text())["closeness"] is None
    assert ["no such luck" in event.message for event in history_of(paths).warnings] == [True]
    assert _merged_logits(tmp_path / "out").isfinite().all()


def test_a_file_that_is_not_what_was_made_is_not_published(
    base: Path, adapter: Path, merge: Merge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = job.write_folder_files

    def flipping(out: Path, *called: Any, **more: Any) -> None:
        write(out, *called, **more)
        data = bytearray((out / "model.safetensors").read_bytes())
        data[-20_000] ^= 1
        (out / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(job, "write_folder_files", flipping)
    assert "is not what was made" in _failure(merge(adapter, base, tmp_path / "out"))
    assert not list(tmp_path.glob("*out*"))
