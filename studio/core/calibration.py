"""What this machine's own runs say about the estimate: observations, and the corrections that follow from them.

An observation holds what was predicted for the batches that a run really had, and what was measured. It counts only for
plans on the same device with the same engine, library versions and method. The more runs there are, the narrower the
corrected range; it always holds every measured value.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median

from studio.core.throughput import Speed
from studio.core.vram.report import Components, Range, VramEstimate

_MOST_FACTOR = 5.0
"""A measurement that is off by more than this factor describes something else (a shared card, a broken reading)."""

_RUN_SPREAD = 1.5
"""The speed of another run may differ from one run's by this factor: padding, batch size and what else the machine does
are not counted."""

_PROCESS_DOUBT = 0.25
"""Relative doubt, after one CPU run, of what a process holds beside its tensors: it differs from run to run."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What an observation holds for: it counts for plans with an equal setting.

    Attributes:
        device: The card as NVML names it, or `cpu: ` and the processor.
        engine: This program and its version.
        method: lora or qlora.
        versions: The libraries and their versions, by name.
    """

    device: str
    engine: str
    method: str
    versions: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Observation:
    """One finished run. Bytes are peaks; None is "not measured".

    Attributes:
        run: Its name.
        at: When it ended, unix seconds.
        setting: What it holds for.
        predicted: Expected allocated, reserved and device bytes.
        allocated_bytes: Measured peak of live tensors.
        reserved_bytes: Measured peak of the allocator's segments.
        device_bytes: What the card showed in use, less what other processes held when the run began.
        resident_bytes: Highest resident set of the process on a CPU.
        operations_per_second: Floating-point operations of the model per second of training.
        speed_factor: Measured over expected tokens a second; None where nothing was expected (a CPU).
        stages: Peak of live tensors by stage: name, predicted, measured.
    """

    run: str
    at: float
    setting: Setting
    predicted: tuple[int, int, int]
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    device_bytes: int | None = None
    resident_bytes: int | None = None
    operations_per_second: float | None = None
    speed_factor: float | None = None
    stages: tuple[tuple[str, int, int], ...] = ()

    @property
    def tensor_factor(self) -> float | None:
        """Measured over predicted peak of live tensors."""
        return _factor(self.allocated_bytes, self.predicted[0])

    @property
    def unused_factor(self) -> float | None:
        """Measured over predicted bytes that the allocator held beyond live tensors."""
        if self.allocated_bytes is None or self.reserved_bytes is None:
            return None
        return _factor(self.reserved_bytes - self.allocated_bytes, self.predicted[1] - self.predicted[0])

    @property
    def outside_bytes(self) -> int | None:
        """What the card showed beyond the allocator: the context, and other processes that came during the run."""
        if self.device_bytes is None or self.reserved_bytes is None or self.device_bytes < self.reserved_bytes:
            return None
        return self.device_bytes - self.reserved_bytes

    @property
    def process_bytes(self) -> int | None:
        """What a CPU run's process held beyond the predicted tensors: interpreter, libraries, freed memory it keeps."""
        if self.resident_bytes is None or self.resident_bytes < self.predicted[0]:
            return None
        return self.resident_bytes - self.predicted[0]


def matching(observations: Iterable[Observation], setting: Setting) -> tuple[Observation, ...]:
    """Return the observations that hold for a setting."""
    return tuple(item for item in observations if item.setting == setting)


def correct_estimate(estimate: VramEstimate, observations: Sequence[Observation]) -> VramEstimate:
    """Return an estimate with its uncertain terms corrected by the runs of the same setting.

    Args:
        estimate: An estimate for a GPU.
        observations: Those of the estimate's own setting; without any the estimate stays as it is.
    """
    tensors = _known(item.tensor_factor for item in observations)
    unused = _known(item.unused_factor for item in observations)
    outside = _known(item.outside_bytes for item in observations)
    if not (tensors or unused or outside):
        return estimate
    before = estimate.allocated
    allocated = _scaled(before, tensors) if tensors else before
    # Each term is corrected alone: tensors by their factor, the allocator's unused memory by its own, then the context.
    beside = _difference(estimate.reserved, before)
    beside = _scaled(beside, unused) if unused else beside
    reserved = _sum(allocated, beside)
    context = _difference(estimate.device, estimate.reserved)
    context = _around(context, outside) if outside else context
    note = f"corrected by {len(observations)} finished run(s) on this device with these libraries"
    return replace(
        estimate,
        components=_parts(estimate, allocated, context),
        allocated=allocated,
        reserved=reserved,
        device=_sum(reserved, context),
        notes=(*estimate.notes, note),
    )


def _parts(estimate: VramEstimate, allocated: Range, outside: Range) -> Components:
    """Return components that add up to the corrected peak: the corrections go to activations and context."""
    parts = estimate.components
    paged = estimate.device.expected - estimate.reserved.expected - parts.context
    more = allocated.expected - estimate.allocated.expected
    return replace(
        parts, activations=max(0, parts.activations + more), context=max(0, outside.expected - max(0, paged))
    )


def correct_speed(speed: Speed, observations: Sequence[Observation]) -> Speed:
    """Return a GPU's speed, corrected by the runs of the same setting; unchanged without any."""
    factors = _known(item.speed_factor for item in observations)
    if not factors:
        return speed
    low, middle, high = _blend(factors, (speed.low / speed.expected, 1.0, speed.high / speed.expected))
    basis = f"{len(factors)} finished run(s) on this device"
    return Speed(speed.expected * low, speed.expected * middle, speed.expected * high, basis)


