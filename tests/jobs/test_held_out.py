"""No audit of a trained model rests on a row that the model was trained on: seen by the tokens that each is given."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from studio.core.errors import JobFailed
from studio.core.events import StepDone
from studio.core.recipe import Recipe
from studio.jobs.audit import answers, base_audit, gguf, race, run_audit
from studio.jobs.audit.lanes import Lane
from studio.jobs.base.data.rows import Example
from studio.jobs.train import batches as train_batches
from studio.jobs.train.batches import Batcher, StepBatches
from studio.jobs.train.objectives.supervised import pack
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel
from studio.probe.audit import audit_fields, audit_of_run
from studio.probe.exported import GgufFile
from studio.runs.control import request as ask
from studio.runs.control import withdraw
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from studio.runs.status import run_status
from studio.runs.summary import summary_of
from studio.runs.watch import RunWatch
from studio.runs.worker import Worker
from studio.tui.screens.ask_audit import run_request
from tests.fakes.runs import LiveWorker
from tests.fakes.tiny_model import tiny_tokenizer
from tests.jobs.adapter_cases import write_chats
from tests.jobs.audit_cases import audit, examples
from tests.jobs.conftest import Train, history_of

Seen = set[bytes]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_chats(tmp_path / "data.jsonl")


@pytest.fixture
def recipe(recipe: Recipe) -> Recipe:
    """Six of 42 rows are held out; every row that is left is seen in one epoch."""
    return recipe.with_("eval.rows", 6).with_("train.steps", 2).with_("train.micro_batch", 8)


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Token ids of every row that a training in this process may take a step on."""
    seen: Seen = set()

    class Spied(StepBatches):
        def __init__(self, rows: Any, *args: Any, **more: Any) -> None:
            seen.update(tokens_of(rows))
            super().__init__(rows, *args, **more)

    monkeypatch.setattr(train_batches, "StepBatches", Spied)
    return seen


@pytest.fixture
def measured_on(monkeypatch: pytest.MonkeyPatch) -> Seen:
    """Token ids of every row of data that an audit in this process measures."""
    seen: Seen = set()
    for module in (base_audit, run_audit, race):
        whole = module.measure

        def spied(ground: Any, *args: Any, whole: Any = whole, **more: Any) -> Any:
            seen.update(tokens_of(ground.rows.task))
            return whole(ground, *args, **more)

        monkeypatch.setattr(module, "measure", spied)
    return seen


def tokens_of(rows: Iterable[Example]) -> Seen:
    return {row.input_ids.tobytes() for row in rows}


def whole_rows(data: Path) -> Seen:
    table = [json.loads(line)["messages"] for line in data.read_text().splitlines()]
    texts = tiny_tokenizer().apply_chat_template(table, tokenize=False)
    ids = tiny_tokenizer()(texts, add_special_tokens=False).input_ids
    return tokens_of(examples_of(ids))


def examples_of(ids: Iterable[list[int]]) -> list[Example]:
    arrays = [np.array(row, np.int32) for row in ids]
    return [Example(array, array) for array in arrays]


@pytest.mark.slow
@pytest.mark.parametrize("asks", [pytest.param("command line, 100 rows", marks=pytest.mark.slow), "studio"])
def test_figures_answers_and_speeds_of_a_run_rest_on_no_row_that_it_was_trained_on(
    recipe: Recipe,
    train: Train,
    data: Path,
    tmp_path: Path,
    trained_on: Seen,
    measured_on: Seen,
    monkeypatch: pytest.MonkeyPatch,
    asks: str,
) -> None:
    run = train(recipe)
    assert trained_on < whole_rows(data) and len(trained_on) == 36
    prompts: list[str] = []
    whole = answers.sample_prompts

    def spied(*args: Any, **more: Any) -> Any:
        found = whole(*args, **more)
        prompts.extend(prompt.text for prompt in found)
        return found

    monkeypatch.setattr(answers, "sample_prompts", spied)
    llama_rows = through_llama(tmp_path, monkeypatch)
    said = {"rows": "100", "answers": "40", "answer_tokens": "2", "speed": "1"}
    request = run_request(run, said) if asks == "studio" else audit_of_run(run, **audit_fields(said))
    paths, report = audit(tmp_path / "audit", request)
    assert report, history_of(paths).failed
    assert measured_on == whole_rows(data) - trained_on
    assert (report["rows"]["task"], report["held_out_rows"], len(report["row_hashes"])) == (6, 6, 6)
    assert report["rows_from"] == f"all 6 rows that the run {run.name} held out of data.jsonl"
    known = [text for text in prompts if any(f"user\n{text}<" in _text(ids) for ids in trained_on)]
    assert len(prompts) == report["answers"]["prompts"] == 6 and not known
    for ids, _ in llama_rows[:6]:
        assert any(_numbers(held)[: len(ids)] == ids for held in measured_on)
        assert not any(_numbers(row)[: len(ids)] == ids for row in trained_on)
    assert "Measured on all 6 rows that the run" in (paths.root / "report.md").read_text()


