"""A finished training run as an observation: what was predicted for the batches that ran, and what was measured."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from studio.core.calibration import Observation, matching, process_range
from studio.core.errors import StudioError
from studio.core.events import Planned
from studio.core.gpu_catalogue import Gpu, find_gpu
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.step_work import step_work
from studio.core.text import plain
from studio.core.throughput import speed_of
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of
from studio.probe.models import find_base
from studio.probe.setting import CARD_USED, CPU, setting_of
from studio.probe.shape import shape_of_base
from studio.runs.atomic import read_object, write_whole
from studio.runs.calibration import observation_to_dict, read_observations, remember
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import read_events

_WARM_UP_STEPS = 2
_LEAST_STEPS = 3
_STAGES_OF = {"load": ("load",), "backward": ("forward", "loss", "backward"), "eval": ("eval",), "save": ("save",)}
"""Which stages of an estimate lie between two readings of the counters, by the name of the later reading."""


def remember_run(paths: RunPaths, recipe: Recipe, now: float) -> str:
    """Keep what a run measured, in its own report and for later plans; return why that failed, empty if it did not.

    Args:
        paths: The run, at its end.
        recipe: What was trained.
        now: Unix seconds.
    """
    try:
        history = History()
        history.fold(read_events(paths.events))
        shape = shape_of_base(find_base(recipe.model.base, recipe.model.revision))
        seen = observe(paths.name, recipe, shape, history, now=now, others_bytes=_others_bytes(paths))
        if seen is not None:
            report = {"schema": 1, "estimate": observation_to_dict(seen)}
            write_whole(paths.report, json.dumps(report, indent=1, allow_nan=False) + "\n")
            remember(seen)
    except Exception as error:  # noqa: BLE001  a run that went well must not fail over its own statistics
        return plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)
    return ""


def observe(
    run: str, recipe: Recipe, shape: ModelShape, history: History, *, now: float, others_bytes: int | None = None
) -> Observation | None:
    """Return what a run measured; None where it took too few steps, or its log does not say on what it ran.

    Args:
        run: The run's name.
        recipe: What was trained.
        shape: The base model.
        history: The run's events.
        now: Unix seconds.
        others_bytes: What other processes held of the card when the run began.
    """
    started, planned = history.started, history.planned
    if started is None or planned is None or not planned.batch_tokens:
        return None
    if len(history.train.steps) < _WARM_UP_STEPS + _LEAST_STEPS:
        return None
    gpu = card_named(planned.device)
    setup = _setup_that_ran(recipe, planned)
    estimate = estimate_vram(shape, _as_it_ran(setup, planned.batch_tokens), gpu)
    memory = history.memory
    # What a form held that was too large says nothing about the one that took its place.
    peak, reserved, device = (
        _highest(series[history.as_now :]) for series in (memory.peak_bytes, memory.reserved_bytes, memory.device_bytes)
    )
    rate = _tokens_per_second(history)
    typical = _as_it_ran(setup, max(1, round(_tokens_per_step(history) / recipe.train.accumulation)))
    expected = speed_of(shape, typical, gpu)
    return Observation(
        run=run,
        at=now,
        setting=setting_of(planned.device, recipe.method, started.versions),
        predicted=(estimate.allocated.expected, estimate.reserved.expected, estimate.device.expected),
        allocated_bytes=peak,
        reserved_bytes=reserved,
        device_bytes=None if device is None or others_bytes is None else max(0, device - others_bytes),
        # The highest resident set since the process began is that of the larger form.
        resident_bytes=_highest(memory.resident_peak_bytes) if planned.device == CPU and not history.shrunk else None,
        operations_per_second=None if rate is None else rate * step_work(shape, typical).operations_per_token,
        speed_factor=None if rate is None or expected is None else rate / expected.expected,
        stages=_stages(estimate, history),
    )


def _others_bytes(paths: RunPaths) -> int | None:
    """Return what was in use on the card before the run's process existed, from its plan; None where it is unknown."""
    used = read_object(paths.plan).get(CARD_USED)
    return used if isinstance(used, int) and not isinstance(used, bool) and used >= 0 else None


