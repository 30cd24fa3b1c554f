"""Memory of our engine, stage by stage: planned, traced, and as torch and the driver count it; budgets; a full card."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from studio.core.events import Finished
from studio.core.measured import height
from studio.core.recipe import Recipe
from studio.jobs.base.precision import half_format
from studio.jobs.measure import real
from studio.jobs.train.memory import _device_used, _nvml_handle, _own_device_bytes
from studio.probe.measure import read_measurement
from studio.probe.models import find_base
from studio.probe.plan import plan_for
from studio.runs.history import History
from studio.runs.job import write_job
from studio.runs.job_process import run_job
from studio.runs.layout import RunPaths
from studio.runs.requests import MeasureRequest
from studio.runs.worker import Worker
from tests.fakes.live_bytes import LiveBytes
from tests.gpu.bench import GIB, MIB, Bench, Seen, Wrong, capability, mib, need_embedded, need_free, replaced, table
from tests.gpu.faults import STAGES

TRACE_TOLERANCE = 0.05
"""How far a trace's peak may be from the measured one: kernels choose workspaces that a trace does not know."""
CPU_TOLERANCE = 0.05
"""The same for a rehearsal's: the CPU's own operators keep other things for their backward."""


class CardCounters:
    """torch's counters of the card, and the driver's."""

    def __init__(self, device: torch.device) -> None:
        self._context = torch.zeros(1, device=device)  # the driver lists a process once it has a context
        self._handle = _nvml_handle(device)
        own = _own_device_bytes(self._handle)
        self.whose = "this process" if own is not None else "all processes"

    def max_memory_allocated(self) -> int:
        """Return the peak since the last reset."""
        return torch.cuda.max_memory_allocated()

    def reset_peak_memory_stats(self) -> None:
        """Begin anew."""
        torch.cuda.reset_peak_memory_stats()

    def reserved(self) -> int | None:
        """Return the most that torch's allocator has held since the last reset."""
        return torch.cuda.max_memory_reserved()

    def driver(self) -> int | None:
        """Return what the driver counts now."""
        own = _own_device_bytes(self._handle)
        return own if own is not None else _device_used(self._handle)

    def track(self, tensors: Any) -> None:
        """Nothing: torch counts all."""


class HostCounters:
    """A rehearsal's: every tensor's bytes are followed, the driver's place is taken by the resident set."""

    whose = "rehearsed: the resident set"

    def __init__(self, storages: LiveBytes) -> None:
        self._storages = storages
        self._process = psutil.Process()

    def max_memory_allocated(self) -> int:
        """Return the peak since the last reset."""
        return self._storages.peak

    def reset_peak_memory_stats(self) -> None:
        """Begin anew."""
        self._storages.peak = self._storages.live

    def reserved(self) -> int | None:
        """A CPU's allocator keeps nothing that could be asked for."""
        return None

    def driver(self) -> int | None:
        """Return the resident set."""
        return int(self._process.memory_info().rss)

    def track(self, tensors: Any) -> None:
        """Count tensors that other threads read from the disk."""
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor):
                self._storages.track(tensor)


class StageMeter(real.CardMeter):
    """The measuring job's own meter, which also notes what the allocator and the driver hold at the end of a stage."""

    last: "StageMeter | None" = None

    def __init__(self, counters: Any) -> None:
        super().__init__(counters)
        self.reserved: dict[str, int] = {}
        self.driver: dict[str, int] = {}
        StageMeter.last = self

    def stage(self, name: str) -> None:
        """Say that a stage begins: the one before is over."""
        self._note()
        super().stage(name)

    def claim(self, tensors: Any, component: str) -> None:
        """Say what tensors belong to."""
        held = list(tensors)
        if component == "base":
            self._counters.track(held)  # type: ignore[attr-defined]
        super().claim(held, component)

    def peaks(self) -> Any:
        """Return the bytes of every stage at its highest point, by component."""
        self._note()
        return super().peaks()

    def _note(self) -> None:
        counters: Any = self._counters
        for kept, read in ((self.reserved, counters.reserved), (self.driver, counters.driver)):
            if self._stage and (seen := read()) is not None:
                kept[self._stage] = max(seen, kept.get(self._stage, 0))


