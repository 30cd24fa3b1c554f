"""The audit of a base as a job: what it leaves, that it finds a planted fault, that it can be stopped and refused."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from studio.core.audit_text import tables_of
from studio.core.recipe import Recipe
from studio.jobs.audit import figures
from studio.jobs.audit.blocks import parts_of
from studio.jobs.audit.figures import Ground
from studio.jobs.audit.job import bars_svg, losses_svg
from studio.jobs.audit.rows import NEUTRAL
from studio.jobs.audit.variants import folder_variants
from studio.jobs.base.data.rows import Example
from studio.jobs.base.weights.folder_weights import FolderWeights
from studio.probe.model_folder import WEIGHTS
from studio.probe.quality import layer_effects
from studio.runs.control import request as ask
from studio.runs.control import withdraw
from studio.runs.job import write_job
from studio.runs.requests import AuditRequest
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.audit_cases import audit, figures_of, log_probabilities, plain_model
from tests.jobs.conftest import QUESTIONS, history_of

FORMS = ("nf4", "nf4+dq", "fp4", "int8")
RUINED = 2


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Forty short chats."""
    path = tmp_path / "rows.jsonl"
    turns = [(f"{question} {n}", f"{reply} {n}") for n in range(7) for question, reply in QUESTIONS]
    table = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    path.write_text("\n".join(json.dumps(row) for row in table))
    return path


