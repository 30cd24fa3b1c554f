"""A finished training run as an observation: what was predicted for the batches that ran, and what was measured."""

import json
import math
import platform
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from studio import __version__
from studio.core.calibration import Observation, Setting
from studio.core.errors import StudioError
from studio.core.gpu_catalogue import Gpu, find_gpu
from studio.core.recipe import Recipe
from studio.core.shape import ModelShape
from studio.core.step_work import step_work
from studio.core.text import plain
from studio.core.throughput import speed_of
from studio.core.vram.estimate import VramEstimate, estimate_vram
from studio.core.vram.setup import Setup, setup_of
from studio.probe.models import find_base
from studio.probe.shape import shape_of_base
from studio.runs.atomic import write_whole
from studio.runs.calibration import observation_to_dict, remember
from studio.runs.history import History
from studio.runs.layout import RunPaths
from studio.runs.log import read_events

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
"""Whose versions decide how many bytes and seconds a step takes."""

CPU = "cpu"
CARD_USED = "card_used_bytes"
"""Key of `plan.json`: what was in use on the card when the run was planned, its own process not yet there."""

_WARM_UP_STEPS = 2
_LEAST_STEPS = 3
_CPU_INFO = Path("/proc/cpuinfo")
_STAGES_OF = {"load": ("load",), "backward": ("forward", "loss", "backward"), "eval": ("eval",), "save": ("save",)}
"""Which stages of an estimate lie between two readings of the counters, by the name of the later reading."""


def setting_of(device: str, method: str, versions: Mapping[str, str] | None = None) -> Setting:
    """Return what an observation on a device holds for.

    Args:
        device: A card's name as CUDA, NVML or the catalogue has it, or `cpu`.
        method: lora or qlora.
        versions: Library versions by name; None takes the installed ones.
    """
    named = f"cpu: {processor_name()}" if device == CPU else _catalogued(device)
    known = installed_versions() if versions is None else versions
    kept = tuple(sorted((name, known[name]) for name in LIBRARIES if name in known))
    return Setting(plain(named, one_line=True, limit=120), f"studio {__version__}", method, kept)


def _catalogued(name: str) -> str:
    try:
        return find_gpu(name).name
    except StudioError:
        return name


@lru_cache(maxsize=1)
def installed_versions() -> dict[str, str]:
    """Return the installed versions of the job's libraries, read without importing them."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@lru_cache(maxsize=1)
def processor_name() -> str:
    """Return what the processor calls itself, else what it is."""
    try:
        with _CPU_INFO.open(encoding="utf-8", errors="replace") as lines:
            named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        named = ""
    return named or platform.processor() or platform.machine() or "unknown"


def remember_run(paths: RunPaths, recipe: Recipe, now: float) -> str:
    """Keep what a run showed, in its own report and for later plans; return why that failed, or nothing.

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
    """Return what a run showed; None where it took too few steps to say anything, or does not say what it ran.

    Args:
        run: Its name.
        recipe: What was trained.
        shape: Its base model.
        history: Everything that it told.
        now: Unix seconds.
        others_bytes: What other processes held of the card when it began.
    """
    started, planned = history.started, history.planned
    if started is None or planned is None or not planned.batch_tokens:
        return None
    if len(history.train.steps) < _WARM_UP_STEPS + _LEAST_STEPS:
        return None
    gpu = None if planned.device == CPU else _card(planned.device)
    setup = setup_of(recipe.with_("model.dtype", planned.dtype))
    setup = replace(setup, device="cpu" if planned.device == CPU else "cuda")
    largest = _as_it_ran(setup, planned.batch_tokens)
    estimate = estimate_vram(shape, largest, gpu)
    memory = history.memory
    peak, reserved, device = (
        _highest(series) for series in (memory.peak_bytes, memory.reserved_bytes, memory.device_bytes)
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
        resident_bytes=_highest(memory.resident_peak_bytes) if planned.device == CPU else None,
        operations_per_second=None if rate is None else rate * step_work(shape, typical).operations_per_token,
        speed_factor=None if rate is None or expected is None else rate / expected.expected,
        stages=_stages(estimate, history),
    )


def _others_bytes(paths: RunPaths) -> int | None:
    """Return what the card held before the run's process existed, as its plan says."""
    try:
        used = json.loads(paths.plan.read_bytes())[CARD_USED]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return used if isinstance(used, int) and not isinstance(used, bool) and used >= 0 else None


def _card(name: str) -> Gpu | None:
    try:
        return replace(find_gpu(name), name=name)
    except StudioError:
        return None


def _as_it_ran(setup: Setup, tokens: int) -> Setup:
    """Return the set-up with micro-batches of so many tokens in all."""
    rows = min(setup.micro_batch, tokens)
    return replace(setup, micro_batch=rows, seq_len=max(1, -(-tokens // rows)))


def _highest(series: Iterable[float]) -> int | None:
    known = [value for value in series if math.isfinite(value)]
    return int(max(known)) if known else None


def _tokens_per_second(history: History) -> float | None:
    """Return real tokens a second after the first steps, which compile, allocate and are slow."""
    seconds = sum(history.train.seconds[_WARM_UP_STEPS:])
    return sum(history.train.tokens[_WARM_UP_STEPS:]) / seconds if seconds > 0 else None


def _tokens_per_step(history: History) -> float:
    tokens = history.train.tokens[_WARM_UP_STEPS:]
    return sum(tokens) / len(tokens)


def _stages(estimate: VramEstimate, history: History) -> tuple[tuple[str, int, int], ...]:
    """Return predicted and measured peak of the stages that the counters told apart."""
    predicted, memory = dict(estimate.stages), history.memory
    measured: dict[str, int] = {}
    for name, peak in zip(memory.stages, memory.peak_bytes, strict=True):
        if math.isfinite(peak) and name in _STAGES_OF:
            measured[name] = max(measured.get(name, 0), int(peak))
    return tuple((name, max(predicted[stage] for stage in _STAGES_OF[name]), peak) for name, peak in measured.items())
