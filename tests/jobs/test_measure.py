"""The trace against real steps: every stage and every component, to the byte."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import AutoConfig

from studio.core.errors import BadInput
from studio.core.events import Failed, Finished, StepDone
from studio.core.measured import height
from studio.core.recipe import Recipe, Stream
from studio.jobs.measure.__main__ import _body, _explain
from studio.jobs.measure.real import CardMeter, train_longest
from studio.jobs.measure.storages import Peaks, Storages
from studio.jobs.measure.trace import Target, run_engine, trace
from studio.probe.measure import read_measurement
from studio.runs.control import request
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.requests import MeasureRequest
from studio.runs.worker import Worker
from tests.bench.trace_settings import TRACES, config_of
from tests.bench.trace_settings import recipe_of as settings_recipe

LLAMA = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


def recipe_of(**fields: Any) -> Recipe:
    recipe = Recipe()
    small = {"adapter.rank": 4, "train.micro_batch": 2, "train.seq_len": 96, "train.accumulation": 1}
    for path, value in {**small, **fields}.items():
        recipe = recipe.with_(path.replace("__", "."), value)
    assert recipe.problems() == ()
    return recipe


def measured(values: dict[str, Any], recipe: Recipe, dtype: str) -> Peaks:
    """The peaks of the same steps with real tensors on this CPU."""
    torch.manual_seed(0)
    storages = Storages()
    bnb.functional.name2qmap.clear()
    run_engine(AutoConfig.for_model(**values), recipe, Target("cpu", dtype), storages)
    return storages.log.peaks()


FAST = [
    {"method": "qlora", "train__recompute": "none", "adapter__targets": ("q_proj", "v_proj")},
]
SLOW = [
    {"method": "lora"},
    {"method": "lora", "train__recompute": "none"},
    {"method": "lora", "model__stream": 3, "train__recompute": "none"},
    {"method": "qlora", "model__stream": 2},
    {"method": "qlora", "train__accumulation": 2, "train__optimizer": "adamw_8bit"},
    {"method": "qlora", "train__recompute": "none"},
    {"method": "qlora", "train__recompute": 1},
    *(
        {"method": method, "train__recompute": kept, "train__loss": loss, "model__dtype": dtype}
        for method in ("lora", "qlora")
        for kept in ("all", "none")
        for loss, dtype in (("full", "bf16"), ("chunked", "fp32"))
    ),
    {"method": "qlora", "model__double_quant": False, "adapter__dropout": 0.1, "train__optimizer": "paged_adamw_32bit"},
    {"method": "lora", "adapter__dora": True, "train__attention": "eager", "adapter__targets": ("q_proj", "v_proj")},
    {"method": "lora", "model__dtype": "fp16"},
    {"method": "qlora", "adapter__modules_to_save": ("lm_head",)},
]


@pytest.mark.parametrize(
    "fields",
    [*FAST, *(pytest.param(fields, marks=pytest.mark.slow) for fields in SLOW)],
    ids=lambda f: " ".join(map(str, f.values())),
)
def test_a_trace_has_every_byte_of_a_real_step(fields: dict[str, Any]) -> None:
    recipe = recipe_of(**fields)
    dtype = fields.get("model__dtype", "bf16")
    assert trace(recipe, LLAMA, Target("cpu", dtype)).log.peaks() == measured(LLAMA, recipe, dtype)


@pytest.mark.slow
def test_dora_on_four_bits_to_the_byte_once_it_is_attached() -> None:
    """While it is attached, peft copies a 4-bit layer with its scales twice, and a fake one once."""
    recipe = recipe_of(method="qlora", adapter__dora=True)
    seen, real = trace(recipe, LLAMA, Target("cpu", "bf16")).log.peaks(), measured(LLAMA, recipe, "bf16")
    assert height(seen.pop("load")) == pytest.approx(height(real.pop("load")), rel=0.01)
    assert seen == real


class FakeCounters:
    """The counters of a card whose peaks are told beforehand, one for every time that they are read."""

    def __init__(self, *peaks: int) -> None:
        self.peaks = list(peaks)

    def max_memory_allocated(self) -> int:
        return self.peaks[0]

    def reset_peak_memory_stats(self) -> None:
        self.peaks.pop(0)


def test_a_card_keeps_the_highest_peak_of_every_stage() -> None:
    meter = CardMeter(FakeCounters(0, 100, 130, 170, 150, 180, 90))
    for stage in ("load", "forward", "backward", "forward", "backward", "optimizer"):
        meter.stage(stage)
    peaks = meter.peaks()
    assert {name: sum(parts.values()) for name, parts in peaks.items()} == {
        "load": 100,
        "forward": 150,
        "backward": 180,
        "optimizer": 90,
    }


def test_what_a_card_holds_is_known_by_its_tensors() -> None:
    meter = CardMeter(FakeCounters(0, 1000, 1500, 1300, 1250))
    meter.stage("load")
    meter.claim([torch.zeros(100), None], "base")
    meter.claim([torch.zeros(25)], "adapter")
    meter.stage("loss")
    meter.stage("backward")
    meter.claim([torch.zeros(25)], "gradients")
    meter.stage("optimizer")
    peaks = meter.peaks()
    assert peaks["loss"] == {"base": 400, "adapter": 100, "logits": 1000}
    assert peaks["backward"] == {"base": 400, "adapter": 100, "activations": 800}
    assert peaks["optimizer"] == {"base": 400, "adapter": 100, "gradients": 100, "activations": 650}


def test_a_card_counts_paged_state_apart_from_a_peak_that_never_held_it() -> None:
    """`max_memory_allocated` counts torch's own allocations; bitsandbytes' pages come from CUDA's unified memory."""
    page: Any = torch.zeros(200)
    page.is_paged = True
    meter = CardMeter(FakeCounters(0, 1000, 1300))
    meter.stage("load")
    meter.claim([torch.zeros(100)], "base")
    meter.claim([page, torch.zeros(10), page], "optimizer")
    meter.stage("eval")
    peaks = meter.peaks()
    assert peaks["eval"] == {"base": 400, "optimizer": 40, "paged": 800, "activations": 860}
    assert height(peaks["eval"]) == 1300, "what the card's counter said"


