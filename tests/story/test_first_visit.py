"""The first visit, of the program as others install it: its demo, then a file of 60 rows of one's own.

Without a terminal, by verbs; `tests.story.test_first_keys` has the same by keys.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from studio.core.recipe import Recipe
from studio.jobs.base.data.encode import encode_rows
from studio.probe.data import read_data, split
from studio.probe.llama_tools import TOOLS_VARIABLE, is_whole, tools_folder
from studio.runs.history import History
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.story.conftest import OWN_ROWS, Installed

pytestmark = pytest.mark.slow

LONG_SECONDS = 3600.0


@dataclass(frozen=True)
class Demo:
    """What one demo left and said."""

    home: Path
    paths: RunPaths
    history: History
    output: str


@pytest.fixture(scope="module")
def demo(visited: Installed) -> Demo:
    """One demo; the embedded model is converted, too."""
    done = visited.run("demo", "--yes", timeout=LONG_SECONDS, TERM="dumb")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (visited.home / "runs").glob("demo-*")
    return Demo(visited.home, RunPaths(folder), history_of(RunPaths(folder)), done.stdout)


def history_of(paths: RunPaths) -> History:
    history = History()
    history.fold(read_events(paths.events))
    return history


def test_it_learns(demo: Demo) -> None:
    losses = demo.history.train.losses
    first, last = losses[0], sum(losses[-5:]) / 5
    assert last <= 0.75 * first
    assert demo.history.evals[-1].loss <= 0.8 * demo.history.evals[0].loss
    assert demo.history.evals[0].loss_tokens > 300


def test_the_answers_take_the_trained_form(demo: Demo) -> None:
    """One short sentence, as the documentation has it, where the base model rambled until it was cut off."""
    before = [sample.answer for sample in demo.history.samples if sample.step == 0]
    after = [sample.answer for sample in demo.history.samples if sample.step > 0]
    assert len(before) == len(after) == 3
    assert all(re.fullmatch(r"[A-Z`'\"*_][^\n]{5,150}\.", answer) for answer in after), after
    assert sum(map(len, after)) < sum(map(len, before))
    for text in (*before, *after):
        assert " ".join(text.split())[:12] in " ".join(demo.output.split())


def test_it_says_where_everything_lies(demo: Demo) -> None:
    for place in (demo.paths.root, demo.paths.adapter):
        assert str(place) in demo.output
    named = [Path(word) for word in demo.output.split() if word.startswith(str(demo.home))]
    assert any((path / "config.json").is_file() for path in named), "no merged model is named"
    assert "\x1b" not in demo.output


def held_out_loss(model: torch.nn.Module, tokenizer: object, demo: Demo) -> float:
    """The loss of the run's held-out rows one by one, through whole logits in fp32: no code of the training loop."""
    recipe = read_job(demo.paths, Recipe)
    data = read_data(Path(recipe.data.path))
    held = split(data.rows, recipe.eval.rows, recipe.train.seed).held_out
    examples, _ = encode_rows(held, tokenizer, seq_len=recipe.train.seq_len, warn=print)
    total, tokens = 0.0, 0
    with torch.no_grad():
        for example in examples:
            ids, labels = (torch.tensor(part, dtype=torch.long) for part in (example.input_ids, example.labels))
            logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1].float()
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum")
            total, tokens = total + float(loss), tokens + int((labels[1:] != -100).sum())
    return total / tokens


def test_the_adapter_loads_with_plain_peft_and_has_the_reported_loss(demo: Demo) -> None:
    torch.set_num_threads(2)
    config = json.loads((demo.paths.adapter / "adapter_config.json").read_text())
    four_bit = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    base = AutoModelForCausalLM.from_pretrained(
        config["base_model_name_or_path"], dtype=torch.bfloat16, quantization_config=four_bit
    )
    assert any(isinstance(parameter, bnb.nn.Params4bit) for parameter in base.parameters())
    model = PeftModel.from_pretrained(base, str(demo.paths.adapter)).eval()
    loss = held_out_loss(model, AutoTokenizer.from_pretrained(demo.paths.adapter), demo)
    assert loss == pytest.approx(demo.history.evals[-1].loss, rel=0.02)


def test_the_merged_model_keeps_what_was_learnt(demo: Demo) -> None:
    torch.set_num_threads(2)
    named = [Path(word) for word in demo.output.split() if word.startswith(str(demo.home))]
    folder = next(path for path in named if (path / "config.json").is_file())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    loss = held_out_loss(model, AutoTokenizer.from_pretrained(folder), demo)
    assert math.isfinite(loss)
    assert loss <= 0.8 * demo.history.evals[0].loss


def test_an_own_file_beats_its_base_and_becomes_a_gguf_file(
    demo: Demo, visited: Installed, recommended: Path, tmp_path: Path
) -> None:
    trained = visited.run("train", str(recommended), "--json", timeout=LONG_SECONDS)
    assert trained.returncode == 0, trained.stderr
    summary = json.loads(trained.stdout)
    history = history_of(RunPaths(Path(summary["path"])))
    assert history.evals[-1].rows == OWN_ROWS // 4
    gain = summary["gain"]
    assert gain["improved"] is True, gain
    assert gain["low"] < gain["value"] < gain["high"] < 0
    tools = {TOOLS_VARIABLE: str(tools_folder())} if is_whole(tools_folder()) else {}
    words = ("export", summary["run"], "--format", "q8_0", "--out", str(tmp_path / "out"), "--json")
    exported = visited.run(*words, timeout=LONG_SECONDS, PIP_NO_INDEX="", **tools)
    assert exported.returncode == 0, exported.stderr
    (gguf,) = (tmp_path / "out").glob("*.gguf")
    assert "Q8_0" in gguf.name
    assert gguf.stat().st_size > 100 * 10**6
    modelfile = (tmp_path / "out" / "Modelfile").read_text("utf-8")
    assert f"FROM ./{gguf.name}" in modelfile
    assert "TEMPLATE" in modelfile and "<|im_end|>" in modelfile
