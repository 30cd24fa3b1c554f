"""Single tensors out of a model folder's safetensors, without loading the model."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from studio.core.errors import JobFailed
from studio.core.text import plain
from studio.probe.model_folder import INDEX, WEIGHTS


class FolderTensors:
    """The tensors of a model folder by their names in the loaded model."""

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        """Read which file holds which tensor.

        Args:
            folder: Holds `model.safetensors`, or shards and their index.
            prefix: transformers' `base_model_prefix`: some files leave it out, some models do.
        """
        self._folder = folder
        self._prefix = prefix
        if (folder / INDEX).is_file():
            self._files: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        else:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                self._files = dict.fromkeys(file.keys(), WEIGHTS)

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return one tensor on the host, as it is stored.

        Raises:
            JobFailed: `weights_not_found` when no file holds a tensor of this name and shape.
        """
        candidates = (name, name.removeprefix(f"{self._prefix}."), f"{self._prefix}.{name}")
        for candidate in candidates:
            if candidate in self._files:
                with safe_open(self._folder / self._files[candidate], framework="pt") as file:
                    tensor: Tensor = file.get_tensor(candidate)
                if tuple(tensor.shape) == shape and tensor.is_floating_point():
                    return tensor
        raise JobFailed(
            "weights_not_found",
            f"the base model's files hold no 16-bit weight {plain(name, one_line=True)} of shape {shape}",
            "use adapter.init default; loftq needs a base whose safetensors name its layers as transformers does",
        )
