"""No setting is silently ignored: each field of a recipe is changed alone, and what it is for must come out otherwise.

The real training job runs in this process, on a tiny model, before and after the change. A field that has no row here
fails the first test: say there which value to change it to, and what the change must show in.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from studio.core.events import Evaluated, Failed, Phase, Planned, Sampled, Saved, StepDone, Warned
from studio.core.recipe import FIELDS, AdapterSection, Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup, setup_of
from studio.jobs.base import load as base_load
from studio.jobs.train import job, loop
from studio.jobs.train.adapter import attach_adapter
from studio.launch.start import prepare
from studio.runs import job_process
from studio.runs.layout import ADAPTER_WEIGHTS, RunPaths
from studio.runs.log import read_events
from tests.fakes.tiny_model import make_tiny_model, tiny_config
from tests.jobs.conftest import QUESTIONS, Train

BASE: dict[str, Any] = {
    "train.steps": 3,
    "eval.rows": 1,
    "eval.samples": 1,
    "eval.sample_tokens": 2,
    "data.format": "chat",
}
FOUR_BIT = {"method": "qlora"}


@dataclass(frozen=True, slots=True)
class Row:
    """How a field is changed, and what must be seen of it.

    Attributes:
        value: What it is changed to; a function is given a folder to make it in.
        shows: Key of `seen`.
        others: Settings before and after, without which the field means nothing; a function as above.
    """

    value: Any
    shows: str
    others: dict[str, Any] = field(default_factory=dict)


def other_base(folder: Path) -> str:
    return str(make_tiny_model(folder / "other", seed=1))


def earlier_adapter(folder: Path) -> str:
    """An adapter of the form that the recipe makes, with other values than it begins with."""
    base = transformers.LlamaForCausalLM.from_pretrained(
        make_tiny_model(folder / "base"), dtype=torch.float32, attn_implementation="sdpa"
    )
    section = AdapterSection(rank=4, alpha=8.0)
    model = attach_adapter(base, section, recompute="none")
    torch.manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(str(folder / "earlier"), save_embedding_layers=False)
    return str(folder / "earlier")


def other_rows(folder: Path) -> str:
    rows = [
        {"messages": [{"role": "user", "content": answer}, {"role": "assistant", "content": question}]}
        for question, answer in QUESTIONS
    ]
    (folder / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "other.jsonl")


def thinking(folder: Path) -> str:
    return chats(folder, lambda question, answer: [question, f"<think>\n{question}\n</think>\n\n{answer}"])


def two_answers(folder: Path) -> str:
    return chats(folder, lambda question, answer: [question, answer, answer, question])


def chats(folder: Path, turns: Callable[[str, str], list[str]]) -> str:
    roles = ("user", "assistant") * 2
    rows = [
        {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns(*row), strict=False)]}
        for row in QUESTIONS
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "chats.jsonl")


def shouting(folder: Path) -> str:
    base = make_tiny_model(folder / "shouting")
    template = base / "chat_template.jinja"
    template.write_text("{% if shout %}Shout! {% endif %}" + template.read_text())
    return str(base)


def mixture(folder: Path) -> list[dict[str, Any]]:
    return [{"path": other_rows(folder)}, {"path": "embedded", "rows": 3}]


def long_texts(folder: Path) -> str:
    return texts(folder, words=90)


def texts(folder: Path, words: int = 1) -> str:
    path = folder / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{question} " * words}) for question, _ in QUESTIONS))
    return str(path)


def weighed(folder: Path) -> list[dict[str, Any]]:
    paths = [folder / name for name in ("short.jsonl", "long.jsonl")]
    for path, words in zip(paths, (1, 9), strict=True):
        rows = [{"prompt": f"{path.stem} {row}", "completion": "uno " * words} for row in range(8)]
        path.write_text("\n".join(map(json.dumps, rows)))
    return [{"path": str(path), "weight": 1.0} for path in paths]


def two_splits(above: Path) -> str:
    folder = above / "splits"
    folder.mkdir(exist_ok=True)
    swapped = Path(other_rows(above)).read_text()
    turned = swapped.replace("assistant", "us").replace("user", "assistant").replace('"us"', '"user"')
    rows = [{"messages": json.loads(line)["messages"][::-1]} for line in turned.splitlines()]
    (folder / "train.jsonl").write_text(swapped)
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def rows_with_a_bad_one(folder: Path) -> str:
    path = Path(other_rows(folder))
    path.write_text(path.read_text() + "\nno row")
    return str(path)


def pairs(folder: Path) -> str:
    rows = [{"prompt": question, "chosen": answer, "rejected": question} for question, answer in QUESTIONS]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "pairs.jsonl")


PAIRS = {"train.objective": "dpo", "data.path": pairs, "data.format": "auto"}


def named_otherwise(folder: Path) -> str:
    rows = [{"Frage": q, "Antwort": a, "Thema": f"about {len(q)}", "Zusatz": a[::-1]} for q, a in QUESTIONS]
    (folder / "named.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder / "named.jsonl")


NAMED = {
    "data.path": named_otherwise,
    "data.format": "auto",
    "data.columns": {"prompt": "Frage", "completion": "Antwort"},
}
WRITTEN = NAMED | {"data.columns": {"completion": "Antwort"}, "data.prompt": "{{ Frage }}"}

ROWS: dict[str, Row] = {
    "name": Row("Other name", "folder"),
    "method": Row("qlora", "losses"),
    "model.base": Row(other_base, "losses"),
    "model.revision": Row("v1", "failure"),
    "model.dtype": Row("bf16", "dtype"),
    "model.quant_type": Row("fp4", "losses", FOUR_BIT),
    "model.double_quant": Row(False, "losses", FOUR_BIT),
    "model.precision": Row({"layers.0": "16bit"}, "losses", FOUR_BIT),
    "model.stream": Row(2, "warnings"),
    "model.trust_remote_code": Row(True, "loaded"),
    "adapter.rank": Row(8, "tensors"),
    "adapter.alpha": Row(16.0, "losses"),
    "adapter.targets": Row(["q_proj"], "tensors"),
    "adapter.dropout": Row(0.5, "losses"),
    "adapter.rslora": Row(True, "losses"),
    "adapter.dora": Row(True, "tensors"),
    "adapter.init": Row("gaussian", "losses"),
    "adapter.start": Row(earlier_adapter, "losses"),
    "adapter.lora_plus_ratio": Row(16.0, "losses"),
    "adapter.rank_pattern": Row({"q_proj": 2}, "tensors"),
    "adapter.alpha_pattern": Row({"q_proj": 64.0}, "losses"),
    "adapter.layers": Row([1], "tensors"),
    "adapter.modules_to_save": Row(["norm"], "tensors"),
    "adapter.whole_rate_ratio": Row(0.1, "losses", {"adapter.modules_to_save": ["lm_head"]}),
    "train.micro_batch": Row(1, "batch tokens"),
    "train.accumulation": Row(2, "tokens"),
    "train.seq_len": Row(28, "tokens"),
    "train.steps": Row(2, "steps"),
    "train.epochs": Row(2.0, "steps", {"train.steps": 0}),
    "train.objective": Row("orpo", "losses", PAIRS),
    "train.beta": Row(0.5, "losses", PAIRS),
    "train.label_smoothing": Row(0.1, "losses", PAIRS),
    "train.learning_rate": Row(1e-3, "losses"),
    "train.schedule": Row("linear", "rates"),
    "train.warmup_fraction": Row(1.0, "rates"),
    "train.optimizer": Row("adamw_8bit", "optimizer state", {"train.checkpoint_every": 1}),
    "train.recompute": Row("all", "checkpointing"),
    "train.keep_dequantised": Row(True, "details", FOUR_BIT | {"train.recompute": "all"}),
    "train.offload_checkpoints": Row(True, "warnings", {"train.recompute": "all"}),
    "train.loss": Row("full", "loss path"),
    "train.packing": Row("on", "batch tokens"),
    "train.group_by_length": Row(True, "phases"),
    "train.attention": Row("eager", "loaded"),
    "train.compile": Row(True, "compiled"),
    "train.weight_decay": Row(0.5, "losses"),
    "train.max_grad_norm": Row(0.01, "losses"),
    "train.seed": Row(18, "losses"),
    "train.checkpoint_every": Row(1, "checkpoints"),
    "train.checkpoint_minutes": Row(1e-9, "checkpoints"),
    "train.track": Row(["mlflow"], "tracked"),
    "train.keep_checkpoints": Row(1, "checkpoints left", {"train.checkpoint_every": 1}),
    "train.on_oom": Row("shrink", "copies"),
    "eval.rows": Row(0, "held out", {"eval.samples": 0}),
    "eval.every": Row(2, "evaluated"),
    "eval.samples": Row(0, "answers"),
    "eval.sample_tokens": Row(20, "answers"),
    "data.path": Row(other_rows, "losses"),
    "data.format": Row("alpaca", "failure"),
    "data.columns": Row({"prompt": "Frage", "completion": "Zusatz"}, "losses", NAMED),
    "data.prompt": Row("{{ Thema }}: {{ Frage }}", "losses", WRITTEN),
    "data.sources": Row(mixture, "losses", {"data.path": "embedded"}),
    "data.weigh_by": Row("tokens", "losses", {"data.path": "embedded", "data.sources": weighed, "data.format": "auto"}),
    "data.eval_path": Row(other_rows, "held out"),
    "data.answers_only": Row(False, "losses"),
    "data.config": Row("long", "failure"),
    "data.split": Row("test", "losses", {"data.path": two_splits}),
    "data.revision": Row("v1", "failure"),
    "data.learn": Row(["answer"], "losses", {"data.path": thinking}),
    "data.last_answer_only": Row(True, "losses", {"data.path": two_answers}),
    "data.template_kwargs": Row({"shout": True}, "losses", {"model.base": shouting}),
    "data.on_bad_row": Row("stop", "failure", {"data.path": rows_with_a_bad_one, "data.on_bad_row": "skip"}),
    "data.template": Row("vicuna", "tokens"),
    "data.blocks": Row(False, "held out", {"data.path": long_texts, "data.format": "text"}),
    "data.stride": Row(9, "held out", {"data.path": long_texts, "data.format": "text"}),
    "data.document_ends": Row(False, "tokens", {"data.path": texts, "data.format": "text"}),
    "device.device": Row("cuda:7", "failure"),
    "device.budget_gib": Row(2.0, "budget"),
}


def test_every_field_has_a_row() -> None:
    assert sorted(ROWS) == sorted(FIELDS), "say in ROWS what a change of the field must show in"


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """What the job asks of libraries, and of the card, where nothing else of it is seen on a CPU."""
    asked: dict[str, list[Any]] = {"loaded": [], "checkpointing": [], "compiled": [], "budget": [], "copies": []}
    load, pick = transformers.LlamaForCausalLM.from_pretrained, base_load.class_in
    checkpoint = torch.utils.checkpoint.checkpoint

    def loading(*args: Any, **options: Any) -> Any:
        asked["loaded"].append(options["attn_implementation"])
        return load(*args, **options)

    def picking(*args: Any, **options: Any) -> Any:
        asked["loaded"].append(options["trust_remote_code"])
        return pick(*args, **options)

    def checkpointing(*args: Any, **options: Any) -> Any:
        asked["checkpointing"].append(True)
        return checkpoint(*args, **options)

    def compiling(function: Any, **options: Any) -> Any:
        asked["compiled"].append(True)
        return function

    def limiting(budget_gib: float, device: torch.device) -> str:
        asked["budget"].append(budget_gib)
        return ""

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", loading)
    monkeypatch.setattr(base_load, "class_in", picking)
    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", checkpointing)
    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(loop.Undo, "drop", lambda self: asked["copies"].append(len(self._weights)))
    monkeypatch.setattr(job, "limit_memory", limiting)
    return asked


def seen_of(paths: RunPaths, spied: dict[str, list[Any]], recipe: Recipe) -> dict[str, Any]:
    """Everything of a run that a field may show in."""
    events = list(read_events(paths.events))

    def each(kind: type, value: Callable[[Any], Any]) -> list[Any]:
        return [value(event) for event in events if isinstance(event, kind)]

    planned = each(Planned, lambda event: event)
    seen: dict[str, Any] = {
        "folder": prepare(recipe, paths.root.parent / "runs", 0.0).name,
        "losses": each(StepDone, lambda event: event.loss),
        "rates": each(StepDone, lambda event: event.learning_rate),
        "tokens": each(StepDone, lambda event: event.tokens),
        "evaluated": each(Evaluated, lambda event: event.step),
        "answers": each(Sampled, lambda event: (event.prompt, event.answer)),
        "warnings": each(Warned, lambda event: event.topic),
        "phases": set(each(Phase, lambda event: event.name)),
        "details": each(Phase, lambda event: event.detail if event.name == "attaching the adapter" else ""),
        "checkpoints": each(Saved, lambda event: event.path),
        "checkpoints left": sorted(folder.name for folder in paths.checkpoints.glob("step-*")),
        "tracked": job_process.asked_trackers(paths),
        "failure": each(Failed, lambda event: event.message),
        "tensors": _tensors(paths.adapter / ADAPTER_WEIGHTS),
        "optimizer state": [_tensors(path) for path in paths.checkpoints.glob("*/optimizer.safetensors")],
        **{name: list(calls) for name, calls in spied.items()},
    }
    for name, value in {
        "dtype": "dtype", "loss path": "loss_path", "steps": "total_steps", "batch tokens": "batch_tokens",
    }.items():  # fmt: skip
        seen[name] = [getattr(event, value) for event in planned]
    seen["held out"] = [(event.rows, event.held_out_rows) for event in planned]
    return seen


def _tensors(path: Path) -> list[tuple[str, Any]]:
    if not path.is_file():
        return []
    with safe_open(path, "pt") as file:
        return [(name, file.get_slice(name).get_shape()) for name in sorted(file.keys())]


def made(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    assert recipe.problems() == ()
    return recipe


_BEFORE: dict[str, dict[str, Any]] = {}
"""What was seen before a change, by the settings; the runs of one are alike, which the first test after it shows."""


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(ROWS))
def test_a_change_of_the_field_shows(
    path: str, recipe: Recipe, train: Train, tmp_path: Path, spied: dict[str, list[Any]]
) -> None:
    row = ROWS[path]

    def run(settings: dict[str, Any]) -> dict[str, Any]:
        for calls in spied.values():
            calls.clear()
        changed = made(recipe, settings)
        return seen_of(train(changed), spied, changed)

    others = BASE | {name: value(tmp_path) if callable(value) else value for name, value in row.others.items()}
    key = json.dumps(others)
    if key not in _BEFORE:
        _BEFORE[key] = run(others)
    value = row.value(tmp_path) if callable(row.value) else row.value
    assert made(recipe, others).get(path) != made(recipe, others | {path: value}).get(path)
    before, after = _BEFORE[key], run(others | {path: value})
    assert before[row.shows] != after[row.shows], f"{path} is {value!r} now, and {row.shows} are as before"
    assert not before["failure"]
    assert row.shows == "failure" or not after["failure"]


def test_what_is_compared_is_the_same_from_run_to_run(
    recipe: Recipe, train: Train, spied: dict[str, list[Any]]
) -> None:
    """Else a change would show without being heeded."""
    again = made(recipe, BASE)
    first, second = (seen_of(train(again), {name: [] for name in spied}, again) for _ in range(2))
    del first["folder"], second["folder"]  # the second of a name gets a number
    assert first == second


PLANNED = {
    "method": "lora",
    "adapter.rank": 32,
    "adapter.targets": ["q_proj"],
    "adapter.rank_pattern": {"q_proj": 64},
    "adapter.layers": [0],
    "adapter.dropout": 0.1,
    "adapter.dora": True,
    "adapter.modules_to_save": ["lm_head"],
    "train.objective": "dpo",
    "train.micro_batch": 2,
    "train.seq_len": 2048,
    "train.accumulation": 1,
    "train.optimizer": "adamw_8bit",
    "train.recompute": "none",
    "train.offload_checkpoints": True,
    "train.attention": "eager",
    "train.loss": "full",
    "model.dtype": "fp32",
    "model.double_quant": False,
    "model.precision": {"layers.0": "int8"},
    "model.stream": 2,
    "device.device": "cpu",
}
"""Fields that the memory estimate counts."""
OF_NO_MEMORY = {"model.quant_type"}
"""In a set-up for the sake of other loops, which also hold int8: NF4 and FP4 take as many bytes."""
OF_LONG_ROWS = {"train.compile": True, "train.keep_dequantised": True}
"""Counted where MLPs take their rows in tiles, which compiled layers do not, and where weights are dequantised."""
ON_A_CPU = {"train.on_oom": "shrink"}
"""Counted where the optimizer's step is copied beforehand, as it is each time on a CPU."""


def figures(recipe: Recipe) -> tuple[Any, ...]:
    shape = shape_from_config(tiny_config(hidden_size=256, intermediate_size=512, vocab_size=32_000).to_dict())
    plan = estimate_vram(shape, setup_of(recipe))
    return plan.components, plan.stages, plan.host


def test_every_field_of_a_set_up_is_counted() -> None:
    names = {field.name for field in fields(Setup)}
    assert {
        path for path in FIELDS if path.rpartition(".")[2] in names
    } == PLANNED.keys() | OF_NO_MEMORY | OF_LONG_ROWS.keys() | ON_A_CPU.keys()
    long, on_a_cpu = Recipe().with_("train.seq_len", 8192), Recipe().with_("device.device", "cpu")
    for recipe, of_it in ((long, OF_LONG_ROWS), (on_a_cpu, ON_A_CPU)):
        for path, value in of_it.items():
            assert figures(recipe) != figures(recipe.with_(path, value))


@pytest.mark.parametrize("path", PLANNED)
def test_a_change_of_the_field_changes_the_plan(path: str) -> None:
    assert figures(Recipe()) != figures(Recipe().with_(path, PLANNED[path]))
