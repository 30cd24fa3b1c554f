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
from studio.probe.known_models import known_models, known_names
from studio.runs.recipe_file import load_recipe, shipped_recipes
from tests.fakes.hub import hub
from tests.fakes.model import model_folder

NOT_PUBLISHED = {
    "mistralai/Ministral-3-8B-Reasoning-2512",
    "HuggingFaceTB/SmolLM2-135M-Instruct",  # measured models have its count: tests/data/model_configs.json
}
"""No source that can be named was found for the parameters of these checkpoints, to the last one: the class that
transformers builds of them counts them (tests/jobs/test_known_models_built.py)."""
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
    published = entry.get("checkpoint")
    assert (published is None) == (repo in NOT_PUBLISHED)
    if published:
        assert published.get("beside", 0) == beside_the_class(entry["config"])
        if "vision_config" not in entry["config"]:  # towers are counted in the class that transformers builds
            assert published["parameters"] == entry["parameters"] + published.get("beside", 0)
    assert entry["sources"]
    for source in [*entry["sources"], *filter(None, [published])]:
        assert source["source"].startswith("https://github.com/")
        assert re.fullmatch("[0-9a-f]{40}", source["commit"])
    assert entry.get("gated", {"source": "https://github.com/"})["source"].startswith("https://github.com/")


def beside_the_class(config: dict[str, Any]) -> int:
    """Return what a checkpoint holds that no class loads: a layer that predicts a further token, and what it needs.

    That is one more layer, a map of two hidden states to one, and three norms. GLM's also has an embedding and a head
    of its own, and the checkpoint counts the numbers by which the routers' choices are balanced.
    """
    text = config.get("text_config", config)
    if not (text.get("mtp_num_hidden_layers") or text.get("num_nextn_predict_layers")):
        return 0
    one_more = text | {"num_hidden_layers": text["num_hidden_layers"] + 1}
    if "layer_types" in text:
        one_more["layer_types"] = [*text["layer_types"], "full_attention"]
    layer = shape_from_config(one_more).parameters - shape_from_config(text).parameters
    hidden = text["hidden_size"]
    own = 0
    if text.get("num_nextn_predict_layers"):
        balanced = text["n_routed_experts"] * (one_more["num_hidden_layers"] - text["first_k_dense_replace"])
        own = 2 * text["vocab_size"] * hidden + balanced
    return layer + 2 * hidden * hidden + 3 * hidden + own


def test_sixty_models_and_more_are_known_by_every_name_that_a_source_gives_them() -> None:
    assert len(known_models()) >= 60
    assert len(known_names()) == sum(1 + len(entry.get("also", ())) for entry in known_models().values())
    twin = known_names()["meta-llama/llama-3.1-8b-instruct"]
    assert (twin.repo, twin.parameters, twin.gated) == ("meta-llama/Llama-3.1-8B-Instruct", 8_030_261_248, True)
    assert not known_names()["deepseek-ai/deepseek-r1-distill-llama-8b"].gated, "made of a gated model, by others"


def test_offline_a_known_model_is_planned_from_the_shipped_config_and_says_so(tmp_path: Path) -> None:
    asked = ((LLAMA, ""), (LLAMA, "main"), ("owner/unknown", ""), ("qwen/qwen3-8b", ""), ("meta-llama/Lama-3.1-8B", ""))
    known, pinned, unknown, open_to_all, misspelt = look(tmp_path, *asked, offline=True)
    assert known["hidden"] == 4096
    assert known["origin"].startswith("the config is this program's own copy, not asked of the hub now: offline mode")
    # A plan of a gated model works without a token, and says what a training will want.
    assert f"before a training accept its terms at https://huggingface.co/{LLAMA}, then run: hf auth" in known["origin"]
    assert "no token is known on this computer" in known["origin"]
    assert open_to_all["hidden"] == 4096
    assert "gated" not in open_to_all["origin"]
    assert "Names like it that this program knows: meta-llama/Llama-3.1-8B" in misspelt["error"]
    assert "cannot be found" in pinned["error"], "another revision may be another model"
    assert "cannot be found" in unknown["error"]


def test_a_gated_model_is_planned_before_its_terms_are_accepted(tmp_path: Path) -> None:
    with hub(LLAMA, model_folder(tmp_path / "it"), status=403, error_code="GatedRepo") as (endpoint, _):
        (found,) = look(tmp_path, (LLAMA, ""), endpoint=endpoint)
    assert found["hidden"] == 4096
    assert found["origin"].startswith(
        "the config is this program's own copy, not asked of the hub now: it is gated there. The model is gated: a "
        f"plan does not mind, but before a training accept its terms at https://huggingface.co/{LLAMA}, then run: hf"
    )


def test_a_training_on_a_gated_model_is_told_the_way_and_that_a_plan_needs_none_of_it(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    refusals = []
    with hub(LLAMA, model_folder(tmp_path / "it"), status=403, error_code="GatedRepo") as (endpoint, _):
        for token in ("", "hf_never_shown"):
            (tmp_path / "hf" / "token").write_text(token)
            settings = {"HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": endpoint}
            code = f"from studio.probe.models import find_base\nfind_base({LLAMA!r})"
            done = subprocess.run(
                [sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True, check=False
            )
            refusals.append(done.stderr.strip().splitlines()[-1])
    assert f"is gated: accept its terms at https://huggingface.co/{LLAMA}, then run: hf auth login" in refusals[0]
    assert f"accept its terms at https://huggingface.co/{LLAMA}, with the account of the token" in refusals[1]
    for refusal in refusals:
        assert f"Without the hub it can be planned: lora-studio plan --model {LLAMA} --gpu NAME." in refusal
        assert "hf_never_shown" not in refusal


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
