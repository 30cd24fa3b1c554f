"""The same families with the widths of real models and without weights: the numbers in their files are a hole.

A plan and a trace look at sizes alone. Of a model whose hidden size is 64 they would mostly see what does not grow with
it, such as tables of rotary positions.
"""

import json
import struct
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from tests.fakes.families import FAMILIES, config_of, config_on_the_hub, tensors_on_the_hub, without_timm
from tests.fakes.families.checkpoint import widened


def make_wide(folder: Path, name: str) -> Path:
    """Write a family's config and the headers of its weights, each as on the hub, and return the folder."""
    made = FAMILIES[name]
    config = config_of(name, wide=True)
    with without_timm(), torch.device("meta"), no_init_weights():
        model = getattr(transformers, made.architecture)(config)
    model.tie_weights()
    model.to(torch.bfloat16)
    tied = {name for name, of in (model.all_tied_weights_keys or {}).items() if name != of}
    tensors = {key: value for key, value in model.state_dict().items() if key not in tied}
    folder.mkdir()
    _write_hole(folder / "model.safetensors", tensors_on_the_hub(revert_weight_conversion(model, tensors), made))
    values = json.loads(config.to_json_string(use_diff=False)) | {"architectures": [made.architecture]}
    values.setdefault("dtype", "bfloat16")
    (folder / "config.json").write_text(json.dumps(config_on_the_hub(values, made, widened(made.hub))))
    return folder


def _write_hole(path: Path, tensors: dict[str, Tensor]) -> None:
    header, offset = {}, 0
    for key, tensor in tensors.items():
        kind = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64", torch.uint8: "U8"}[tensor.dtype]
        end = offset + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    words = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(words)) + words)
        file.truncate(8 + len(words) + offset)
