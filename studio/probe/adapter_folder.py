"""Looks through a PEFT adapter folder before anything heavy is loaded: its config, its weights, the base it names."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studio.core.errors import BadInput
from studio.core.text import plain
from studio.probe.safetensors_header import SafetensorsHeader, read_header

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_MOST_CONFIG_BYTES = 10 * 2**20


@dataclass(frozen=True, slots=True)
class AdapterFound:
    """A LoRA adapter whose files are whole.

    Attributes:
        folder: Where it lies.
        config: Its `adapter_config.json`.
        header: Of its weights: names, shapes and formats.
    """

    folder: Path
    config: dict[str, Any]
    header: SafetensorsHeader

    @property
    def base(self) -> str:
        """The base model that it says it was trained on; empty where it names none."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) else ""

    @property
    def revision(self) -> str:
        """The revision of that base; empty where it names none."""
        said = self.config.get("revision")
        return said if isinstance(said, str) else ""


def find_adapter(folder: Path) -> AdapterFound:
    """Return the adapter of a PEFT folder.

    Raises:
        BadInput: No adapter folder, a damaged file, weights as a pickle or missing, or another method than LoRA.
    """
    shown = plain(str(folder), one_line=True)
    if not (folder / ADAPTER_CONFIG).is_file():
        raise BadInput(
            f"{shown} is no adapter folder: it has no {ADAPTER_CONFIG}. Name a finished run or a PEFT folder."
        )
    config = _config(folder / ADAPTER_CONFIG)
    method = config.get("peft_type")
    if method != "LORA":
        found = plain(str(method), one_line=True, limit=40)
        raise BadInput(
            f"{shown} holds an adapter of the kind {found}; only LoRA adapters (also DoRA, rsLoRA) are used."
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        if (folder / _PICKLE).is_file():
            raise BadInput(
                f"{shown} has its weights only as a pickle ({_PICKLE}), and loading a pickle can run any code in it. "
                f"Wanted {ADAPTER_WEIGHTS}: save the adapter again with a newer peft where you trust its source."
            )
        raise BadInput(f"{shown} lacks {ADAPTER_WEIGHTS}: the adapter was not copied whole, or not saved to its end.")
    header = read_header(folder / ADAPTER_WEIGHTS)
    if not header.tensors:
        raise BadInput(f"{plain(str(folder / ADAPTER_WEIGHTS), one_line=True)} holds no tensor: there is no adapter.")
    return AdapterFound(folder, config, header)


def _config(path: Path) -> dict[str, Any]:
    shown = plain(str(path), one_line=True)
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise BadInput(f"{shown} is larger than 10 MiB and cannot be what its name says.")
        table = json.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise BadInput(f"{shown} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{shown} is not JSON: {plain(str(error), one_line=True, limit=120)}.") from None
    if not isinstance(table, dict):
        raise BadInput(f"{shown} is not a JSON object.")
    return table
