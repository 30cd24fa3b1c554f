"""What a step costs: launches, waits, milliseconds, tokens a second beside others. Printed, never judged.

What is judged here is only that the figure could be taken: a card of another size, or one that others use, is as good.
"""

import statistics
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM

from studio.core.recipe import TrainSection
from studio.jobs.base.precision import choose_precision
from studio.jobs.train.batches import StepBatches
from studio.jobs.train.checkpoint import TrainState
from studio.jobs.train.loop import LoopParts, train
from studio.jobs.train.memory import MemoryWatch
from studio.jobs.train.optimizer import build_optimizer
from studio.jobs.train.step_model import StepModel
from tests.fakes.tiny_model import tiny_config
from tests.gpu.bench import Bench, Seen, Skip, need_embedded, replaced, table
from tests.gpu.numbers import _adapted, _in_four_bits, batcher_of, some_rows

_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx")
_VIEWS = ("view", "t", "transpose", "expand", "slice", "select", "unsqueeze", "squeeze", "detach", "alias", "permute",
          "_unsafe_view", "split", "split_with_sizes", "as_strided", "unbind", "_reshape_alias")  # fmt: skip
WAITING = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::item")
"""Operators that make the host wait for a card, as a CPU's dispatch sees them."""


def launches(bench: Bench, method: str) -> Seen:
    """Kernel launches of a layer and micro-batch: those of four layers less those of two, halved."""
    counts = {}
    for layers in (2, 4):
        step_model, batch = _model(bench, method, layers)
        for _ in range(2):  # the first one chooses kernels and takes memory
            counts[layers] = _counted(bench, step_model, batch)
    each = {name: (counts[4][name] - counts[2][name]) / 2 for name in ("forward", "backward")}
    if not any(counts[2].values()):
        raise Skip("torch's profiler sees no launches here: CUPTI is missing or not permitted")
    assert all(value > 0 for value in each.values()), counts
    word = "operators that compute (rehearsed)" if bench.rehearsed else "kernel launches"
    said = f"{each['forward']:.0f} forward and {each['backward']:.0f} backward {word} a layer"
    whole = f"a model of two layers takes {counts[2]['forward']} and {counts[2]['backward']} in all"
    return Seen(f"{said}; {whole}", (), {**each, "two_layers": counts[2]})


def _model(bench: Bench, method: str, layers: int) -> tuple[StepModel, dict[str, Any]]:
    precision = choose_precision("auto", bench.place)
    torch.manual_seed(5)
    model = LlamaForCausalLM(tiny_config(num_hidden_layers=layers)).to(precision.dtype).to(bench.place)
    if method == "qlora":
        _in_four_bits(model, bench, precision.dtype)
    step_model = StepModel(_adapted(model), "chunked", precision.autocast).train()
    return step_model, batcher_of(bench).batch(some_rows(32, 32, 32, 32))


def _counted(bench: Bench, step_model: StepModel, batch: dict[str, Any]) -> dict[str, int]:
    step_model.zero_grad(set_to_none=True)
    made: dict[str, Any] = {}

    def forward() -> None:
        made["loss"] = step_model(batch)

    def backward() -> None:
        made["loss"].backward()

    count = _operators if bench.rehearsed else _kernels
    return {"forward": count(forward), "backward": count(backward)}


def _kernels(act: Callable[[], None]) -> int:
    """Return the launches that CUPTI saw; torch.profiler reads them."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        act()
        torch.cuda.synchronize()
    return launched(seen.events())


def launched(events: Any) -> int:
    """Return how many of a profile's events are launches; of the kernels themselves where the runtime's are missing."""
    names = Counter(str(event.name) for event in events)
    runtime = sum(names[name] for name in _LAUNCHES)
    kernels = [event for event in events if "CUDA" in str(event.device_type) and "mem" not in str(event.name).lower()]
    return runtime or len(kernels)


class _Operators(TorchDispatchMode):
    """Counts the operators that compute something: on a card each is a launch or a few."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func._schema.name)
        if name.removeprefix("aten::") not in _VIEWS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


def _operators(act: Callable[[], None]) -> int:
    with _Operators() as mode:
        act()
    return mode.seen.total()


def synchronisations(bench: Bench, method: str) -> Seen:
    """How often a training step makes the host wait for the card, and where."""
    counted: Counter[str] = Counter()
    steps = 4
    with _Listening(bench, counted):
        _train(bench, method, steps)
    lines = tuple(f"{count / steps:6.1f} a step  {where}" for where, count in counted.most_common(12))
    word = "rehearsed: operators that would wait" if bench.rehearsed else "waits"
    return Seen(f"{counted.total() / steps:.1f} {word} a step", lines, {"a_step": counted.total() / steps, **counted})


class _Listening:
    """Counts what waits: torch's own warnings on a card, and on a CPU the operators that would."""

    def __init__(self, bench: Bench, counted: Counter[str]) -> None:
        self._rehearsed, self._counted = bench.rehearsed, counted
        self._mode = _Operators()
        self._warnings: Any = None

    def __enter__(self) -> None:
        if self._rehearsed:
            self._mode.__enter__()
            return
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        warnings.simplefilter("always")
        warnings.showwarning = self._note  # type: ignore[assignment]
        torch.cuda.set_sync_debug_mode("warn")

    def __exit__(self, *error: Any) -> None:
        if self._rehearsed:
            self._mode.__exit__(*error)
            self._counted.update({name: self._mode.seen[name] for name in WAITING if self._mode.seen[name]})
            return
        torch.cuda.set_sync_debug_mode("default")
        self._warnings.__exit__(*error)

    def _note(self, message: Any, category: Any, filename: str, lineno: int, *more: Any) -> None:
        if "synchroniz" in str(message):
            self._counted[f"{filename.rpartition('/')[2]}:{lineno}"] += 1


