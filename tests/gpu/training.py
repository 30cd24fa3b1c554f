"""Whole runs of the training job, each in a process of its own: losses, optimizers, resuming, faults.

Losses on a card are compared with losses on a CPU by tolerances, not by bits: the kernels differ, and the backward of
flash attention adds with atomics, in another order every time. `close` says the largest relative difference; "equal to
the bit" is printed where it is so. fp32 runs may be 5e-3 apart after five steps at this high rate, half formats 5e-2.
"""

import json
import os
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from studio.core.recipe import Recipe
from studio.jobs.base.precision import Precision
from studio.jobs.train.offload import PinnedCopies, offload_checkpoints
from studio.jobs.train.step_model import StepModel
from studio.runs.control import withdraw_all
from studio.runs.history import History
from studio.runs.last_words import kind_of_crash
from studio.runs.status import Status, run_status
from tests.fakes.tiny_model import tiny_config
from tests.gpu.bench import Bench, Seen, Skip, mib, need_dtype, need_embedded, need_package, worst
from tests.gpu.numbers import _adapted, apart, some_rows

FAULTS = "tests.gpu.faults"
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 5e-2}
_RESUMED = 1e-3
"""Resumed against uninterrupted, fp32 on one card: only the order of sums may differ."""
_PAGED_RANK = 1024
"""With it the tiny model's larger adapter matrices have more than the 1e5 numbers from which bitsandbytes pages."""


def close(found: Sequence[float], wanted: Sequence[float], allowed: float) -> str:
    """Return in words how far losses are apart.

    Raises:
        AssertionError: Too far.
    """
    most = worst(found, wanted)
    assert most <= allowed, f"losses {most:.1e} apart, allowed {allowed:.0e}: {list(found)}, {list(wanted)}"
    return "losses equal to the bit" if list(found) == list(wanted) else f"losses {most:.1e} apart"


def as_on_the_cpu(bench: Bench, method: str, dtype: str) -> Seen:
    """Five steps on the card and on the CPU."""
    need_dtype(bench, dtype)
    recipe = bench.tiny(method=method, model__dtype=dtype)
    found = bench.run(recipe).train.losses
    wanted = bench.run(recipe.with_("device.device", "cpu")).train.losses
    return Seen(close(found, wanted, TOLERANCE[dtype]), (), {"losses": list(found), "cpu_losses": list(wanted)})


def learns(bench: Bench, field: str, value: str, method: str = "lora") -> Seen:
    """The loss halves in 30 steps."""
    recipe = bench.tiny(method=method, train__steps=30, **{field: value})
    history = bench.run(recipe)
    losses = list(history.train.losses)
    assert losses[-1] < 0.5 * losses[0], f"loss {losses[0]:.3f} -> {losses[-1]:.3f}: {losses}"
    said = [warning.message for warning in history.warnings if warning.topic == "optimizer"]
    return Seen(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}{'; ' + said[0] if said else ''}", (), {"losses": losses})


def packed_as_padded(bench: Bench, method: str) -> Seen:
    """The same rows padded and packed have the same losses."""
    padded, tight = (bench.run(bench.tiny(method=method, train__packing=word)) for word in ("off", "on"))
    assert not _said(tight, "packing"), "rows were not packed"
    return Seen(close(tight.train.losses, padded.train.losses, TOLERANCE["fp32"]))


def switched(bench: Bench, topic: str, field: str, value: str, package: str = "", dtype: str = "fp32") -> Seen:
    """A switch of the recipe changes no loss, and is really on: the run does not say that it is not."""
    stand_in = ""
    if package and bench.rehearsed:
        # The package is for cards: the check is rehearsed with what the program itself has beside it.
        value = stand_in = {"liger": "full", "flash_attention_2": "eager"}[value]
    elif package:
        need_package(package)
    need_dtype(bench, dtype)
    if value == "flash_attention_2" and not bench.rehearsed and torch.cuda.get_device_capability() < (8, 0):
        raise Skip("no flash kernels: flash-attn wants compute capability 8.0")
    recipe = bench.tiny(model__dtype=dtype)
    plain, other = bench.run(recipe), bench.run(recipe.with_(field, value))
    said = _said(other, topic)
    assert not said, said
    word = f"rehearsed with {stand_in} in its place: " if stand_in else ""
    return Seen(word + close(other.train.losses, plain.train.losses, TOLERANCE[dtype]))


