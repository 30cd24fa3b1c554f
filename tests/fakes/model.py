"""Model folders made on the spot, without torch: enough for everything that only looks."""

import json
import struct
from pathlib import Path

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "vocab_size": 32}


def safetensors_bytes(names: list[str], floats_each: int = 4) -> bytes:
    """Return a whole safetensors file with one small fp32 tensor of each name."""
    size = 4 * floats_each
    header = {
        name: {"dtype": "F32", "shape": [floats_each], "data_offsets": [place * size, (place + 1) * size]}
        for place, name in enumerate(names)
    }
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(size * len(names))


def model_folder(folder: Path, *, shards: int = 1) -> Path:
    """Write a folder that passes every check: config, weights in one file or several, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.json").write_text("{}")
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(["a", "b"]))
        return folder
    names = [f"model-{n:05}-of-{shards:05}.safetensors" for n in range(1, shards + 1)]
    for name in names:
        (folder / name).write_bytes(safetensors_bytes([f"{name}.w"]))
    index = {"weight_map": {f"{name}.w": name for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
