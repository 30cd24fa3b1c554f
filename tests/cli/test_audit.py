"""`lora-studio audit`: what it asks the job for, what it shows of a report, what it refuses before there is a job."""

from pathlib import Path

import pytest

from studio.runs.job import read_job
from studio.runs.layout import RunPaths
from studio.runs.requests import AuditRequest
from tests.cli.conftest import Cli
from tests.fakes.model import model_folder


def asked(document: dict[str, str]) -> AuditRequest:
    request = read_job(RunPaths(Path(document["path"])), AuditRequest)
    assert isinstance(request, AuditRequest)
    return request


@pytest.fixture
def model(tmp_path: Path) -> str:
    return str(model_folder(tmp_path / "model"))


def test_a_base_is_measured_on_the_rows_of_a_file(cli: Cli, recipe: Path, model: str) -> None:
    outcome = cli("audit", "base", "--model", model, "--data", "rows.jsonl", "--rows", "7", "--json")
    assert outcome.code == 0, outcome.err
    request = asked(outcome.document)
    assert (request.what, request.model, request.rows, request.seed) == ("base", model, 7, 17)
    assert request.data == str(Path("rows.jsonl").absolute())
    assert outcome.document["report"]["what"] == "base"
    assert outcome.document["status"] == "finished"


def test_tables_and_advice_are_shown_with_their_intervals(cli: Cli, recipe: Path, model: str) -> None:
    outcome = cli("audit", "base", "--model", model, "--data", "rows.jsonl")
    assert outcome.code == 0, outcome.err
    for wanted in ("2.1000 (2.0000-2.2000)", "+0.1000 (+0.0500 to +0.1500)", "KL", "model.layers.1", "Why: "):
        assert wanted in outcome.out
    assert "40 tokens of 4 rows" in outcome.out


