"""The file of observations, `$LORA_STUDIO_HOME/calibration.json`: small, whole, written by one process at a time.

Whatever lies there, reading never fails: what is not an observation is passed over, and a file that is none is none.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from studio.core.calibration import Observation, Setting
from studio.core.text import plain
from studio.runs.atomic import write_whole
from studio.runs.home import studio_home

SCHEMA = 1
_FILE, _LOCK = "calibration.json", ".calibration.lock"
_LARGEST_FILE_BYTES = 2**20
_KEPT_PER_SETTING, _KEPT = 12, 240
_LOCK_SECONDS = 5.0
_MOST_BYTES = 2**50
_LONGEST_WORD, _MOST_PARTS = 200, 32


def calibration_path() -> Path:
    """Return where the observations of this machine lie."""
    return studio_home() / _FILE


def read_observations(path: Path | None = None) -> tuple[Observation, ...]:
    """Return every sound observation; none where the file is missing, unreadable, too large or something else."""
    path = path or calibration_path()
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE_BYTES:
            return ()
        document = json.loads(path.read_bytes())
        items = document["observations"] if document["schema"] == SCHEMA else ()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    if not isinstance(items, list):
        return ()
    found = (_observation(item) for item in items[-_KEPT:])
    return tuple(item for item in found if item is not None)


def remember(observation: Observation, path: Path | None = None) -> None:
    """Add an observation, in place of an older one of the same run; the oldest go when there are many.

    Raises:
        OSError: The file cannot be written.
        TimeoutError: Another process has held it for seconds.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415  0.1 s that only the end of a run pays

    path = path or calibration_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path.with_name(_LOCK), timeout=_LOCK_SECONDS):
            kept = [item for item in read_observations(path) if item.run != observation.run]
            kept = _newest([*kept, observation])
            document = {"schema": SCHEMA, "observations": [observation_to_dict(item) for item in kept]}
            write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    except Timeout as error:
        raise TimeoutError(f"{_LOCK} was held by another process for {_LOCK_SECONDS:g} s") from error


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
    """Return the observation of a JSON value, None where it is none."""
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
    """Return a short word with nothing in it that a terminal would obey.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(value, str) or not value or len(value) > _LONGEST_WORD:
        raise ValueError("no word")
    return plain(value, one_line=True)


def _size(value: Any) -> int:
    """Return a number of bytes.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST_BYTES:
        raise ValueError("no size")
    return value


def _rate(value: Any) -> float:
    """Return a positive finite number.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < float(value) < math.inf:
        raise ValueError("no rate")
    return float(value)
