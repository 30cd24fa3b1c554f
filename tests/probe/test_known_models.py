"""What is planned of hub models that the hub does not tell of: shipped configs, configs of an earlier look."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from studio.core.recipe import EMBEDDED
from studio.core.shape_from_config import shape_from_config
from studio.probe.known_models import known_models
from studio.runs.recipe_file import load_recipe, shipped_recipes
from tests.core.published_rows import DATA
from tests.fakes.hub import hub
from tests.fakes.model import model_folder

PUBLISHED = {
    config["_parameters"]: name
    for name, config in json.loads((DATA / "model_configs.json").read_text("utf-8")).items()
    if "_parameters" in config
}
COUNTED_BY_THE_CLASS = {
    *("Qwen/Qwen3.5-9B", "Qwen/Qwen3.5-35B-A3B", "google/gemma-4-26B-A4B-it", "google/gemma-4-31B-it"),
    *("mistralai/Ministral-3-8B-Reasoning-2512", "LiquidAI/LFM2-1.2B", "LiquidAI/LFM2-8B-A1B", "zai-org/GLM-4.7-Flash"),
}
"""No source tells how many parameters these have, to the last one: tests/jobs/test_known_models_built.py counts them
in the class that transformers builds of the config."""
LLAMA = "meta-llama/Llama-3.1-8B"
FIND = """
import json, sys
from studio.core.errors import BadInput
from studio.probe.shape import find_shape
found = []
for word, revision in json.loads(sys.argv[1]):
    try:
        shape = find_shape(word, revision)
        found.append({"hidden": shape.hidden, "origin": shape.origin})
    except BadInput as error:
        found.append({"error": str(error)})
print(json.dumps(found))
"""


def look(tmp_path: Path, *asked: tuple[str, str], endpoint: str = "", offline: bool = False) -> list[dict[str, Any]]:
    """Look in a process of its own, as the hub's client reads its settings when it is imported."""
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": str(int(offline))}
    settings["HF_ENDPOINT"] = endpoint or "http://127.0.0.1:9"
    command = [sys.executable, "-c", FIND, json.dumps(asked)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=True)
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_every_model_that_a_shipped_recipe_names_is_known() -> None:
    named = {load_recipe(path).model.base for path in shipped_recipes().values()}
    assert len(named) > 5
    assert named <= {EMBEDDED, *known_models()}


@pytest.mark.parametrize("repo", sorted(known_models()))
def test_a_shipped_config_comes_to_the_published_parameters_and_says_where_it_was_read(repo: str) -> None:
    entry = known_models()[repo]
    shape = shape_from_config(entry["config"])
    assert shape.parameters == entry["parameters"]
    assert shape.doubts == ()
    assert (shape.quantised is None) == ("quantization_config" not in entry["config"])
    # Not among the models that were measured: llama.cpp counts 14770033664 in its GGUF files of Qwen2.5-14B.
    published = entry["parameters"] in PUBLISHED or "checkpoint" in entry
    assert published != (repo in COUNTED_BY_THE_CLASS or repo == "Qwen/Qwen2.5-14B-Instruct")
    if published and "vision_config" not in entry["config"]:
        assert entry.get("checkpoint", entry)["parameters"] == entry["parameters"]
    assert entry["sources"]
    for source in [*entry["sources"], *filter(None, [entry.get("checkpoint")])]:
        assert source["source"].startswith("https://github.com/")
        assert re.fullmatch("[0-9a-f]{40}", source["commit"])


def test_offline_a_known_model_is_planned_from_the_shipped_config_and_says_so(tmp_path: Path) -> None:
    known, pinned, unknown = look(tmp_path, (LLAMA, ""), (LLAMA, "main"), ("owner/unknown", ""), offline=True)
    assert known["hidden"] == 4096
    assert known["origin"].startswith("the config is this program's own copy, not asked of the hub now: offline mode")
    assert "cannot be found" in pinned["error"], "another revision may be another model"
    assert "cannot be found" in unknown["error"]


def test_a_gated_model_is_planned_before_its_terms_are_accepted(tmp_path: Path) -> None:
    with hub(LLAMA, model_folder(tmp_path / "it"), status=403, error_code="GatedRepo") as (endpoint, _):
        (found,) = look(tmp_path, (LLAMA, ""), endpoint=endpoint)
    assert found == {
        "hidden": 4096,
        "origin": "the config is this program's own copy, not asked of the hub now: it is gated there",
    }


def test_the_hub_wins_where_it_answers_and_what_it_said_wins_afterwards(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "it")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(known_models()[LLAMA]["config"] | {"hidden_size": 2048}))
    with hub(LLAMA, folder) as (endpoint, _):
        (asked,) = look(tmp_path, (LLAMA, ""), endpoint=endpoint)
    assert asked == {"hidden": 2048, "origin": ""}
    (later,) = look(tmp_path, (LLAMA, ""))
    assert later["hidden"] == 2048
    assert later["origin"].startswith("the config is the hub's of an earlier look, not asked of the hub now: ")