@pytest.fixture(scope="module")
def ruined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks; in one of them a weight of every 64 is so large that 4 bits leave nothing of the rest."""
    folder = make_tiny_model(tmp_path_factory.mktemp("ruined") / "tiny", num_hidden_layers=4)
    tensors = load_file(folder / WEIGHTS)
    for name, tensor in tensors.items():
        if name.startswith(f"model.layers.{RUINED}.mlp") and tensor.dim() == 2:
            tensor[:, ::64] = 8.0 * tensor.abs().max()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def asked(model: Path, data: Path, **more: Any) -> AuditRequest:
    fields = {"rows": 8, "forms": FORMS, "kept": (1, 2), **more}
    return AuditRequest("base", model=str(model), data=str(data), **fields)


def test_names_from_outside_do_not_break_a_picture() -> None:
    name = "a|b\x1b[2J<script>\n# head"
    for picture in (losses_svg(name, [(name, 1.0, 0.5, 1.5)]), bars_svg(name, [(name, 0.5)])):
        assert "<script>" not in picture and "\x1b" not in picture
    assert "nan" not in losses_svg("one", [("same", 1.0, None, None)])


def test_what_it_leaves(tiny: Path, rows: Path, tmp_path: Path) -> None:
    paths, report = audit(tmp_path / "audit", asked(tiny, rows))
    assert [one["name"] for one in report["variants"]] == ["16-bit", *FORMS]
    assert report["rows"]["task"] == 8
    assert report["proof_gap"] < 1e-5
    first, *others = report["variants"]
    assert first["task"]["kl"]["value"] == 0.0
    for one in others:
        assert one["task"]["tokens"] == first["task"]["tokens"] > 8
        assert 0 < one["task"]["kl"]["low"] <= one["task"]["kl"]["value"] <= one["task"]["kl"]["high"]
        assert one["base_bytes"] < first["base_bytes"]
    assert {block["name"] for block in report["blocks"]} == {"model.layers.0", "model.layers.1"}
    # Both blocks kept: nothing is rounded any more, all of the KL is won.
    everything = report["plans"][-1]
    assert everything["won"]["value"] == pytest.approx(others[1]["task"]["kl"]["value"], rel=1e-6)
    assert everything["figures"]["kl"]["value"] == 0.0
    # In 8 bits all is nearly gone, as the whole base in 8 bits shows, for less than 16 bits take.
    *_, most = report["proposals"]
    assert most["precision"] == {"layers.0-1": "int8"}
    assert 0.99 < most["buys"] < 1
    assert report["variants"][-1]["task"]["kl"]["value"] < 0.05 * others[1]["task"]["kl"]["value"]
    assert most["extra_bytes"] < 0.6 * everything["extra_bytes"]
    page = (paths.root / "report.md").read_text()
    assert 'precision = { "layers.0-1" = "int8" }' in page
    recipe = Recipe().with_("model.base", str(tiny)).with_("model.precision", most["precision"])
    assert recipe.problems() == ()
    effects = layer_effects(recipe)
    assert effects is not None
    assert effects.source == f"audit, {others[1]['task']['tokens']} tokens"
    assert sum(layer.share for layer in effects.layers) == pytest.approx(1)
    assert all(heading in page for heading, _ in tables_of(report))
    assert f"{first['task']['tokens']:,} tokens" in page
    for picture in ("losses.svg", "blocks.svg"):
        assert (paths.root / picture).read_text().startswith("<svg")
        assert f"({picture})" in page
    assert not (paths.root / "audit").exists(), "the state of a finished walk"
    finished = history_of(paths).finished
    assert finished is not None and finished.outcome == "done"


def test_a_ruined_block_is_ranked_first_and_keeping_it_is_advised(ruined: Path, rows: Path, tmp_path: Path) -> None:
    recipe = f"layers.{RUINED}=16bit"
    request = asked(ruined, rows, forms=("nf4+dq",), kept=(1,), rows=20, precision=recipe)
    _, report = audit(tmp_path / "audit", request)
    as_recipe, rounded = report["variants"][-1], report["variants"][1]
    assert as_recipe["name"] == "nf4+dq, mixed"
    assert as_recipe["task"]["kl"]["value"] == pytest.approx(report["plans"][0]["figures"]["kl"]["value"], rel=1e-6)
    extra = report["plans"][0]["extra_bytes"]
    assert as_recipe["base_bytes"] - rounded["base_bytes"] == pytest.approx(extra, abs=4)
    name = f"model.layers.{RUINED}"
    assert report["blocks"][0]["name"] == name
    assert report["blocks"][0]["own_effect"] > 1.5 * report["blocks"][1]["own_effect"]
    assert report["plans"][0]["kept"] == [name]
    first = report["proposals"][0]
    assert first["precision"] == {f"layers.{RUINED}": "16bit"}, "8 bits were not measured here"
    assert first["extra_bytes"] == report["plans"][0]["extra_bytes"]
    assert f"Keeping {name} in 16 bit wins" in report["recommendation"]["sentence"]


@pytest.mark.slow
def test_stopped_and_resumed_it_comes_to_the_same_report(tiny: Path, rows: Path, tmp_path: Path) -> None:
    request = asked(tiny, rows)
    _, whole = audit(tmp_path / "whole", request)
    paths = audit(tmp_path / "stopped", request)[0]
    shutil.rmtree(paths.root)
    paths.root.mkdir()
    paths.control.mkdir()
    ask(paths, "stop")
    write_job(paths, request)
    _, nothing = audit(paths.root, request)
    assert not nothing
    assert history_of(paths).finished.outcome == "stopped"  # type: ignore[union-attr]
    assert (paths.root / "audit" / "roundings").is_dir()
    withdraw(paths, "stop")
    _, report = audit(paths.root, request)
    assert {**report, "cost": 0} == {**whole, "cost": 0}


@pytest.mark.slow
def test_a_kept_state_of_other_rows_is_not_taken_up(tiny: Path, rows: Path, tmp_path: Path) -> None:
    paths, _ = audit(tmp_path / "one", asked(tiny, rows))
    ask(paths, "stop")
    audit(paths.root, asked(tiny, rows))
    withdraw(paths, "stop")
    kept = json.loads((paths.root / "audit" / "roundings" / "walk.json").read_text())
    (paths.root / "audit" / "roundings" / "walk.json").write_text(json.dumps({**kept, "about": "something else"}))
    _, report = audit(paths.root, asked(tiny, rows))
    assert report["rows"]["task"] == 8


def test_a_neutral_text_of_the_users(tiny: Path, rows: Path, tmp_path: Path) -> None:
    text = tmp_path / "own.txt"
    text.write_text("One passage.\n\nAnother one.\n")
    _, report = audit(tmp_path / "audit", asked(tiny, rows, text=str(text), kept=()))
    assert report["rows"]["neutral"] == 2
    assert report["variants"][0]["neutral"]["tokens"] == len("One passage.") + len("Another one.") - 2
    assert NEUTRAL.read_text().count("\n\n") > 10


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"forms": ("nf5",)}, "found nf5; wanted some of nf4"),
        ({"forms": ()}, "found none"),
        ({"text": "/no/such/text"}, "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(
    tiny: Path, rows: Path, tmp_path: Path, more: dict[str, str], wanted: str
) -> None:
    paths, report = audit(tmp_path / "audit", asked(tiny, rows, **more))
    assert not report
    failed = history_of(paths).failed
    assert failed is not None and wanted in failed.message


def test_too_little_memory_is_said_before_anything_is_read(
    tiny: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        available = 0

    monkeypatch.setattr("studio.jobs.audit.figures.psutil.virtual_memory", Full)
    monkeypatch.setattr(
        "studio.jobs.audit.figures.psutil.Process.memory_info", lambda self: type("M", (), {"rss": 1})()
    )
    paths, _ = audit(tmp_path / "audit", asked(tiny, rows))
    assert "Fewer --rows" in history_of(paths).failed.message  # type: ignore[union-attr]


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes on which devices products are made, and where tensors are copied to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: set[str] = set()
        self.copies: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.mm.default:
            self.products.add(out.device.type)
        elif func is torch.ops.aten._to_copy.default and out.device != args[0].device:
            self.copies.add(out.device.type)
        return out


@pytest.mark.parametrize(("device", "copied"), [("cpu", set()), ("meta", {"meta"})])
def test_the_time_is_taken_where_the_walk_will_be(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, device: str, copied: set[str]
) -> None:
    """The meta device in a card's place: a product of the CPU's told hours where the card took seconds."""
    monkeypatch.setattr(figures, "job_device", lambda wanted: torch.device(device))
    weights = FolderWeights.of(tiny)
    ids = np.arange(16, dtype=np.int32)
    rows: Any = SimpleNamespace(all=[Example(ids, ids)])
    worker: Any = SimpleNamespace(emit=lambda kind, **fields: None)
    ground = Ground(worker, weights, parts_of(weights.clean), rows, "")
    with Products() as seen:
        cost = figures.check_cost(ground, folder_variants(weights, ["16-bit", "nf4"]), alone=False)
    assert seen.products == {device}
    assert seen.copies == copied
    assert 0 < cost.low_seconds < cost.high_seconds


@pytest.mark.slow
def test_the_embedded_model_has_the_figures_of_the_whole_model(tmp_path: Path) -> None:
    from studio.jobs.audit.rows import read_audit_rows
    from studio.jobs.base.embedded import ensure_embedded
    from studio.jobs.base.tokenizer import load_tokenizer
    from studio.probe.data import shipped_data

    folder = ensure_embedded()
    text = tmp_path / "short.txt"
    text.write_text("A short passage, since only the rows are compared here.")
    request = asked(folder, shipped_data(), rows=3, kept=(), text=str(text))
    _, report = audit(tmp_path / "audit", request)
    task = read_audit_rows(request, load_tokenizer(folder), lambda text: None).task
    meant = log_probabilities(plain_model(folder, "16-bit"), task)
    for one in report["variants"]:
        loss, kl, same = figures_of(log_probabilities(plain_model(folder, one["name"]), task), meant, task)
        assert one["task"]["loss"]["value"] == pytest.approx(loss, rel=1e-4), one["name"]
        assert one["task"]["kl"]["value"] == pytest.approx(kl, rel=1e-4, abs=1e-7), one["name"]
        assert one["task"]["same_top"]["value"] == pytest.approx(same, abs=1e-6), one["name"]


def test_no_threads_of_bitsandbytes_repack_anything(tiny: Path) -> None:
    """Its 4-bit product repacks weights in evaluation mode on some CPUs; ours never calls it."""
    from studio.jobs.audit.forms import FORMS as KNOWN

    layer = KNOWN["nf4"].make(torch.randn(64, 64), None).eval()
    before = layer.codes.clone()  # type: ignore[union-attr]
    layer(torch.randn(3, 64))
    assert torch.equal(layer.codes, before)  # type: ignore[union-attr, arg-type]
