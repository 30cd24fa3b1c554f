"""Finds the config that a measurement of a training step needs, and reads and keeps what the measurement found."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from studio.core.calibration import Observation
from studio.core.errors import BadInput
from studio.core.measured import measured_plan
from studio.core.recipe import EMBEDDED
from studio.core.text import plain
from studio.probe.embedded_model import EmbeddedMissing
from studio.probe.gguf_header import read_gguf_header
from studio.probe.hub import HubRefusal
from studio.probe.known_models import config_instead
from studio.probe.model_folder import CONFIG, read_config, weight_headers
from studio.probe.models import find_base
from studio.probe.setting import setting_of
from studio.probe.shape import config_of_gguf
from studio.runs.atomic import read_object
from studio.runs.calibration import remember
from studio.runs.layout import RunPaths

_TIED, _HEAD = "tie_word_embeddings", "lm_head.weight"


def base_config(word: str, revision: str = "") -> dict[str, Any]:
    """Return the config.json of the model that a word names: a folder, a file of one, a .gguf, a hub id, or `embedded`.

    Raises:
        BadInput: There is no such model, or its config is not known before it is downloaded.
    """
    path = Path(word) if word != EMBEDDED and "\0" not in word else None
    if path is not None and path.is_file():
        if path.suffix == ".gguf":
            return config_of_gguf(read_gguf_header(path))
        return read_config(path if path.suffix == ".json" else path.with_name(CONFIG))
    if path is not None and path.is_dir():
        return _with_head_of(path, read_config(path / CONFIG))
    try:
        base = find_base(word, revision)
        config = base.config
        if config is not None and base.path is not None:
            config = _with_head_of(base.path, config)
    except (HubRefusal, EmbeddedMissing) as refusal:
        config, _ = config_instead(word, revision, refusal)
    if config is None:
        shown = plain(word, one_line=True, limit=200)
        raise BadInput(f"Nothing is known of {shown} before it is downloaded: it has no config.json.")
    return config


def _with_head_of(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a folder's config, which says that the head is its own where only the weights say so.

    Configs of Mistral Small 3 say nothing. transformers 5 would tie head and embedding, but when it loads the model it
    finds a head in the files and lets it be (modeling_utils.py tie_weights).
    """
    text = config.get("text_config")
    if _TIED in config or (isinstance(text, dict) and text.get(_TIED)):
        return config
    names = (name for header in weight_headers(folder) for name in header.tensors)
    return {**config, _TIED: False} if any(name.endswith(_HEAD) for name in names) else config


def read_measurement(paths: RunPaths) -> dict[str, Any] | None:
    """Return the report of a measurement; None where there is none, or it cannot be read."""
    report = read_object(paths.report)
    return report if isinstance(report.get("peaks"), dict) else None


def remember_measurement(paths: RunPaths, report: Mapping[str, Any], now: float) -> str:
    """Keep what was measured on a card for later plans; return why that failed, empty if it did not.

    Nothing is kept of a trace, which teaches nothing about cards.

    Args:
        paths: The run, with the estimate of its start.
        report: What was measured.
        now: Unix seconds.
    """
    if report["source"] != "cuda":
        return ""
    try:
        plan = json.loads(paths.plan.read_bytes())
        seen = measured_plan(plan, report)
        expected = plan["stages"]
        pairs = [(name, expected[name], size) for name, size in seen["stages"].items() if name in expected]
        remember(
            Observation(
                run=paths.name,
                at=now,
                setting=setting_of(str(report["card"]["name"]), plan["setup"]["method"], report["versions"]),
                predicted=(plan["peak_bytes"], plan["reserved_bytes"], plan["device_bytes"]),
                allocated_bytes=seen["peak_bytes"],
                reserved_bytes=report["reserved_bytes"],
                device_bytes=report["device_bytes"],
                stages=tuple(pairs),
            )
        )
    except Exception as error:  # noqa: BLE001  a measurement that went well must not fail over statistics
        return plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)
    return ""
