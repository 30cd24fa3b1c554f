"""The file of races, `$LORA_STUDIO_HOME/quality.json`: how LoRA and QLoRA came out on a model and data, measured here.

Small, whole, written by one process at a time. Whatever lies there, reading never fails: what is no lane's result is
passed over, and a file that is none is none.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio.core.intervals import Interval
from studio.runs.atomic import write_whole
from studio.runs.home import studio_home

SCHEMA = 1
_FILE, _LOCK = "quality.json", ".quality.lock"
_LARGEST_FILE_BYTES = 4 * 2**20
_KEPT = 500
_LOCK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class LaneResult:
    """One lane of a race.

    Attributes:
        model: Fingerprint of the base.
        data: Fingerprint of the data.
        lane: `lora`, `qlora` or another lane's name.
        run: Name of the training run.
        loss: Held-out loss at its end, nats per token.
        more: Loss above LoRA's on the same rows, paired; 0 for LoRA itself.
        tokens: Held-out tokens that both rest on.
        steps: Optimizer steps that it was trained for.
        tokens_per_second: While it was trained; None where unknown.
    """

    model: str
    data: str
    lane: str
    run: str
    loss: Interval
    more: Interval
    tokens: int
    steps: int
    tokens_per_second: float | None = None


def quality_path() -> Path:
    """Return where the results of this machine's races lie."""
    return studio_home() / _FILE


def read_results(path: Path | None = None) -> tuple[LaneResult, ...]:
    """Return every sound result, the oldest first; none where the file is missing, unreadable or something else."""
    path = path or quality_path()
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_FILE_BYTES:
            return ()
        document = json.loads(path.read_bytes())
        items = document["outcomes"] if document["schema"] == SCHEMA else ()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return ()
    if not isinstance(items, list):
        return ()
    found = (_result(item) for item in items[-_KEPT:])
    return tuple(item for item in found if item is not None)


def remember_results(results: tuple[LaneResult, ...], path: Path | None = None) -> None:
    """Add the lanes of a race, in place of older ones of the same model, data and lane.

    Raises:
        OSError: The file cannot be written.
        TimeoutError: Another process has held it for seconds.
    """
    from filelock import FileLock, Timeout  # noqa: PLC0415  0.1 s that only the end of a race pays

    path = path or quality_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    new = {(one.model, one.data, one.lane) for one in results}
    try:
        with FileLock(path.with_name(_LOCK), timeout=_LOCK_SECONDS):
            kept = [one for one in read_results(path) if (one.model, one.data, one.lane) not in new]
            document = {"schema": SCHEMA, "outcomes": [asdict(one) for one in [*kept, *results][-_KEPT:]]}
            write_whole(path, json.dumps(document, indent=1, allow_nan=False) + "\n")
    except Timeout as error:
        raise TimeoutError(f"{_LOCK} was held by another process for {_LOCK_SECONDS:g} s") from error


def _result(item: Any) -> LaneResult | None:
    try:
        words = [item[key] for key in ("model", "data", "lane", "run")]
        if not all(isinstance(word, str) and len(word) < 200 for word in words):
            return None
        pace = item["tokens_per_second"]
        return LaneResult(
            model=words[0],
            data=words[1],
            lane=words[2],
            run=words[3],
            loss=_interval(item["loss"]),
            more=_interval(item["more"]),
            tokens=_whole(item["tokens"]),
            steps=_whole(item["steps"]),
            tokens_per_second=None if pace is None else _finite(pace),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _interval(item: Any) -> Interval:
    ends = (None if item[key] is None else _finite(item[key]) for key in ("low", "high"))
    return Interval(_finite(item["value"]), *ends)


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(value)
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise TypeError(value)
    return value
