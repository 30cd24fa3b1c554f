"""Answers of an audit: what each form writes is what transformers and peft alone would write, and it is scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer

from studio.core.recipe import Recipe
from studio.jobs.audit import answers as answers_job
from studio.jobs.audit.answer_models import AnswerModels
from studio.probe.adapter_folder import find_adapter
from studio.probe.audit import audit_of_run
from studio.probe.models import find_base
from studio.runs.control import request as ask
from studio.runs.control import withdraw
from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.audit_cases import audit, rounded, whole_model
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_audit_run import cast, merged

FORMS = ["base", "tuned, 16-bit", "tuned, nf4+dq", "merged, 16-bit"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Forty chats whose answers are JSON."""
    path = tmp_path / "data.jsonl"
    table = [{"prompt": f"give {n}", "completion": json.dumps({"n": n % 4})} for n in range(40)]
    path.write_text("\n".join(json.dumps(row) for row in table))
    return path


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("half") / "tiny", dtype=torch.bfloat16)


@pytest.fixture
def trained(recipe: Recipe, half: Path, train: Train) -> RunPaths:
    """A QLoRA run that learnt the form of the answers."""
    turned = recipe.with_("model.base", str(half)).with_("train.steps", 60).with_("eval.rows", 10)
    return train(turned.with_("method", "qlora"))


def asking(trained: RunPaths, **more: Any) -> AuditRequest:
    return audit_of_run(trained, **{"answers": 3, "answer_tokens": 12, "rows": 4, "speed": False, **more})


@torch.no_grad()
def plain_answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model finds most likely, token by token, without a cache."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    begun = ids.shape[1]
    for _ in range(12):
        token = model(input_ids=ids).logits[0, -1].argmax()
        if int(token) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token[None, None]], dim=1)
    return str(tokenizer.decode(ids[0, begun:], skip_special_tokens=True)).strip()


@pytest.fixture
def report(trained: RunPaths, tmp_path: Path) -> dict[str, Any]:
    _, made = audit(tmp_path / "audit", asking(trained, check_regex=r'"n": (\d)'))
    return made


@pytest.mark.slow
def test_every_form_answers_as_it_would_alone(report: dict[str, Any], trained: RunPaths, half: Path) -> None:
    found = report["answers"]
    assert [form["name"] for form in found["forms"]] == FORMS
    assert not any(form["why_not"] for form in found["forms"])
    assert (found["trained"], found["reference"], found["dtype"]) == ("tuned, nf4+dq", "tuned, nf4+dq", "float32")

    def tuned(base: Any) -> Any:
        return PeftModel.from_pretrained(base, str(trained.adapter)).eval()

    tokenizer = AutoTokenizer.from_pretrained(trained.adapter)
    models = {
        "base": whole_model(half),
        "tuned, 16-bit": tuned(whole_model(half)),
        "tuned, nf4+dq": tuned(whole_model(half, rounded("nf4+dq"))),
        "merged, 16-bit": cast(merged(whole_model(half), trained)),
    }
    assert len(found["rows"]) == 3
    for row in found["rows"]:
        for name, model in models.items():
            assert row["answers"][name]["text"] == plain_answer(model, tokenizer, row["prompt"]), name


@pytest.mark.slow
@torch.no_grad()
def test_streamed_forms_answer_the_same(trained: RunPaths) -> None:
    recipe = read_job(trained, Recipe)
    assert recipe is not None
    base, adapter = find_base(recipe.model.base), find_adapter(trained.adapter)
    whole, streamed = (
        AnswerModels(base, adapter, recipe.with_("model.stream", layers), dtype=torch.float32).forms([])
        for layers in ("off", 2)
    )
    ids = torch.arange(5, 12)[None]
    for one, other in zip(whole, streamed, strict=True):
        assert torch.equal(one.open().eval()(ids).logits, other.open().eval()(ids).logits), one.name