def through_llama(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[int], list[int]]]:
    """A GGUF file that llama.cpp gives up on as soon as it was given its rows, which are returned."""
    file = folder / "a.gguf"
    file.write_bytes(b"GGUF")
    given: list[tuple[list[int], list[int]]] = []

    def refused(tool: Any, path: Path, rows: Any, *args: Any) -> Any:
        given.extend(rows)
        raise JobFailed("llama", "it is a stand-in", "")

    monkeypatch.setattr(run_audit, "gguf_files", lambda *args: {"gguf f16": GgufFile(file, "f16", "a stand-in")})
    monkeypatch.setattr(gguf.GgufForms, "tool", lambda self: object())
    monkeypatch.setattr(gguf, "streamed_llama_logits", lambda *args: args)
    monkeypatch.setattr(gguf, "score_given", lambda given, *args: refused(*given))
    return given


def _numbers(ids: bytes) -> list[int]:
    return list(np.frombuffer(ids, np.int32).tolist())


def _text(ids: bytes) -> str:
    return str(tiny_tokenizer().decode(_numbers(ids)))


def test_a_base_is_measured_on_every_row(tiny: Path, data: Path, tmp_path: Path, measured_on: Seen) -> None:
    request = AuditRequest("base", model=str(tiny), data=str(data), forms=("nf4",), kept=())
    paths, report = audit(tmp_path / "audit", request)
    assert measured_on == whole_rows(data)
    assert (report["rows"]["task"], report["held_out_rows"]) == (42, None)
    page = (paths.root / "report.md").read_text()
    assert "Measured on all 42 rows of data.jsonl." in page and "was trained on these rows before is not known" in page
    assert "held-out" not in page


def test_lanes_of_a_race_are_compared_on_rows_that_none_was_trained_on(
    recipe: Recipe, train: Train, data: Path, tmp_path: Path, trained_on: Seen, measured_on: Seen
) -> None:
    """The second lane holds out other rows, as one whose data were edited meanwhile would."""
    runs = [train(recipe), train(recipe.with_("train.seed", 5).with_("eval.rows", 8))]
    lanes = [Lane(f"lane {n}", recipe, run, RunWatch(run)) for n, run in enumerate(runs)]
    root = tmp_path / "race"
    root.mkdir()
    request = AuditRequest("race", recipe=recipe)
    with LiveWorker(RunPaths(root)) as worker:
        _, told, _ = race.measure_lanes(worker, request, lanes, share=(0.0, 1.0))
    assert not measured_on & trained_on
    assert measured_on == whole_rows(data) - trained_on
    assert told["rows"]["task"] == told["held_out_rows"] == len(measured_on) > 0