def by_stage(bench: Bench, model: str, method: str, checkpointing: str) -> Seen:
    """Three steps on the longest rows: each stage planned, traced, allocated, reserved and as the driver counts it."""
    recipe = _recipe(bench, model, method, checkpointing == "checkpointing")
    plan = plan_for(recipe, find_base(recipe.model.base))
    assert plan.get("stages"), f"no estimate: {plan.get('why')}"
    need_free(bench, plan["high_bytes"])
    traced = _traced(bench, recipe)
    meter, measured = _measured(bench, recipe)
    rows = []
    for stage, seen in measured.items():
        cells = [plan["stages"].get(stage), traced.get(stage), seen, meter.reserved.get(stage), meter.driver.get(stage)]
        rows.append((stage, *(mib(cell) for cell in cells)))
    peak, told, planned = max(measured.values()), max(traced.values()), plan["peak_bytes"]
    highest = max(meter.driver.values(), default=0)
    whose = getattr(meter._counters, "whose", "")
    lines = (
        *table(("MiB", "planned", "traced", "allocated", "reserved", "driver"), rows),
        f"planned in all: reserved {mib(plan['reserved_bytes'])}, device {mib(plan['device_bytes'])}, at most "
        f"{mib(plan['high_bytes'])}; the driver's figure is of {whose}",
    )
    where = "rehearsed on the tiny model: " if bench.rehearsed and model != "tiny" else ""
    figures = {"planned": plan["stages"], "traced": traced, "allocated": measured}
    figures |= {"reserved": meter.reserved, "driver": meter.driver, "planned_high_bytes": plan["high_bytes"]}
    said = f"{where}peak {mib(peak)} MiB, traced {told / peak - 1:+.1%}, planned {planned / peak - 1:+.1%}"
    seen = Seen(said, lines, figures)
    most = CPU_TOLERANCE if bench.rehearsed else TRACE_TOLERANCE
    if abs(told - peak) > most * peak:
        raise Wrong(f"{said}: the trace is off by more than {most:.0%}", seen)
    if not bench.rehearsed and whose == "this process" and highest > plan["high_bytes"]:
        raise Wrong(
            f"{said}; the driver shows {mib(highest)} where the plan's high end is {mib(plan['high_bytes'])}", seen
        )
    return seen


def _recipe(bench: Bench, model: str, method: str, checkpointing: bool) -> Recipe:
    recipe = bench.long(method=method, train__recompute="all" if checkpointing else "none")
    recipe = recipe.with_("train.packing", "off").with_("train.steps", 3)
    if model == "tiny" or bench.rehearsed:
        # In a rehearsal the optimizer differs, so that no check is another's twin.
        optimizer = "adamw_torch" if model == "tiny" else "paged_adamw_8bit"
        recipe = recipe.with_("model.base", str(bench.shared / "tiny")).with_("train.optimizer", optimizer)
        return recipe.with_("model.dtype", "fp32").with_("train.seq_len", 256)
    need_embedded(bench)
    return recipe.with_("train.optimizer", "paged_adamw_8bit")


def _traced(bench: Bench, recipe: Recipe) -> dict[str, int]:
    """Return the peak of every stage in a trace without weights; a process of its own, since its tensors are fake."""
    dtype = recipe.model.dtype if recipe.model.dtype != "auto" else half_format(bench.place)
    request = MeasureRequest(recipe, "trace", bench.device, dtype, capability(bench))
    paths = bench.job(request, module="studio.jobs.measure")
    report = read_measurement(paths)
    assert report is not None, f"the trace left no report: {bench.history(paths).failed}"
    return {stage: height(parts) for stage, parts in report["peaks"].items()}


def _measured(bench: Bench, recipe: Recipe) -> tuple[StageMeter, dict[str, int]]:
    """Return the meter and the peaks of real steps in this process, by the measuring job's own function."""
    paths = RunPaths(Path(tempfile.mkdtemp(dir=bench.folder, prefix="run-")))
    write_job(paths, recipe)
    storages = LiveBytes()
    counters = HostCounters(storages) if bench.rehearsed else CardCounters(bench.place)
    seen: list[dict[str, int]] = []

    def body(worker: Worker) -> None:
        peaks, *_ = real.train_longest(worker, recipe, bench.place, counters)
        seen.append({stage: height(parts) for stage, parts in peaks.items()})
        worker.emit(Finished, outcome="done")

    with replaced(real, "CardMeter", StageMeter):
        if bench.rehearsed:
            with storages:
                run_job(paths.root, body)
        else:
            run_job(paths.root, body)
    failed = bench.history(paths).failed
    assert seen, f"the steps failed: {failed}"
    assert StageMeter.last is not None
    return StageMeter.last, seen[0]


