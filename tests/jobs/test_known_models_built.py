"""The shipped configs against the classes that transformers builds of them, on the meta device."""

from typing import Any

import pytest
import torch
from transformers.initialization import no_init_weights
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from studio.core.shape_from_config import shape_from_config
from studio.jobs.base.model_class import model_class
from studio.probe.known_models import known_models

# Quick tests build the smallest of each class, slow ones all of them.
SMALLEST = {
    entry["config"]["architectures"][0]: repo
    for repo, entry in sorted(known_models().items(), key=lambda item: -item[1]["parameters"])
}
BUILT = [
    pytest.param(repo, marks=() if repo in SMALLEST.values() else pytest.mark.slow) for repo in sorted(known_models())
]


@pytest.mark.parametrize("repo", BUILT)
def test_the_class_of_a_shipped_config_has_its_parameters_and_with_towers_those_of_the_checkpoint(repo: str) -> None:
    entry = known_models()[repo]
    table: dict[str, Any] = {key: value for key, value in entry["config"].items() if key != "quantization_config"}
    found = model_class(CONFIG_MAPPING[table["model_type"]].from_dict(table))
    assert found.kind.__name__ in table["architectures"]
    with torch.device("meta"), no_init_weights():
        model = found.whole_kind()(found.config)
    sizes = {name: weight.numel() for name, weight in model.named_parameters(remove_duplicate=False)}
    if shape_from_config(table).tied:
        # A head that shares the embedding's weight is not in a checkpoint.
        del sizes["lm_head.weight"]
    assert sum(size for name, size in sizes.items() if found.speaks(name)) == entry["parameters"]
    if published := entry.get("checkpoint"):
        assert sum(sizes.values()) + published.get("beside", 0) == published["parameters"]