def test_a_run_without_held_out_rows_is_not_audited(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    run = train(recipe.with_("eval.rows", 0))
    paths, report = audit(tmp_path / "audit", audit_of_run(run))
    assert not report
    assert "held out no row: all 42 rows" in history_of(paths).failed.message  # type: ignore[union-attr]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_record_and_refuses_other_rows(recipe: Recipe, train: Train, data: Path) -> None:
    longer = recipe.with_("train.steps", 40).with_("train.checkpoint_every", 1)
    run = train(longer)
    record = run.held_out.read_text()
    stopped = stop_after(train, longer, 3)
    kept = stopped.held_out.read_text()
    assert json.loads(kept)["before"]["tokens"] == json.loads(record)["before"]["tokens"]
    before = data.read_text()
    data.write_text(before.replace("uno 3", "edited"))
    train(longer, stopped)
    failed = history_of(stopped).failed
    assert failed is not None and failed.failure == "bad_input"
    assert "rows are not those that it began with" in failed.message
    assert stopped.held_out.read_text() == kept
    data.write_text(before)
    train(longer, stopped)
    history = history_of(stopped)
    assert history.finished is not None and history.last_step == 40
    assert stopped.held_out.read_text() == kept
    gains = [history_of(paths).evals[-1].gain for paths in (run, stopped)]
    assert gains[0] is not None and gains[1] == pytest.approx(gains[0], rel=1e-3), "losses from before are remembered"


def stop_after(train: Train, recipe: Recipe, step: int) -> RunPaths:
    """A run that was stopped in its middle."""
    whole = Worker.emit
    patch = pytest.MonkeyPatch()

    def emit(worker: Worker, kind: Any, **fields: Any) -> None:
        whole(worker, kind, **fields)
        if kind is StepDone and fields["step"] == step:
            worker.paths.control.mkdir(exist_ok=True)
            ask(worker.paths, "stop")

    with patch.context() as patched:
        patched.setattr(Worker, "emit", emit)
        run = train(recipe)
    withdraw(run, "stop")
    assert history_of(run).last_step == step
    return run


@pytest.mark.parametrize("loss", ["chunked", "full"])
@pytest.mark.parametrize("way", ["padded", "packed"])
def test_losses_of_rows_are_those_of_each_row_alone(tiny: Path, loss: Any, way: str) -> None:
    step_model = a_step_model(tiny, loss)
    rows, cpu = examples(9, 17, 5, 30), torch.device("cpu")
    alone = [float(step_model(Batcher(1, 0, cpu).batch([row])).detach()) for row in rows]
    batch = pack(rows, cpu) if way == "packed" else Batcher(4, 0, cpu).batch(rows)
    if way == "packed":
        assert can_pack(step_model, rows, cpu)
    assert step_model.metric(batch).tolist() == pytest.approx(alone, rel=1e-4)
    assert float(step_model.metric(batch).sum()) == pytest.approx(float(step_model(batch).detach()), rel=1e-5)


def a_step_model(folder: Path, loss: Any) -> StepModel:
    from contextlib import nullcontext

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model: Any = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    return StepModel(model.eval(), loss, nullcontext)


@pytest.mark.parametrize(
    ("rate", "steps", "answer", "improved", "words"),
    [
        (5e-3, 20, "this is {}", True, "the held-out loss improved: lower by"),
        (1e-8, 1, "this is {}", False, "the held-out loss did not improve beyond noise: no difference seen"),
        (2e-2, 60, "Q", False, "the held-out loss got worse: higher by"),
    ],
)
def test_a_run_says_whether_it_beat_its_base(
    recipe: Recipe, train: Train, tmp_path: Path, rate: float, steps: int, answer: str, improved: bool, words: str
) -> None:
    learnt, held = tmp_path / "learnt.jsonl", tmp_path / "held.jsonl"
    for path, numbers, text in ((learnt, range(80), answer), (held, range(80, 100), "this is {}")):
        table = [{"prompt": f"say {n}", "completion": text.format(n)} for n in numbers]
        path.write_text("\n".join(json.dumps(row) for row in table))
    turned = recipe.with_("data.path", str(learnt)).with_("data.eval_path", str(held)).with_("train.steps", steps)
    run = train(turned.with_("eval.rows", 20).with_("train.learning_rate", rate))
    history = history_of(run)
    summary = summary_of(run, history, run_status(run))
    gain = summary["gain"]
    assert gain["improved"] is improved and gain["words"].startswith(words), gain
    # What does not beat its base says what to try, as a recipe that can be trained.
    assert bool(summary["next"]) is not improved
    assert all(
        not recipe.with_(path, value).problems() for one in summary["next"] for path, value in one["settings"].items()
    )
    first, last = history.evals[0], history.evals[-1]
    assert gain["value"] == pytest.approx(last.loss - first.loss, abs=1e-6)
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert first.gain is None


def test_a_run_on_few_rows_says_that_it_cannot_tell(recipe: Recipe, train: Train) -> None:
    few, none = train(recipe), train(recipe.with_("eval.rows", 0))
    summaries = [summary_of(run, history_of(run), run_status(run)) for run in (few, none)]
    gains = [summary["gain"] for summary in summaries]
    assert all("find more rows: 15 rows" in summary["next"][0]["words"] for summary in summaries)
    assert [gain["improved"] for gain in gains] == [None, None]
    assert "6 rows are too few" in gains[0]["words"]
    assert "no held-out loss was measured" in gains[1]["words"]