def test_a_run_brings_its_own_base_data_and_split(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("audit", "run", run, "--json")
    assert outcome.code == 0, outcome.err
    request = asked(outcome.document)
    assert (request.what, request.model, request.rows) == ("run", "embedded", 4)
    assert Path(request.run).name == run
    assert (outcome.document["rows"], outcome.document["held_out_rows"]) == (4, 5)
    shown = cli("audit", "show", outcome.document["run"], "--json").document
    assert (shown["rows"], shown["held_out_rows"]) == (4, 5)
    page = " ".join(cli("audit", "show", outcome.document["run"]).out.split())
    assert "Measured on 4 of the 5 rows that the run mine held out of rows.jsonl" in page
    assert "was trained on these rows is not known" in page and "\x1b" not in page
    assert request.data == str(Path("rows.jsonl").absolute())


def test_a_run_that_says_nothing_of_its_rows_is_not_audited(cli: Cli, recipe: Path, home: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    (home / "runs" / run / "held_out.json").unlink()
    outcome = cli("audit", "run", run)
    assert outcome.code == 2
    assert "has no record of its held-out rows" in outcome.err and "Train it again" in outcome.err
    assert not list(home.glob("runs/audit*"))


def test_answers_are_asked_for_and_shown(cli: Cli, recipe: Path, tmp_path: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    words = ("--gguf", "my.gguf", "--no-speed", "--answers", "5", "--answer-tokens", "20", "--check-regex", r"\d+")
    outcome = cli("audit", "run", run, *words)
    assert outcome.code == 0, outcome.err
    for wanted in ("Answers to 2 held-out prompts", "-50 points (-70 to -30)", "say 1", "uno", "lower in exact match"):
        assert wanted in outcome.out
    request = asked(cli("audit", "run", run, *words, "--json").document)
    assert (request.answers, request.answer_tokens, request.check_regex) == (5, 20, r"\d+")
    assert (request.gguf, request.speed) == ((str(Path("my.gguf").absolute()),), False)


def test_a_pattern_that_is_none_is_refused(cli: Cli, recipe: Path) -> None:
    run = cli("train", str(recipe), "--json").document["run"]
    outcome = cli("audit", "run", run, "--answers", "5", "--check-regex", "(")
    assert outcome.code == 2
    assert "no regular expression" in outcome.err


def test_a_report_is_shown_again_and_written(cli: Cli, recipe: Path, model: str, tmp_path: Path) -> None:
    audit = cli("audit", "base", "--model", model, "--data", "rows.jsonl", "--json").document["run"]
    outcome = cli("audit", "show", audit, "--out", str(tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert "2.1000 (2.0000-2.2000)" in outcome.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["report.json", "report.md"]
    again = cli("audit", "show", audit, "--out", str(tmp_path / "out"))
    assert again.code == 2 and "holds report.md already" in again.err
    document = cli("audit", "show", audit, "--json").document
    assert document["report"]["what"] == "base" and document["files"] == []
    report = Path(document["path"]) / "report.json"
    report.write_text('{"what": "base", "variants": 3}')
    damaged = cli("audit", "show", audit)
    assert damaged.code == 2 and "is damaged" in damaged.err
    run = cli("train", str(recipe), "--json").document["run"]
    none = cli("audit", "show", run)
    assert none.code == 2 and "no audit's report" in none.err


def test_a_race_carries_its_recipe(cli: Cli, recipe: Path) -> None:
    outcome = cli("audit", "race", str(recipe), "--steps", "3", "--json")
    assert outcome.code == 0, outcome.err
    request = asked(outcome.document)
    assert request.what == "race"
    assert request.recipe is not None and request.recipe.train.steps == 3
    assert request.lanes == ("lora", "qlora")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("base", "--model", "MODEL", "--data", "nothing.jsonl"), "does not exist"),
        (("base", "--model", "/no/model", "--data", "rows.jsonl"), "no model folder"),
        (("base", "--model", "MODEL", "--data", "rows.jsonl", "--rows", "many"), "rows: found many"),
        (("base", "--model", "MODEL", "--data", "rows.jsonl", "--rows", "1"), "wanted a whole number, 2 or more"),
        (("base", "--model", "MODEL", "--data", "rows.jsonl", "--keep", "worst"), "keep: found worst"),
        (("run", "nothing"), "there is no run 'nothing'"),
        (("race", "nothing"), "nothing"),
        (("race", "demo", "--lanes", "lora,sideways"), "lanes: found lora,sideways; wanted two or more of lora, qlora"),
        (("race", "demo", "--lanes", "lora"), "lanes: found lora; wanted two or more of lora, qlora"),
        (("race", "demo", "--lanes", "qlora,qlora"), "wanted two or more of lora, qlora, qlora+loftq, qlora+mixed"),
        ((), "WHAT"),
    ],
)
def test_bad_input_is_refused_before_there_is_a_run(
    cli: Cli, recipe: Path, model: str, home: Path, words: tuple[str, ...], wanted: str
) -> None:
    outcome = cli("audit", *(model if word == "MODEL" else word for word in words))
    assert outcome.code == 2
    assert wanted in " ".join(outcome.err.split())
    assert not list(home.glob("runs/audit*"))


def test_a_quantised_base_has_nothing_to_be_compared_with(cli: Cli, recipe: Path, model: str) -> None:
    config = Path(model) / "config.json"
    config.write_text(config.read_text()[:-1] + ', "quantization_config": {"quant_method": "gptq"}}')
    outcome = cli("audit", "base", "--model", model, "--data", "rows.jsonl")
    assert outcome.code == 2
    assert "quantised already (gptq)" in outcome.err


def test_an_audit_that_failed_says_why(cli: Cli, recipe: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_AUDIT_FAILS", "1")
    outcome = cli("audit", "base", "--model", model, "--data", "rows.jsonl", "--json")
    assert outcome.code == 1
    assert outcome.document["report"] is None
    assert outcome.document["failure"]["kind"] == "not_block_by_block"
