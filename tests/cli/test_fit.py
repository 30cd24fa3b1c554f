"""`lora-studio fit`: exit codes, one JSON document, words that can be pasted."""

import json
from pathlib import Path

import pytest

from studio.commands import card_flags
from studio.probe.device import Sight
from tests.cli.conftest import Cli
from tests.core.published_rows import DATA


@pytest.fixture
def heavy(home: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(card_flags, "look", lambda: Sight(None))
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


def test_a_recipe_that_fills_the_card(cli: Cli, heavy: str) -> None:
    words = ("fit", heavy, "--model", "config.json", "--gpu", "4070", "--set", "train.loss=chunked", "--ram-gib", "64")
    speed, fidelity, room = (cli(*words, "--for", aim, "--json").document for aim in ("speed", "fidelity", "room"))
    for document in (speed, fidelity, room):
        assert document["fits"]
        assert document["plan"]["high_bytes"] <= document["plan"]["budget_bytes"]
        assert document["quality"].startswith("not measured")
        rows = document["recipe"]["train.micro_batch"] * document["recipe"]["train.accumulation"]
        assert rows == 4 * 8
        assert all(other["recipe"] != document["recipe"] for other in document["runners_up"])
    assert (speed["recipe"]["method"], speed["recipe"]["model.stream"]) == ("qlora", "off")
    assert (fidelity["recipe"]["method"], fidelity["recipe"]["model.stream"]) == ("lora", 32)
    assert fidelity["plan"]["host_bytes"] > 13 * 2**30
    assert "32 of 32 layers in main memory" in fidelity["bought"][0]["words"]
    assert room["plan"]["high_bytes"] < speed["plan"]["high_bytes"]
    assert cli(*words[:-1], "8", "--for", "fidelity", "--json").document["recipe"]["method"] == "qlora", "in 8 GiB"


def test_the_words_of_a_plan_can_be_pasted(cli: Cli, heavy: str) -> None:
    words = (heavy, "--model", "config.json", "--gpu", "4090")
    outcome = cli("fit", *words, "--for", "speed")
    assert outcome.code == 0
    assert "layers keep their activations" in outcome.out
    assert "quality: not measured" in outcome.out
    line = next(line for line in outcome.out.splitlines() if line.startswith("try: "))
    assert cli("plan", *words, *line.removeprefix("try: ").split()).code == 0
    assert cli("fit", *words[:3], "--vram-gib", "2", "--for", "room", "--ram-gib", "1").code == 1
    assert cli("fit", *words, "--ram-gib", "64").code == 2