def test_a_peak_that_the_loop_read_and_reset_is_not_lost() -> None:
    meter = CardMeter(FakeCounters(0, 50))
    meter.stage("backward")
    meter.seen(400)
    assert meter.peaks() == {"backward": {"activations": 400}}


@pytest.mark.parametrize("layers", ["off", pytest.param(2, marks=pytest.mark.slow)])
def test_three_steps_on_a_card_are_the_engines_own(layers: Stream, tiny: Path, tmp_path: Path) -> None:
    """With a CPU in the card's place, and a counter that only grows."""
    recipe = recipe_of(method="qlora", model__dtype="fp32", model__stream=layers).with_("model.base", str(tiny))
    seen: list[tuple[Peaks, int, int]] = []
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    counters = FakeCounters(*range(10**6, 2 * 10**6, 1000))

    def body(worker: Worker) -> None:
        seen.append(train_longest(worker, recipe, torch.device("cpu"), counters))
        worker.emit(Finished, outcome="done")

    assert run_job(paths.root, body) == 0
    peaks, parameters, shown = seen[0]
    assert list(peaks) == ["load", "forward", "loss", "backward", "optimizer", "eval"]
    assert peaks["optimizer"]["gradients"] == 4 * parameters == peaks["eval"]["adapter"]
    assert peaks["eval"]["optimizer"] >= 8 * parameters
    assert shown == 0
    assert [event.step for event in read_events(paths.events) if isinstance(event, StepDone)] == [1, 2, 3]


def peak(values: dict[str, Any], recipe: Recipe, dtype: str = "bf16", capability: tuple[int, int] = (8, 0)) -> int:
    return max(map(height, trace(recipe, values, Target("cuda", dtype, capability)).log.peaks().values()))


LONG = recipe_of(method="lora", train__seq_len=1024, train__micro_batch=1, train__loss="chunked")
SQUARE = 4 * 1024 * 1024 * 2  # 16-bit scores of every head of LLAMA


@pytest.mark.slow
def test_a_card_without_flash_attention_makes_no_square_matrices_of_grouped_heads() -> None:
    """The engine repeats keys and values there, for the memory-efficient kernel."""
    grouped = {**LLAMA, "num_hidden_layers": 1}
    repeated = 1024 * 128 * 2
    added = peak(grouped, LONG, "fp16", (7, 5)) - peak(grouped, LONG, "fp16")
    assert 0 <= added < 8 * repeated < SQUARE


@pytest.mark.slow
def test_offloaded_checkpoints_leave_the_card() -> None:
    deep = {**LLAMA, "num_hidden_layers": 5}
    checkpoint = 1024 * 128 * 2
    kept, left = (
        trace(recipe, deep, Target("cuda", "bf16")).log.peaks()
        for recipe in (LONG, LONG.with_("train.offload_checkpoints", True))
    )
    assert height(kept["loss"]) - height(left["loss"]) == 4 * checkpoint, "the last layer's alone is still there"
    assert height(kept["backward"]) - height(left["backward"]) >= 2 * checkpoint, "beside the gradients made by then"