def measured_speed(operations_per_token: float, observations: Sequence[Observation]) -> Speed | None:
    """Return the speed of a device without a data sheet, such as a CPU, from its own runs; None without any.

    Args:
        operations_per_token: Floating-point operations of the planned step, per token.
        observations: Those with the same device, libraries and method.
    """
    rates = _known(item.operations_per_second for item in observations)
    if not rates or operations_per_token <= 0:
        return None
    middle = median(rates)
    low, _, high = _blend([rate / middle for rate in rates], (1 / _RUN_SPREAD, 1.0, _RUN_SPREAD))
    usual = middle / operations_per_token
    return Speed(usual * low, usual, usual * high, f"{len(rates)} finished run(s) on this device")


def process_range(observations: Sequence[Observation]) -> Range | None:
    """Return what a CPU run's process holds beyond its tensors, by earlier runs; None without any."""
    seen = _known(item.process_bytes for item in observations)
    if not seen:
        return None
    usual = median(seen)
    return _whole(*_blend(seen, (usual * (1 - _PROCESS_DOUBT), usual, usual * (1 + _PROCESS_DOUBT))))


@dataclass(frozen=True, slots=True)
class Errors:
    """How far the estimate was off in the runs of one setting; relative: predicted over measured, minus 1.

    Attributes:
        setting: Which runs.
        runs: How many.
        errors: Median and worst error of each metric: tensors, allocator, card, process, speed. A CPU's speed and the
            memory of its process are predicted from earlier runs alone, and are compared with that prediction.
    """

    setting: Setting
    runs: int
    errors: dict[str, tuple[float, float]]


def errors_by_setting(observations: Iterable[Observation]) -> list[Errors]:
    """Return the errors of each setting, the setting of the latest run first."""
    groups: dict[Setting, list[Observation]] = {}
    for item in sorted(observations, key=lambda item: -item.at):
        groups.setdefault(item.setting, []).append(item)
    return [Errors(setting, len(items), _errors(items)) for setting, items in groups.items()]


_METRICS: dict[str, Callable[[Observation], float | None]] = {
    "tensors": lambda item: _factor(item.allocated_bytes, item.predicted[0]),
    "allocator": lambda item: _factor(item.reserved_bytes, item.predicted[1]),
    "card": lambda item: _factor(item.device_bytes, item.predicted[2]),
    "speed": lambda item: item.speed_factor,
}


def _errors(observations: Sequence[Observation]) -> dict[str, tuple[float, float]]:
    factors = {name: _known(metric(item) for item in observations) for name, metric in _METRICS.items()}
    earlier = sorted(observations, key=lambda item: item.at)
    factors["process"] = _known(
        _factor(now.resident_bytes, now.predicted[0] + rest)
        for now, rest in _with_earlier(earlier, lambda item: item.process_bytes)
    )
    factors["speed"] += _known(
        _factor(now.operations_per_second, rate)
        for now, rate in _with_earlier(earlier, lambda item: item.operations_per_second)
        if now.speed_factor is None
    )
    errors = {name: [1 / factor - 1 for factor in values] for name, values in factors.items() if values}
    return {name: (median(values), max(values, key=abs)) for name, values in errors.items()}


def _with_earlier(
    observations: Sequence[Observation], value: Callable[[Observation], float | None]
) -> Iterator[tuple[Observation, float]]:
    """Yield each observation, in order of time, with the median of a value over those before it."""
    for place, item in enumerate(observations):
        before = _known(value(other) for other in observations[:place])
        if before:
            yield item, median(before)


def _factor(measured: float | None, predicted: float) -> float | None:
    """Return measured over predicted; None where one is missing, or they differ too much to be of the same thing."""
    if measured is None or predicted <= 0 or measured <= 0:
        return None
    factor = measured / predicted
    return factor if 1 / _MOST_FACTOR <= factor <= _MOST_FACTOR else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _blend(seen: Sequence[float], prior: tuple[float, float, float]) -> tuple[float, float, float]:
    """Return lowest, usual and highest of the values seen, widened by what is left of the doubt before any was seen.

    Args:
        seen: Measured values.
        prior: Lowest, expected and highest without any measurement.
    """
    # The doubt of a mean falls with the root of the number of values; the prior counts as one of them.
    weight, middle = 1 / math.sqrt(len(seen) + 1), median(seen)
    low = middle - weight * (prior[1] - prior[0])
    high = middle + weight * (prior[2] - prior[1])
    return max(0.0, min(low, *seen)), middle, max(high, *seen)


def _scaled(predicted: Range, factors: Sequence[float]) -> Range:
    """Return a range scaled by measured factors."""
    if predicted.expected <= 0:
        return predicted
    prior = (predicted.low / predicted.expected, 1.0, predicted.high / predicted.expected)
    return _whole(*(predicted.expected * factor for factor in _blend(factors, prior)))


def _around(predicted: Range, seen: Sequence[float]) -> Range:
    """Return a range moved to the measured values."""
    return _whole(*_blend(seen, (predicted.low, predicted.expected, predicted.high)))


def _whole(low: float, expected: float, high: float) -> Range:
    return Range(math.floor(low), round(expected), math.ceil(high))


def _difference(whole: Range, part: Range) -> Range:
    return Range(*(max(0, getattr(whole, name) - getattr(part, name)) for name in ("low", "expected", "high")))


def _sum(one: Range, other: Range) -> Range:
    return Range(one.low + other.low, one.expected + other.expected, one.high + other.high)