def budget_kept(bench: Bench) -> Seen:
    """A run with enough of a budget stays within it; one with too little ends by its name, and within it as well."""
    recipe = bench.long(method="lora")
    if bench.rehearsed:
        history, most = _watched(bench, recipe.with_("device.budget_gib", 1.0))
        assert history.failed is None and most
        return Seen(f"rehearsed: a CPU has no budget to keep; resident set {mib(most)} MiB")
    need_embedded(bench)
    need_free(bench, 6 * GIB)
    _, free = _watched(bench, recipe)
    enough, short = (max(0.6, factor * free / GIB) for factor in (1.05, 0.7))
    kept, most = _watched(bench, recipe.with_("device.budget_gib", round(enough, 2)))
    assert kept.failed is None, f"{mib(free)} MiB without a budget, with one of {enough:.2f} GiB: {kept.failed}"
    assert most <= enough * GIB + MIB, f"{mib(most)} MiB of a budget of {enough:.2f} GiB"
    failed, least = _watched(bench, recipe.with_("device.budget_gib", round(short, 2)))
    assert failed.failed is not None, f"{mib(free)} MiB ran within a budget of {short:.2f} GiB"
    assert failed.failed.failure == "out_of_memory", failed.failed
    assert least <= short * GIB + MIB, f"{mib(least)} MiB of a budget of {short:.2f} GiB"
    shown = f"{mib(free)} MiB without a budget; {mib(most)} of {enough:.2f} GiB; {mib(least)} of {short:.2f} GiB, then"
    return Seen(f"{shown} {failed.failed.failure}", (), {"free_bytes": free, "kept_bytes": most, "short_bytes": least})


def _watched(bench: Bench, recipe: Recipe) -> tuple[History, int]:
    """Train, and return what the run told and the most that the driver counted for it, looked at 20 times a second."""
    paths = RunPaths(Path(tempfile.mkdtemp(dir=bench.folder, prefix="run-")))
    write_job(paths, recipe)
    process = bench.start("studio.jobs.train", str(paths.root), output=paths.output)
    read = _resident if bench.rehearsed else _on_card(bench)
    most, end = 0, time.monotonic() + 300
    while process.wait(0.05) is None:
        most = max(most, read(process.pid))
        assert time.monotonic() < end, "the run took more than 300 s"
    return bench.history(paths), most


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _on_card(bench: Bench) -> Callable[[int], int]:
    """Return what reads a process's bytes on the card; where none is told apart, what all have more than before."""
    import pynvml

    handle = _nvml_handle(bench.place)
    assert handle is not None, "NVML does not know this card"
    before = _device_used(handle) or 0

    def read(pid: int) -> int:
        listed = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        own = next((item.usedGpuMemory for item in listed if item.pid == pid), None)
        return own if own else max(0, (_device_used(handle) or 0) - before)

    return read


WORDS = {
    "load": "while loading",
    "optimizer": "in the optimizer's step",
    "eval": "while evaluating",
}
"""What a failure says of the stage; forward, loss and backward are a training's own work and need no word."""


def full_card(bench: Bench, stage: str) -> Seen:
    """The card is full from a stage on: the run ends as out of memory, with the stage's words and advice."""
    assert stage in STAGES, stage
    if not bench.rehearsed:
        need_embedded(bench)
        need_free(bench, 6 * GIB)
    recipe = bench.long(method="lora", eval__rows=2)
    paths = bench.job(recipe, f"oom:{stage}", bench.device, module="tests.gpu.faults")
    history = bench.history(paths)
    assert history.failed or history.finished, "the run ended without saying how"
    if stage == "save":
        assert history.failed is None, f"saving took memory of the card: {history.failed}"
        assert history.finished is not None and paths.adapter.is_dir()
        return Seen("rehearsed: saved" if bench.rehearsed else "saved: it takes nothing of the card")
    failed = history.failed
    assert failed is not None, "the run did not fail"
    assert failed.failure == "out_of_memory", f"named {failed.failure}: {failed.message}"
    assert "the card's memory is full" in failed.message, failed.message
    words = [word for word in WORDS.values() if word in failed.message]
    assert words == [WORDS[stage]] if stage in WORDS else not words, f"{stage}: {failed.message}"
    if stage == "load":
        assert "micro_batch" not in failed.advice, failed.advice
    return Seen(f"{failed.message.partition(': ')[0]}: {failed.advice[:60]} ...")