def compiled(bench: Bench) -> Seen:
    """Compiled layers have the plain losses; what compiling costs is printed."""
    if not bench.rehearsed:
        need_package("triton", what="torch.compile writes its kernels in it")
        if not shutil.which(os.environ.get("CC", "cc")) and not shutil.which("gcc"):
            raise Skip("no C compiler: Triton builds the launchers of its kernels with one")
    recipe = bench.tiny()
    plain = bench.run(recipe)
    words = ("traced", "cpu") if bench.rehearsed else ()
    other = bench.run(
        recipe.with_("train.compile", True), *words, module=FAULTS if bench.rehearsed else "studio.jobs.train"
    )
    assert not _said(other, "compile"), _said(other, "compile")
    word = "rehearsed without a compiler: " if bench.rehearsed else ""
    steps = f"{other.train.seconds[-1] * 1e3:.1f} ms a step, as written {plain.train.seconds[-1] * 1e3:.1f}"
    return Seen(f"{word}{close(other.train.losses, plain.train.losses, 1e-3)}; {steps}")


def resumed(bench: Bench, optimizer: str) -> Seen:
    """Stopped after three steps and continued: the losses of a run that was not, and pages are pages again."""
    paged = optimizer.startswith("paged")
    rank = {"adapter__rank": _PAGED_RANK, "train__learning_rate": 5e-4} if paged else {}
    recipe = bench.tiny(train__optimizer=optimizer, train__steps=6, adapter__dropout=0.1, **rank)
    whole = bench.run(recipe)
    paths = bench.job(recipe, "stop:3", bench.device, module=FAULTS)
    half = bench.history(paths)
    assert list(half.train.steps) == [1, 2, 3], f"stopped after {list(half.train.steps)}: {half.failed}"
    withdraw_all(paths)
    bench.job(recipe, "pages", bench.device, module=FAULTS, again=paths)
    history = bench.history(paths)
    assert history.failed is None, history.failed
    assert history.started is not None and history.started.resumed_from == 3, history.started
    assert list(history.train.steps) == [1, 2, 3, 4, 5, 6]
    said = close(history.train.losses, whole.train.losses, 0.0 if bench.rehearsed else _RESUMED)
    pages = json.loads((paths.root / "pages.json").read_text())
    if paged and not bench.rehearsed:
        assert pages["large"] and pages["paged"] == pages["large"], f"state resumed in {pages}: not all of it is paged"
    word = f"; {pages['paged']} of {pages['large']} large tensors of its state are paged" if paged else ""
    return Seen(said + word, (), {"losses": list(history.train.losses), "whole": list(whole.train.losses), **pages})


def overflow(bench: Bench, method: str) -> Seen:
    """fp16 whose gradients overflow at first: steps are skipped, the scale falls, and the run learns."""
    recipe = bench.tiny(method=method, model__dtype="fp16", train__steps=30)
    history = bench.run(recipe, "overflow", bench.device, module=FAULTS)
    norms, losses = list(history.train.grad_norms), list(history.train.losses)
    skipped = sum(not _finite(norm) for norm in norms)
    assert skipped, f"no step overflowed at a scale of 2**20: {norms}"
    assert all(_finite(norm) for norm in norms[-10:]), f"still overflowing at the end: {norms}"
    assert losses[-1] < 0.5 * losses[0], losses
    return Seen(
        f"{skipped} of {len(norms)} steps skipped, loss {losses[0]:.3f} -> {losses[-1]:.3f}", (), {"norms": norms}
    )