def remember_refusal(paths: RunPaths, recipe: Recipe, planned: Planned, held: Mapping[str, int | None]) -> str:
    """Keep what a training held when memory was refused: it takes more than that, so later plans must, too.

    Only what is above the plan teaches anything: a card may have been full for other reasons.

    Args:
        paths: The run.
        recipe: As it ran.
        planned: What the run told of it.
        held: Readings as `MemorySeen` has them.

    Returns:
        Why that failed; empty where it did not.
    """
    try:
        if not planned.batch_tokens:
            return ""
        shape, gpu = shape_of_base(find_base(recipe.model.base, recipe.model.revision)), card_named(planned.device)
        estimate = estimate_vram(shape, _as_it_ran(_setup_that_ran(recipe, planned), planned.batch_tokens), gpu)
        setting = setting_of(planned.device, recipe.method)
        seen = Observation(
            run=f"{paths.name}, refused",
            at=planned.at,
            setting=setting,
            predicted=(estimate.allocated.expected, estimate.reserved.expected, estimate.device.expected),
            allocated_bytes=held.get("peak_bytes"),
            resident_bytes=held.get("resident_peak_bytes") if planned.device == CPU else None,
        )
        known = process_range(matching(read_observations(), setting))
        beyond = seen.process_bytes is not None and (known is None or seen.process_bytes > known.expected)
        if (seen.tensor_factor or 0.0) > 1.0 or beyond:
            remember(seen)
    except Exception as error:  # noqa: BLE001  a run that goes on must not fail over its own statistics
        return plain(f"{type(error).__name__}: {error}", one_line=True, limit=300)
    return ""


def _setup_that_ran(recipe: Recipe, planned: Planned) -> Setup:
    setup = setup_of(recipe.with_("model.dtype", planned.dtype))
    return replace(setup, device="cpu" if planned.device == CPU else "cuda")


def card_named(name: str) -> Gpu | None:
    """Return what the catalogue knows of a card by CUDA's name for it; None for the CPU and unknown cards."""
    if name == CPU:
        return None
    try:
        return replace(find_gpu(name), name=name)
    except StudioError:
        return None


def _as_it_ran(setup: Setup, tokens: int) -> Setup:
    """Return the set-up with micro-batches of so many tokens in all."""
    rows = min(setup.micro_batch, tokens)
    sequences = rows * setup.sequences // setup.micro_batch
    return replace(setup, micro_batch=rows, seq_len=max(1, -(-tokens // sequences)))


def _highest(series: Iterable[float]) -> int | None:
    known = [value for value in series if math.isfinite(value)]
    return int(max(known)) if known else None


def _tokens_per_second(history: History) -> float | None:
    """Return real tokens a second, without the first steps, which are slow since they compile and allocate."""
    seconds = sum(history.train.seconds[_WARM_UP_STEPS:])
    return sum(history.train.tokens[_WARM_UP_STEPS:]) / seconds if seconds > 0 else None


def _tokens_per_step(history: History) -> float:
    tokens = history.train.tokens[_WARM_UP_STEPS:]
    return sum(tokens) / len(tokens)


def _stages(estimate: VramEstimate, history: History) -> tuple[tuple[str, int, int], ...]:
    """Return predicted and measured peaks of the stages, or of several stages between two readings of the counters."""
    predicted, memory = dict(estimate.stages), history.memory
    measured: dict[str, int] = {}
    begin = history.as_now
    for name, peak in zip(memory.stages[begin:], memory.peak_bytes[begin:], strict=True):
        if math.isfinite(peak) and name in _STAGES_OF:
            measured[name] = max(measured.get(name, 0), int(peak))
    return tuple((name, max(predicted[stage] for stage in _STAGES_OF[name]), peak) for name, peak in measured.items())
