"""What audits of this machine have measured of quality, kept in `$LORA_STUDIO_HOME` for the next recipe.

`quality.json`: how LoRA and QLoRA came out in races. `effects.json`: what 4 bits cost in each layer of a base.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from studio.core.intervals import Interval
from studio.runs.kept_list import KeptList

_KEPT = 500
_KEPT_BASES, _MOST_BLOCKS = 50, 1000


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


@dataclass(frozen=True, slots=True)
class BaseResult:
    """What an audit of a base found block by block.

    Attributes:
        model: Fingerprint of the base.
        run: Name of the audit.
        asked: The 4-bit form that was measured block by block.
        tokens: Tokens of the data on which it rests.
        blocks: Of each block its name, how far it alone moves the hidden state in that form, and the relative rounding
            error of its weights in that form and in 8 bits, None where that was not measured.
    """

    model: str
    run: str
    asked: str
    tokens: int
    blocks: tuple[tuple[str, float, float, float | None], ...]


def read_bases(path: Path | None = None) -> tuple[BaseResult, ...]:
    """Return every sound result of a base, the oldest first; none where the file is missing or damaged."""
    return _KEPT_OF_BASES.read(path)


def remember_base(result: BaseResult, path: Path | None = None) -> None:
    """Keep what an audit of a base found, in place of an older one of the same base.

    Raises:
        OSError: The file cannot be written.
        TimeoutError: Another process has held it for seconds.
    """
    _KEPT_OF_BASES.change(
        lambda kept: [*(one for one in kept if one.model != result.model), result][-_KEPT_BASES:], path
    )


def read_results(path: Path | None = None) -> tuple[LaneResult, ...]:
    """Return every sound result, the oldest first; none where the file is missing or damaged."""
    return _KEPT_HERE.read(path)


def remember_results(results: tuple[LaneResult, ...], path: Path | None = None) -> None:
    """Add the lanes of a race, in place of older ones of the same model, data and lane.

    Raises:
        OSError: The file cannot be written.
        TimeoutError: Another process has held it for seconds.
    """
    new = {(one.model, one.data, one.lane) for one in results}
    _KEPT_HERE.change(
        lambda kept: [*(one for one in kept if (one.model, one.data, one.lane) not in new), *results][-_KEPT:], path
    )


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
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _base(item: Any) -> BaseResult | None:
    try:
        words = [item[key] for key in ("model", "run", "asked")]
        blocks = [
            (name, _finite(own), _finite(four), None if eight is None else _finite(eight))
            for name, own, four, eight in item["blocks"][:_MOST_BLOCKS]
        ]
        if not all(isinstance(word, str) and len(word) < 200 for word in (*words, *(block[0] for block in blocks))):
            return None
        return BaseResult(words[0], words[1], words[2], _whole(item["tokens"]), tuple(blocks))
    except (KeyError, TypeError, ValueError, OverflowError):
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


_KEPT_HERE = KeptList("quality", "outcomes", most=_KEPT, most_bytes=4 * 2**20, read_one=_result, write_one=asdict)
_KEPT_OF_BASES = KeptList("effects", "bases", _KEPT_BASES, 16 * 2**20, read_one=_base, write_one=asdict)