def named_fault(bench: Bench, fault: str, failure: str) -> Seen:
    """A fault of the card ends the run with the name that fits it, also where native code ends the process itself."""
    paths = bench.job(bench.tiny(), fault, bench.device, module=FAULTS)
    failed = bench.history(paths).failed
    if failed is not None:
        assert failed.failure == failure, f"named {failed.failure} ({failed.message}), wanted {failure}"
        word = "raised, not ended by exit(1); " if fault == "native" else ""
        return Seen(f"{word}{failed.failure}: {failed.message}")
    assert fault == "native", f"the run ended without an event: {paths.output.read_text('utf-8', 'replace')[-500:]}"
    assert run_status(paths) is Status.crashed, run_status(paths)
    kind = kind_of_crash(paths)
    last = paths.output.read_text("utf-8", "replace").strip().splitlines()[-1]
    assert kind == failure, f"a reader is told {kind}, wanted {failure}: {last}"
    return Seen(f"crashed, told as {kind}; its output ends with: {last}")


class HostCopies:
    """What `PinnedCopies` is, for a rehearsal: the host's copies are tensors of their own, nothing is shared."""

    def out(self, tensor: Tensor) -> Tensor:
        """Return a copy."""
        return tensor.detach().clone()

    def settle(self, host: Tensor) -> None:
        """A CPU has nothing to wait for."""

    def back(self, host: Tensor) -> Tensor:
        """Return a copy."""
        return host.clone()

    def arrived(self, coming: Tensor) -> Tensor:
        """Return it."""
        return coming


def offloaded_step(bench: Bench) -> Seen:
    """One step with checkpoints on the device and on the host: the same loss and gradients, in fp32."""
    results = []
    for moved in (False, True):
        torch.manual_seed(5)
        model = LlamaForCausalLM(tiny_config(num_hidden_layers=6)).to(bench.place)
        adapted = _adapted(model)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
        if moved:
            copies: Any = HostCopies() if bench.rehearsed else PinnedCopies(bench.place)
            moved_layers = offload_checkpoints(adapted, copies)
            assert moved_layers >= 6, f"{moved_layers} of 6 layers move their inputs"
        step_model = StepModel(adapted, "chunked", Precision("fp32", bench.place.type).autocast).train()
        from studio.jobs.train.objectives.supervised import collate

        loss = step_model(collate(some_rows(60, 60, 60, 60), 0, bench.place))
        loss.backward()
        results.append(
            (float(loss.detach()), {n: p.grad for n, p in step_model.named_parameters() if p.grad is not None})
        )
    (loss, gradients), (other, moved_gradients) = results
    most = max(apart(moved_gradients[name], gradients[name]) for name in gradients)
    # The bytes are the same bytes; only a kernel that adds in another order every time may differ.
    assert loss == other or abs(loss - other) <= 1e-6 * abs(loss), (loss, other)
    assert most <= 1e-5, f"gradients {most:.1e} apart"
    return Seen("equal to the bit" if loss == other and not most else f"gradients {most:.1e} apart")


def offloaded_run(bench: Bench) -> Seen:
    """Checkpoints on the host in a whole run: the same losses in less memory."""
    recipe = bench.long(train__recompute="all")
    if not bench.rehearsed:
        need_embedded(bench)
    here, there = (bench.run(recipe.with_("train.offload_checkpoints", moved)) for moved in (False, True))
    said = close(there.train.losses, here.train.losses, 0.0 if bench.rehearsed else 1e-2)
    if bench.rehearsed:
        assert _said(there, "offload"), "a CPU moves nothing, and the run says so"
        return Seen(f"rehearsed: {said}; a CPU moves nothing and says so")
    assert not _said(there, "offload"), _said(there, "offload")
    before, after = (highest(history, "peak") for history in (here, there))
    assert after < before, f"peak {mib(before)} MiB on the card, {mib(after)} with checkpoints on the host"
    return Seen(f"{said}; peak {mib(before)} -> {mib(after)} MiB", (), {"peak_bytes": before, "offloaded_bytes": after})


