"""The file of observations, `$LORA_STUDIO_HOME/calibration.json`: what this machine's runs took beside their plans."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.calibration import Observation, Setting
from studio.core.text import plain
from studio.runs.kept_list import KeptList

_KEPT_PER_SETTING, _KEPT = 12, 240
_MOST_BYTES = 2**50
_LONGEST_WORD, _MOST_PARTS = 200, 32


def calibration_path() -> Path:
    """Return where the observations of this machine lie."""
    return _KEPT_HERE.path


def read_observations(path: Path | None = None) -> tuple[Observation, ...]:
    """Return every sound observation, the oldest first; none where the file is missing or damaged."""
    return _KEPT_HERE.read(path)


def remember(observation: Observation, path: Path | None = None) -> None:
    """Add an observation, in place of an older one of the same run; the oldest go when there are many.

    Raises:
        OSError: The file cannot be written.
        TimeoutError: Another process has held it for seconds.
    """
    _KEPT_HERE.change(
        lambda kept: _newest([*(item for item in kept if item.run != observation.run), observation]), path
    )


def _newest(observations: list[Observation]) -> list[Observation]:
    """Return the newest of each setting, in order of time."""
    kept: list[Observation] = []
    counts: dict[Setting, int] = {}
    for item in sorted(observations, key=lambda item: -item.at):
        counts[item.setting] = counts.get(item.setting, 0) + 1
        if counts[item.setting] <= _KEPT_PER_SETTING:
            kept.append(item)
    return kept[:_KEPT][::-1]


def observation_to_dict(item: Observation) -> dict[str, Any]:
    """Return an observation's JSON object; sizes are bytes, rates per second, null is "not measured"."""
    setting = item.setting
    return {
        "run": item.run,
        "at": item.at,
        "device": setting.device,
        "engine": setting.engine,
        "method": setting.method,
        "versions": dict(setting.versions),
        "predicted": list(item.predicted),
        **{name: getattr(item, name) for name in (*_SIZES, *_RATES)},
        "stages": [list(stage) for stage in item.stages],
    }


_SIZES = ("allocated_bytes", "reserved_bytes", "device_bytes", "resident_bytes")
_RATES = ("operations_per_second", "speed_factor")


def _observation(table: Any) -> Observation | None:
    """Return the observation of a JSON value, None where the value is not sound."""
    try:
        versions = tuple(sorted((_word(name), _word(value)) for name, value in table["versions"].items()))
        allocated, reserved, device = (_size(value) for value in table["predicted"])
        stages = tuple((_word(name), _size(before), _size(after)) for name, before, after in table["stages"])
        if len(versions) > _MOST_PARTS or len(stages) > _MOST_PARTS:
            return None
        setting = Setting(_word(table["device"]), _word(table["engine"]), _word(table["method"]), versions)
        return Observation(
            run=_word(table["run"]),
            at=_rate(table["at"]),
            setting=setting,
            predicted=(allocated, reserved, device),
            stages=stages,
            **_optional(table, _SIZES, _size),
            **_optional(table, _RATES, _rate),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        return None


def _optional(table: dict[str, Any], names: tuple[str, ...], read: Callable[[Any], Any]) -> dict[str, Any]:
    return {name: None if table.get(name) is None else read(table[name]) for name in names}


def _word(value: Any) -> str:
    """Return a short text with nothing in it that a terminal would obey.

    Raises:
        ValueError: The value is no short text.
    """
    if not isinstance(value, str) or not value or len(value) > _LONGEST_WORD:
        raise ValueError("no word")
    return plain(value, one_line=True)


def _size(value: Any) -> int:
    """Return a number of bytes.

    Raises:
        ValueError: The value is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_BYTES:
        raise ValueError("no size")
    return value


def _rate(value: Any) -> float:
    """Return a positive finite number.

    Raises:
        ValueError: The value is no such number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < float(value) < math.inf:
        raise ValueError("no rate")
    return float(value)


_KEPT_HERE = KeptList(
    "calibration",
    "observations",
    most=_KEPT,
    most_bytes=2**20,
    read_one=_observation,
    write_one=observation_to_dict,
)
