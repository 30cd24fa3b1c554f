"""Tiny random checkpoints of many families, in the form in which the hub holds them.

A row of `FAMILIES` is the class that a checkpoint's `architectures` names, and the sizes of its config. transformers
builds it and writes it: its classes convert keys as they load, and `save_pretrained` writes them back as the hub has
them. What it does not write, the hub's config words and tensors that no class loads, is added here.

To write them into a folder: `python -m tests.fakes.families FOLDER [NAME ...]`.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, Gemma3nVisionConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.fakes.families.checkpoint import WRITTEN_BY_TRANSFORMERS_5, Checkpoint, Values, widened
from tests.fakes.families.dense import DENSE
from tests.fakes.families.experts import EXPERT_MODELS
from tests.fakes.families.hybrids import HYBRIDS
from tests.fakes.families.multimodal import MULTIMODAL
from tests.fakes.tiny_model import tiny_tokenizer

FAMILIES: dict[str, Checkpoint] = {**DENSE, **EXPERT_MODELS, **HYBRIDS, **MULTIMODAL}


def config_of(name: str, *, wide: bool = False) -> Any:
    """Return transformers' config of a family, tiny or with the widths of a real model."""
    made = FAMILIES[name]
    values = widened(made.values) if wide else made.values
    return CONFIG_MAPPING[made.model_type](
        **{key: value for key, value in values.items() if value is not None or key == "sliding_window"}
    )


class StandInTower(PreTrainedModel):
    """Stands for Gemma 3n's vision tower, a model of timm, which need not be installed."""

    config_class = Gemma3nVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules: ClassVar[list[str]] = []

    def __init__(self, config: Gemma3nVisionConfig) -> None:
        super().__init__(config)
        self.timm_model = nn.ModuleDict({"conv_stem": nn.Conv2d(3, 8, 3)})
        self.post_init()


@contextmanager
def without_timm() -> Iterator[None]:
    """Let transformers build Gemma 3n where timm and pillow are not installed."""
    classes = AutoModel._model_mapping
    AutoModel.register(Gemma3nVisionConfig, StandInTower, exist_ok=True)
    try:
        yield
    finally:
        del classes._extra_content[Gemma3nVisionConfig]


def make_family(folder: Path, name: str, *, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a family's checkpoint, weights, tokenizer and template, and return its folder."""
    made = FAMILIES[name]
    torch.manual_seed(0)
    with without_timm():
        model = getattr(transformers, made.architecture)(config_of(name)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases, norms and gates too: all-equal ones hide mistakes.
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    if made.named or made.unread or made.mxfp4:
        path = folder / "model.safetensors"
        save_file(tensors_on_the_hub(load_file(path), made), path, metadata={"format": "pt"})
    path = folder / "config.json"
    path.write_text(json.dumps(config_on_the_hub(json.loads(path.read_text()), made, made.hub), indent=2))
    return folder


def tensors_on_the_hub(tensors: dict[str, Tensor], made: Checkpoint) -> dict[str, Tensor]:
    """Return a checkpoint's tensors with the names that the hub has for them, and those that no class loads."""
    for written, on_hub in made.named.items():
        tensors = {
            on_hub + key.removeprefix(written) if key.startswith(written) else key: value
            for key, value in tensors.items()
        }
    for begins, source in made.unread.items():
        found = {key: value for key, value in tensors.items() if key.startswith(source)}
        assert found, source
        tensors |= {begins + key.removeprefix(source): value.clone() for key, value in found.items()}
    return _in_mxfp4(tensors) if made.mxfp4 else tensors


def _in_mxfp4(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put random numbers in MXFP4 in the place of expert stacks `[experts, in, out]`.

    A block is 32 inputs of one output: 16 bytes of two numbers each, and a byte for their common exponent.
    """
    made = {}
    for key, value in tensors.items():
        if not key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            made[key] = value
            continue
        experts, inputs, outputs = value.shape
        shape = (experts, outputs, inputs // 32)
        made[f"{key}_blocks"] = torch.randint(256, (*shape, 16), dtype=torch.uint8, device=value.device)
        made[f"{key}_scales"] = torch.full(shape, 127 - 5, dtype=torch.uint8, device=value.device)
    return made


def config_on_the_hub(config: Values, made: Checkpoint, hub: Mapping[str, Any]) -> Values:
    """Return a config.json's values, as transformers writes them, in the words of the hub."""
    if made.model_type not in WRITTEN_BY_TRANSFORMERS_5:
        config["torch_dtype"] = config.pop("dtype")
        for table in (config, *(value for value in config.values() if isinstance(value, dict))):
            _as_before_transformers_5(table)
    return _overlaid(config, hub)


def _as_before_transformers_5(table: Values) -> None:
    """Write rotary positions as older versions did: their values beside the others, not in a table of their own."""
    rope = table.get("rope_parameters")
    if isinstance(rope, dict) and rope.get("rope_type") == "default" and "mrope_section" not in rope:
        table |= {key: value for key, value in table.pop("rope_parameters").items() if key != "rope_type"}


def _overlaid(config: Values, hub: Mapping[str, Any]) -> Values:
    made = {**config}
    for key, value in hub.items():
        if value is None:
            made.pop(key, None)
        else:
            made[key] = _overlaid(made.get(key, {}), value) if isinstance(value, dict) else value
    return made
