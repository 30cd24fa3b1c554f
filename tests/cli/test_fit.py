"""`lora-studio fit`: exit codes, one JSON document, words that can be pasted."""

import json
from pathlib import Path

import pytest

from studio.commands import plan as plan_verb
from studio.probe.device import Sight
from tests.cli.conftest import Cli
from tests.core.published_rows import DATA


@pytest.fixture
def heavy(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(plan_verb, "look", lambda: Sight(None))
    configs = json.loads((DATA / "model_configs.json").read_text(encoding="utf-8"))
    Path("config.json").write_text(json.dumps(configs["Llama-3.1-8B"]))
    path = Path("heavy.toml")
    path.write_text("method = 'lora'\n[train]\nmicro_batch = 4\nseq_len = 4096\nrecompute = 'none'\nloss = 'full'\n")
    return str(path)


def test_the_document(cli: Cli, heavy: str) -> None:
    outcome = cli("fit", heavy, "--model", "config.json", "--gpu", "4090", "--json")
    document = outcome.document
    assert (outcome.code, outcome.err, document["fits"]) == (0, "", True)
    assert document["plan"]["high_bytes"] <= document["plan"]["budget_bytes"]
    assert document["recipe"]["train"]["recompute"] == "all"
    assert all(change["saves_bytes"] > 0 and change["why"] for change in document["changes"])


def test_the_words_can_be_pasted_into_plan(cli: Cli, heavy: str) -> None:
    outcome = cli("fit", heavy, "--model", "config.json", "--gpu", "4070")
    assert outcome.code == 0
    line = next(line for line in outcome.out.splitlines() if line.startswith("try: "))
    plan = cli("plan", heavy, "--model", "config.json", "--gpu", "4070", *line.removeprefix("try: ").split())
    assert plan.code == 0, plan


def test_nothing_fits(cli: Cli, heavy: str) -> None:
    outcome = cli("fit", heavy, "--model", "config.json", "--vram-gib", "2")
    assert outcome.code == 1
    assert "nothing fits" in outcome.out
    assert "smallest cards" in outcome.out


def test_it_fits_as_it_is(cli: Cli, heavy: str) -> None:
    outcome = cli("fit", "demo", "--vram-gib", "24")
    assert outcome.code == 0
    assert "fits as it is" in outcome.out


def test_without_a_card_one_must_be_named(cli: Cli, heavy: str) -> None:
    outcome = cli("fit", heavy, "--model", "config.json")
    assert outcome.code == 2
    assert "--gpu" in outcome.err