@pytest.mark.slow
def test_rules_follow_from_the_held_out_answers(report: dict[str, Any]) -> None:
    checks = {check["name"]: check for check in report["answers"]["checks"]}
    assert list(checks) == [
        "ends by itself",
        "exact match",
        "word F1",
        "valid JSON",
        "same keys",
        "same JSON",
        "regex agrees",
    ]
    valid = checks["valid JSON"]["scores"]
    assert valid["tuned, nf4+dq"]["mean"]["value"] > valid["base"]["mean"]["value"], "it learnt to write JSON"
    for row in report["answers"]["rows"]:
        given = row["answers"]["tuned, nf4+dq"]
        assert given["scores"]["same JSON"] == float(given["text"] == row["expected"])
        assert given["stopped"] and given["tokens"] <= 12


@pytest.mark.slow
def test_a_stopped_one_goes_on_after_its_last_answer(
    trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request, root, asked = asking(trained), tmp_path / "audit", []
    real = answers_job.greedy

    def stopping(model: Any, ids: Any, **more: Any) -> list[int]:
        asked.append(list(ids))
        if len(asked) == 5:
            ask(RunPaths(root), "stop")
        return real(model, ids, **more)

    monkeypatch.setattr(answers_job, "greedy", stopping)
    paths, report = audit(root, request)
    assert not report and history_of(paths).finished.outcome == "stopped"  # type: ignore[union-attr]
    withdraw(paths, "stop")
    monkeypatch.setattr("studio.jobs.audit.run_audit.audit_forms", None)  # its figures are there already
    _, report = audit(root, request)
    assert len(asked) == 5 + (4 * 3 - 4), "four whole answers were kept, the fifth is asked again"
    assert len(report["answers"]["rows"]) == 3 and report["variants"]
    assert not (root / "audit").exists()


@pytest.mark.slow
def test_a_form_that_does_not_fit_is_left_out_and_said(
    trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def why_not(self: AnswerModels, form: Any) -> str:
        return "" if form.name == "tuned, nf4+dq" else "needs about 30.0 GB of memory, 20.0 GB are free"

    monkeypatch.setattr(AnswerModels, "why_not", why_not)
    paths, report = audit(tmp_path / "audit", asking(trained))
    left_out = [form["name"] for form in report["answers"]["forms"] if form["why_not"]]
    assert left_out == ["base", "tuned, 16-bit", "merged, 16-bit"]
    assert set(report["answers"]["rows"][0]["answers"]) == {"tuned, nf4+dq"}
    assert sum("gives no answers" in warned.message for warned in history_of(paths).warnings) == 3


@pytest.mark.slow
def test_merged_folders_answer_too(trained: RunPaths, half: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    merged(whole_model(half), trained).save_pretrained(folder)  # type: ignore[operator]
    AutoTokenizer.from_pretrained(trained.adapter).save_pretrained(folder)
    _, report = audit(tmp_path / "audit", asking(trained, merged=(str(folder),)))
    for row in report["answers"]["rows"]:
        assert row["answers"]["given: mine"]["text"] == row["answers"]["tuned, 16-bit"]["text"]


@pytest.mark.slow
def test_plain_text_has_no_held_out_answer(recipe: Recipe, train: Train, tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"row {n} says {n} and nothing more"}) for n in range(20)))
    run = train(recipe.with_("data.path", str(path)).with_("eval.rows", 4))
    _, report = audit(tmp_path / "audit", asking(run, answers=2))
    assert [check["name"] for check in report["answers"]["checks"]] == ["ends by itself"]
    assert report["answers"]["trained"] == "tuned, 16-bit"


@pytest.mark.slow
def test_answers_that_cannot_be_had_do_not_cost_the_figures(
    trained: RunPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AnswerModels, "why_not", lambda self, form: "too large")
    paths, report = audit(tmp_path / "audit", asking(trained))
    assert report["variants"] and "no form of the model could be loaded" in report["answers"]["why_not"]
    assert any("answers left out" in warned.message for warned in history_of(paths).warnings)