def streamed_run(bench: Bench, method: str) -> Seen:
    """A base of which all layers but one pass through buffers: the same losses, less memory, and what it costs in time.

    The run itself compares its gradients with those of copies that are waited for, before its first step.
    """
    recipe = bench.long(train__recompute="all", train__steps=4, method=method)
    if not bench.rehearsed:
        need_embedded(bench)
    layers = 1 if bench.rehearsed else 29
    whole, streamed = (bench.run(recipe.with_("model.stream", word)) for word in ("off", layers))
    said = close(streamed.train.losses, whole.train.losses, 0.0 if bench.rehearsed else 1e-2)
    if bench.rehearsed:
        assert _said(streamed, "streaming"), "a CPU saves nothing, and the run says so"
        return Seen(f"rehearsed: {said}; a CPU saves nothing and says so")
    before, after = (highest(history, "peak") for history in (whole, streamed))
    assert after < before, f"peak {mib(before)} MiB on the card, {mib(after)} with streamed layers"
    rates = [history.tokens_per_second or 0 for history in (whole, streamed)]
    figures = {"peak_bytes": before, "streamed_bytes": after, "tokens_per_second": rates[0], "streamed_rate": rates[1]}
    shown = f"peak {mib(before)} -> {mib(after)} MiB, {rates[0]:.0f} -> {rates[1]:.0f} tokens/s"
    return Seen(f"{said}; {shown}", (), figures)


def embedded(bench: Bench, method: str) -> Seen:
    """Ten steps on the embedded model: it learns; speed and memory as every counter saw them."""
    if not bench.rehearsed:
        need_embedded(bench)
    recipe = Recipe(name="gpu-check")
    size = (2, 64) if bench.rehearsed else (8, 256)
    for path, value in {
        "method": method,
        "train.micro_batch": size[0],
        "train.accumulation": 1,
        "train.seq_len": size[1],
        "train.steps": 10,
        "eval.rows": 4 if bench.rehearsed else 40,
        "eval.every": 0,
        "eval.samples": 1,
        "eval.sample_tokens": 8,
        "device.device": bench.device,
    }.items():
        recipe = recipe.with_(path, value)
    if bench.rehearsed:
        small = {"model.base": str(bench.shared / "tiny"), "train.learning_rate": 5e-3, "data.path": "embedded"}
        for path, value in small.items():
            recipe = recipe.with_(path, value)
    history = bench.run(recipe)
    first, last = history.evals[0].loss, history.evals[-1].loss
    assert last < first, f"held-out loss {first:.3f} -> {last:.3f}"
    peaks = {name: highest(history, name) for name in ("peak", "reserved", "device")}
    assert bench.rehearsed or (peaks["peak"] > 0 and peaks["reserved"] > 0), peaks
    speed = f"{history.tokens_per_second or 0:.0f} tokens/s"
    figures = ", ".join(f"{name} {mib(size)} MiB" for name, size in peaks.items())
    shown = f"held-out {first:.3f} -> {last:.3f}"
    figure = {"tokens_per_second": history.tokens_per_second, **{f"{k}_bytes": v for k, v in peaks.items()}}
    return Seen(
        f"rehearsed on the tiny model: {shown}" if bench.rehearsed else f"{speed}, {figures}, {shown}", (), figure
    )


def highest(history: History, counter: str) -> float:
    """Return the highest reading of a counter, 0 where there is none."""
    series = getattr(history.memory, f"{counter}_bytes")
    return max((size for size in series if _finite(size)), default=0.0)


def _said(history: History, topic: str) -> list[str]:
    return [warning.message for warning in history.warnings if warning.topic == topic]


def _finite(number: float | None) -> bool:
    return number is not None and number - number == 0