@pytest.mark.slow
def test_paged_optimizer_state_is_counted_apart() -> None:
    wide = recipe_of(method="lora", adapter__rank=512, train__optimizer="paged_adamw_32bit")
    peaks = trace(wide, LLAMA, Target("cuda", "bf16")).log.peaks()
    assert peaks["optimizer"]["paged"] > 0
    assert height(peaks["optimizer"]) < sum(peaks["optimizer"].values())


def test_an_architecture_that_nobody_knows_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match="no_such_model"):
        trace(LONG, {**LLAMA, "model_type": "no_such_model"}, Target("cuda", "bf16"))


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps({**LLAMA, "quantization_config": {"quant_method": "gptq"}}))
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_job(paths, MeasureRequest(LONG.with_("model.base", str(config)), how="trace"))
    assert run_job(paths.root, _body, explain=_explain) == 1
    (failed,) = (event for event in read_events(paths.events) if isinstance(event, Failed))
    assert "gptq" in failed.message


def test_a_base_in_mxfp4_is_traced_as_it_is_held_after_loading(tmp_path: Path) -> None:
    """In the recipe's own 4-bit form: its scales quantised again, as for a base of 16 bits."""
    sizes = {
        "model_type": "gpt_oss",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "head_dim": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "vocab_size": 256,
    }
    said = []
    for name, more in (("plain", {}), ("mxfp4", {"quantization_config": {"quant_method": "mxfp4"}})):
        (tmp_path / name).mkdir()
        config = tmp_path / name / "config.json"
        config.write_text(
            json.dumps({**sizes, "architectures": ["GptOssForCausalLM"], "num_experts_per_tok": 2, **more})
        )
        paths = RunPaths(tmp_path / f"run-{name}")
        paths.root.mkdir()
        recipe = recipe_of(method="qlora", model__base=str(config), train__seq_len=64)
        write_job(paths, MeasureRequest(recipe, how="trace"))
        assert run_job(paths.root, _body, explain=_explain) == 0
        report = read_measurement(paths)
        assert report is not None
        said.append(report["peaks"]["load"]["base"])
    assert said[0] == said[1]


def test_a_trace_that_is_asked_to_stop_does(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_job(paths, MeasureRequest(recipe_of(model__base=str(tiny)), how="trace", device="cpu"))
    stages = []

    def stage(self: Storages, name: str, tell: Any = Storages.stage) -> None:
        if name == "backward":
            request(paths, "stop")
        tell(self, name)
        stages.append(name)

    monkeypatch.setattr(Storages, "stage", stage)
    assert run_job(paths.root, _body, explain=_explain) == 0
    end = read_events(paths.events)[-1]
    assert isinstance(end, Finished)
    assert end.outcome == "stopped"
    assert "forward" in stages
    assert "backward" not in stages
    assert not paths.report.exists()


def test_the_job_leaves_a_report(tiny: Path, tmp_path: Path) -> None:
    recipe = recipe_of(method="qlora").with_("model.base", str(tiny)).with_("device.device", "cpu")
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    write_job(paths, MeasureRequest(recipe, how="trace", device="cuda"))
    assert run_job(paths.root, _body, explain=_explain) == 0
    report = read_measurement(paths)
    assert report is not None
    assert list(report["peaks"]) == ["load", "forward", "loss", "backward", "optimizer", "eval"]
    assert report["source"] == "trace"
    assert report["versions"]["torch"]


@pytest.fixture(scope="module")
def stored() -> list[dict[str, Any]]:
    """The rows of the grid, where they were traced with the libraries that are installed."""
    document = json.loads(TRACES.read_text(encoding="utf-8"))
    if document["libraries"] != {name: version(name) for name in document["libraries"]}:
        pytest.skip("other versions of the libraries may allocate otherwise: python -m tests.bench.trace_grid")
    rows: list[dict[str, Any]] = document["rows"]
    return rows


@pytest.mark.slow
def test_a_model_of_eight_billion_is_traced(stored: list[dict[str, Any]]) -> None:
    row = next(row for row in stored if row["model"] == "Llama-3.1-8B" and row["settings"]["method"] == "qlora")
    seen = trace(settings_recipe(row["settings"]), config_of("Llama-3.1-8B", None), Target("cuda", "bf16"))
    assert seen.log.peaks() == row["peaks"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["Llama-3.2-1B", "Mixtral-8x7B"])
def test_the_engine_still_holds_what_is_stored(model: str, stored: list[dict[str, Any]]) -> None:
    """A change of the engine that changes its memory shows here: `python -m tests.bench.trace_grid` stores it anew."""
    row = next(row for row in stored if row["model"] == model)
    recipe = settings_recipe(row["settings"])
    seen = trace(recipe, config_of(model, row["layers"]), Target("cuda", recipe.model.dtype))
    assert seen.log.peaks() == row["peaks"]
