import json
import tomllib
from pathlib import Path

import pytest

from studio.runs.recipe_file import load_recipe
from tests.cli.conftest import Cli

_AXOLOTL = """# a comment
base_model: owner/model
adapter: qlora
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: chat_template
val_set_size: 0.25
learning_rate: 2e-4
micro_batch_size: 2
neftune_noise_alpha: 5
wandb_project:
logging_steps: 1
"""


def _rows(count: int) -> None:
    text = "".join(json.dumps({"prompt": f"q {n}", "completion": f"a {n}"}) + "\n" for n in range(count))
    Path("rows.jsonl").write_text(text)


def test_a_configuration_becomes_a_recipe_that_is_planned(cli: Cli, home: Path) -> None:
    _rows(40)
    Path("theirs.yml").write_text(_AXOLOTL)
    outcome = cli("import", "theirs.yml", "--out", "mine.toml")
    assert outcome.code == 0
    recipe = load_recipe(Path("mine.toml"))
    assert (recipe.name, recipe.method, recipe.model.base) == ("theirs", "qlora", "owner/model")
    assert (recipe.train.micro_batch, recipe.train.learning_rate) == (2, 2e-4)
    assert recipe.eval.rows == 10
    assert recipe.data.path == str(Path("rows.jsonl").resolve())
    text = Path("mine.toml").read_text()
    assert text.startswith("# From axolotl's theirs.yml")
    assert "# not carried: neftune_noise_alpha = 5" in text
    assert "wandb" not in text + outcome.out
    assert "neftune_noise_alpha = 5 (line 11)" in outcome.out
    assert "next: lora-studio plan mine.toml" in outcome.out
    again = cli("import", "theirs.yml", "--out", "mine.toml")
    assert (again.code, Path("mine.toml").read_text()) == (2, text)
    assert "there already" in again.err


def test_without_out_the_recipe_is_printed_and_the_report_told_beside_it(cli: Cli, home: Path) -> None:
    Path("theirs.yml").write_text(_AXOLOTL)
    outcome = cli("import", "theirs.yml", "--model", "embedded", "--data", "embedded", "--set", "eval.rows=20")
    assert outcome.code == 0
    table = tomllib.loads(outcome.out)
    assert (table["model"]["base"], table["data"]["path"], table["eval"]["rows"]) == ("embedded", "embedded", 20)
    assert "not carried, and the training differs" in outcome.err
    document = cli("import", "theirs.yml", "--json").document
    assert document["tool"] == "axolotl"
    rate = next(one for one in document["carried"] if one["field"] == "train.learning_rate")
    assert (rate["value"], rate["from"], rate["line"], rate["default"]) == (2e-4, "learning_rate", 9, False)
    left = {one["key"]: one for one in document["left"]}
    assert (left["neftune_noise_alpha"]["matters"], left["logging_steps"]["matters"]) == (True, False)
    assert document["recipe"]["train"]["seed"] == 42
    assert document["problems"] == []


def test_llama_factorys_data_is_found_from_its_folder(cli: Cli, home: Path) -> None:
    for folder in ("repo/examples/lora", "repo/data"):
        Path(folder).mkdir(parents=True)
    Path("repo/data/dataset_info.json").write_text(json.dumps({"mine": {"file_name": "own.json"}}))
    settings = {"model_name_or_path": "owner/model", "stage": "sft", "dataset": "mine", "template": "llama3"}
    Path("repo/examples/lora/sft.json").write_text(json.dumps(settings))
    recipe = cli("import", "repo/examples/lora/sft.json", "--json").document["recipe"]
    assert recipe["data"]["path"] == str(Path("repo/data/own.json").resolve())
    assert recipe["data"]["template"] == "llama3"


def test_a_script_or_notebook_is_read_and_never_run(cli: Cli, home: Path) -> None:
    script = (
        "from trl import SFTTrainer\nopen('ran', 'w')\nmodel = 'owner/model'\n"
        "SFTTrainer(model, train_dataset=load_dataset('owner/data'), peft_config=LoraConfig(r=4))\n"
    )
    Path("it.py").write_text(script)
    cells = [
        {"cell_type": "code", "source": ["%%capture\n", "nothing"]},
        {"cell_type": "markdown", "source": ["not ("]},
        {"cell_type": "code", "source": ["!pip install trl\n", script]},
    ]
    Path("it.ipynb").write_text(json.dumps({"cells": cells}))
    for name in ("it.py", "it.ipynb"):
        recipe = cli("import", name, "--json").document["recipe"]
        assert (recipe["adapter"]["rank"], recipe["data"]["path"]) == (4, "owner/data")
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("name", "text", "code", "word"),
    [
        ("it.yml", "services: {}\n", 2, "it.yml holds services"),
        ("it.yml", "base_model: [", 2, "cannot be read"),
        ("it.yml", "a: &x [1]\nb: [" + "*x, " * 30 + "]", 2, "aliases"),
        ("it.yml", "- 1", 2, "no table"),
        ("it.yml", "!!python/object/apply:os.system ['touch ran']", 2, "cannot be read"),
        ("it.json", "{", 2, "cannot be read"),
        ("it.py", "print(1)", 2, "no trainer"),
        ("it.ipynb", "[]", 2, "no notebook"),
        ("it.yml", "base_model: a/b\nadapter: lora", 2, "give --data"),
        ("it.py", "SFTTrainer(model=chosen(), train_dataset=load_dataset('o/d'))", 2, "give --model"),
        ("it.yml", "base_model: a/b\nrl: kto", 1, "kto"),
    ],
)
def test_what_cannot_be_carried_is_refused_with_the_reason(
    cli: Cli, home: Path, name: str, text: str, code: int, word: str
) -> None:
    Path(name).write_text(text)
    outcome = cli("import", name)
    assert (outcome.code, outcome.out) == (code, "")
    assert word in outcome.err
    assert not Path("ran").exists()