def optimizer_milliseconds(bench: Bench) -> Seen:
    """What the step of every optimizer takes, beside the whole training step."""
    found: dict[str, tuple[float, float]] = {}
    for kind in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"):
        inner: list[float] = []
        steps = _train(bench, "lora", 6, kind=kind, inner=inner)
        found[kind] = statistics.median(inner[2:]), statistics.median(steps[2:])
    word = "rehearsed on a CPU, " if bench.rehearsed else ""
    lines = table(("ms", "optimizer", "step"), [(k, f"{a * 1e3:.2f}", f"{b * 1e3:.2f}") for k, (a, b) in found.items()])
    return Seen(f"{word}of the tiny model's adapter", lines, {k: a * 1e3 for k, (a, _) in found.items()})


def _train(
    bench: Bench, method: str, steps: int, *, kind: Any = "adamw_torch", inner: list[float] | None = None
) -> list[float]:
    """Run the training loop itself on the tiny model; return the seconds of every step."""
    precision = choose_precision("auto", bench.place)
    step_model, _ = _model(bench, method, 2)
    optimizer = build_optimizer(
        step_model.named_parameters(),
        kind=kind,
        learning_rate=1e-3,
        weight_decay=0.0,
        device=bench.place,
        warn=lambda message: None,
    )
    seconds: list[float] = []

    def emit(event: type, **fields: Any) -> None:
        if event.__name__ == "StepDone":
            seconds.append(fields["seconds"])

    parts = LoopParts(
        step_model=step_model,
        optimizer=optimizer,
        scaler=precision.scaler(),
        batches=StepBatches(some_rows(*range(20, 36)), batcher_of(bench), rows_per_step=8, seed=1),
        device=bench.place,
        memory=MemoryWatch(emit, bench.place),
        emit=emit,
    )
    section = TrainSection(learning_rate=1e-3, schedule="constant", warmup_fraction=0)
    start = TrainState(step=0, tokens=0, seconds=0.0, scaler={})
    if inner is not None:
        _timed(bench, optimizer, inner)
    train(parts, section, steps, start, lambda progress: False)
    return seconds


def _timed(bench: Bench, optimizer: torch.optim.Optimizer, inner: list[float]) -> None:
    """Note how long each of the optimizer's steps takes, with all that it gave the card to do."""
    import time

    began: list[float] = []

    def settle() -> float:
        if not bench.rehearsed:
            torch.cuda.synchronize()
        return time.perf_counter()

    optimizer.register_step_pre_hook(lambda *_: began.append(settle()))
    optimizer.register_step_post_hook(lambda *_: inner.append(settle() - began[-1]))


def engines(bench: Bench, method: str, micro_batch: str, accumulation: str) -> Seen:
    """Useful tokens a second of our loop, HF Trainer, TRL and Unsloth, where installed; a process for each."""
    from tests.bench import bench_train

    if not bench.rehearsed:
        need_embedded(bench)
    more = {"base": str(bench.shared / "tiny")} if bench.rehearsed else {}
    steps = 3 if bench.rehearsed else 12
    rows = []
    figures: dict[str, Any] = {}
    with replaced(bench_train, "DEVICE", bench.device):
        for engine in bench_train.ENGINES:
            report = bench_train.measure(
                engine,
                method=method,
                steps=steps,
                micro_batch=int(micro_batch),
                accumulation=int(accumulation),
                run=lambda engine, words: _engine(bench, engine, words),
                **more,
            )
            if missing := report.get("missing"):
                rows.append((engine, "-", "-", "-", f"not installed: {missing}"))
                continue
            timed = slice(bench_train.WARM_UP_STEPS, None)
            seconds = statistics.median(report["wall_seconds"][timed])
            speed = sum(report["step_tokens"][timed]) / sum(report["wall_seconds"][timed])
            ours = figures.get("studio", speed)
            figures[engine] = speed
            last = f"{report['losses'][0]:.3f} -> {report['losses'][-1]:.3f}"
            rows.append((engine, f"{seconds * 1e3:.0f}", f"{speed:.0f}", f"{ours / speed:.2f}", last))
    assert "studio" in figures and "hf" in figures, figures
    lines = table(("engine", "ms a step", "tokens/s", "ours / its", "loss"), rows)
    beside = ", ".join(f"{name} {value:.0f}" for name, value in figures.items())
    return Seen(f"{'rehearsed on the tiny model, ' if bench.rehearsed else ''}tokens/s: {beside}", lines, figures)


def _engine(bench: Bench, engine: str, words: str) -> tuple[str, str]:
    """Run one engine in a process of its own; return what it printed and the end of it."""
    output = bench.folder / f"{engine}.log"
    output.unlink(missing_ok=True)
    code = bench.start("tests.bench.engines", engine, words, output=output).wait(240)
    text = output.read_text("utf-8", "replace")
    return text, f"exit code {code}\n{text}"
