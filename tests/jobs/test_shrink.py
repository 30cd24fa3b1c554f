"""`train.on_oom = "shrink"`: memory is really refused, and the training goes on, smaller, from its last step.

The address space of this process is limited at a chosen moment, so that the C library's own malloc fails. The limit is
lifted when the run frees what it can, as if another program had gone.
"""

import ctypes
import json
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from studio.core.events import Phase, RunEvent, Shrunk, StepDone
from studio.core.recipe import Recipe
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.jobs.train import between, checkpoint, job, loop, shrink
from studio.probe.pace import process_of
from studio.probe.shape import find_shape
from studio.runs.calibration import read_observations
from studio.runs.control import request, withdraw_all
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from studio.runs.status import Status, run_status
from studio.runs.summary import summary_of
from studio.runs.worker import Worker
from tests.fakes.tiny_model import make_tiny_model
from tests.jobs.conftest import Train, history_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="an address space is limited so on Linux alone")

_M_MMAP_THRESHOLD = -3
_SMALL, _USUAL = 16 * 2**10, 32 * 2**20
_LEFT = {
    "load": 2**20,
    "forward": 2**20,
    "optimizer": 4096,
    "save": 5 * 2**18,
    "adapter": 5 * 2**18,
    "eval": 2**15,
    "sample": 2**16,
}
"""What is left of the address space: enough for the interpreter, too little for the tensors of the moment, in bytes."""


def address_space_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


_LIBRARY: Any = ctypes.CDLL(None)
_MALLOC, _FREE = _LIBRARY.malloc, _LIBRARY.free
_MALLOC.restype, _MALLOC.argtypes, _FREE.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]


class Refusals:
    """Lets memory be refused at moments of a run, each once: `load`, `eval`, `sample`, `save`, `adapter`, or a step's.

    A moment is a name and, for `forward` and `optimizer`, the step.

    Attributes:
        then: Called after the first step that follows the last of them.
    """

    def __init__(self, moments: list[tuple[str, int]]) -> None:
        self.left = list(moments)
        self.refused: list[tuple[str, int]] = []
        self.then: Callable[[RunPaths], object] = lambda paths: None
        self._filled: list[int] = []
        self._limits = resource.getrlimit(resource.RLIMIT_AS)

    def at(self, moment: str, step: int = 0) -> None:
        if self.left and self.left[0] == (moment, step):
            self.refused.append(self.left.pop(0))
            self._fill()
            resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes() + _LEFT[moment], self._limits[1]))

    def _fill(self) -> None:
        """Take all that the C library has free, which it would give without asking the system."""
        resource.setrlimit(resource.RLIMIT_AS, (address_space_bytes(), self._limits[1]))
        while place := _MALLOC(_SMALL):
            self._filled.append(place)

    def lift(self) -> None:
        resource.setrlimit(resource.RLIMIT_AS, self._limits)
        while self._filled:
            _FREE(self._filled.pop())


_PHASES = {
    "loading the base model": "load",
    "evaluating": "eval",
    "answering": "sample",
    "saving a checkpoint": "save",
    "saving the adapter": "adapter",
}


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return a context in which memory is refused at moments."""

    @contextmanager
    def refuse(*moments: tuple[str, int]) -> Iterator[Refusals]:
        found, emit, loss_of, free = Refusals(list(moments)), Worker.emit, loop._loss_of, shrink.free_memory
        step = [0]

        def emitting(self: Worker, kind: type[RunEvent], **fields: Any) -> None:
            emit(self, kind, **fields)
            if kind is Phase and fields["name"] in _PHASES:
                found.at(_PHASES[fields["name"]])

        def losing(*args: Any) -> torch.Tensor:
            found.at("forward", step[0] + 1)
            return loss_of(*args)

        def optimizing(*called: Any) -> None:
            found.at("optimizer", step[0] + 1)

        def stepped(self: between.Between, state: checkpoint.TrainState) -> bool:
            step[0] = state.step
            if not found.left:
                found.then(self.worker.paths)
            return after_step(self, state)

        def freeing() -> None:
            found.lift()
            free()

        after_step = between.Between.after_step
        with monkeypatch.context() as patch:
            patch.setattr(Worker, "emit", emitting)
            patch.setattr(loop, "_loss_of", losing)
            patch.setattr(between.Between, "after_step", stepped)
            for module in (shrink, job):
                patch.setattr(module, "free_memory", freeing)
            hook = register_optimizer_step_pre_hook(optimizing)
            _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _SMALL)  # larger ones are asked of the system, which refuses them
            try:
                yield found
            finally:
                found.lift()
                hook.remove()
                _LIBRARY.mallopt(_M_MMAP_THRESHOLD, _USUAL)

    return refuse


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("wide") / "wide", hidden_size=256, intermediate_size=512)


@pytest.fixture
def recipe(recipe: Recipe, wide: Path) -> Recipe:
    settings: dict[str, Any] = {
        "model.base": str(wide),
        "train.on_oom": "shrink",
        "train.micro_batch": 4,
        "train.accumulation": 1,
        "train.steps": 6,
        "train.schedule": "cosine",
        "train.checkpoint_every": 3,
        "adapter.rank": 64,
        "eval.rows": 2,
        "eval.every": 3,
        "eval.samples": 1,
        "eval.sample_tokens": 4,
    }
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    return recipe


EVERY_PHASE = [
    ("load", 0),
    ("eval", 0),
    ("sample", 0),
    ("optimizer", 1),
    ("forward", 2),
    ("save", 0),
    ("forward", 5),
    ("adapter", 0),
]
CASES = {
    "lora": ({}, EVERY_PHASE),
    "qlora-8bit": (
        {"method": "qlora", "train.optimizer": "adamw_8bit"},
        [("optimizer", 1), ("optimizer", 3), ("forward", 4), ("adapter", 0)],
    ),
    "packed": ({"train.packing": "on"}, [("eval", 0), ("forward", 1), ("forward", 3), ("forward", 4), ("adapter", 0)]),
    "recomputed": (
        {"train.recompute": "all"},
        [("sample", 0), ("forward", 2), ("save", 0), ("optimizer", 4)],
    ),
}
"""Settings, and the moments at which memory is refused: more than twenty in all."""


def refusals_of(paths: RunPaths) -> list[Shrunk]:
    return [event for event in read_events(paths.events) if isinstance(event, Shrunk)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_refused_memory_costs_no_step_and_changes_no_loss(
    train: Train, recipe: Recipe, refusing: Callable[..., Any], case: str
) -> None:
    settings, moments = CASES[case]
    for path, value in settings.items():
        recipe = recipe.with_(path, value)
    whole = train(recipe)
    with refusing(*moments) as found:
        paths = train(recipe)
    assert found.refused == moments
    told = refusals_of(paths)
    assert len(told) == len(moments), [event.words for event in told]
    seen, wanted = history_of(paths), history_of(whole)
    assert seen.finished is not None
    assert seen.finished.outcome == "done"
    steps = [event.step for event in read_events(paths.events) if isinstance(event, StepDone)]
    assert steps == list(range(1, 7)), "none is lost, and none is taken twice"
    assert list(seen.train.losses) == pytest.approx(list(wanted.train.losses), rel=1e-5)
    assert list(seen.train.tokens) == list(wanted.train.tokens)
    assert seen.evals[-1].loss == pytest.approx(wanted.evals[-1].loss, rel=1e-5)
    warned = [event.message for event in seen.warnings if event.topic == "memory"]
    assert len(warned) == len(moments)
    assert all("memory is full" in message for message in warned)
    assert summary_of(paths, seen, Status.finished)["shrunk"] == [
        {"step": event.step, "stage": event.stage, "words": event.words} for event in told
    ]


def test_at_least_twenty_are_tried() -> None:
    assert sum(len(moments) for _, moments in CASES.values()) >= 20


@pytest.mark.slow
def test_a_resume_takes_the_smaller_form_and_equals_the_run_that_went_on(
    train: Train, recipe: Recipe, refusing: Callable[..., Any]
) -> None:
    recipe = recipe.with_("adapter.dropout", 0.2)
    moments = [("forward", 2), ("forward", 3)]
    with refusing(*moments):
        whole = train(recipe)
    with refusing(*moments) as found:
        found.then = lambda paths: request(paths, "stop")
        parts = train(recipe)
    assert run_status(parts) is Status.stopped
    withdraw_all(parts)
    train(recipe, again=parts)
    seen, wanted = history_of(parts), history_of(whole)
    assert json.loads(parts.shrunk.read_text())["train.micro_batch"] == 1
    assert "micro_batch = 4" in parts.recipe.read_text()
    assert seen.planned is not None
    assert wanted.planned is not None
    assert seen.planned.batch_tokens == wanted.planned.batch_tokens
    assert list(seen.train.losses) == list(wanted.train.losses)
    assert list(seen.train.grad_norms) == list(wanted.train.grad_norms)
    plain = history_of(train(recipe))
    assert list(seen.train.tokens) == list(plain.train.tokens), "with dropout the rows of each step are the same"


@pytest.mark.slow
def test_rows_of_like_length_stay_in_their_steps(train: Train, recipe: Recipe, refusing: Callable[..., Any]) -> None:
    recipe = recipe.with_("train.group_by_length", True).with_("train.micro_batch", 2).with_("train.accumulation", 1)
    recipe = recipe.with_("eval.rows", 0).with_("eval.samples", 0)
    whole = train(recipe)
    with refusing(("forward", 2)):
        paths = train(recipe)
    assert list(history_of(paths).train.losses) == pytest.approx(list(history_of(whole).train.losses), rel=1e-5)


def test_where_nothing_is_left_it_stops_with_advice(train: Train, recipe: Recipe, refusing: Callable[..., Any]) -> None:
    recipe = recipe.with_("train.micro_batch", 1).with_("train.recompute", "all")
    with refusing(("forward", 3)):
        paths = train(recipe)
    history = history_of(paths)
    assert history.failed is not None
    assert history.failed.failure == "out_of_memory"
    assert "train.recompute" in history.failed.advice
    assert not refusals_of(paths)


def test_a_refusal_is_a_lesson_for_the_next_plan(
    train: Train, recipe: Recipe, refusing: Callable[..., Any], own_calibration: Path
) -> None:
    with refusing(("forward", 2)):
        paths = train(recipe.with_("train.steps", 3))
    (seen,) = read_observations(own_calibration)
    assert seen.run == f"{paths.name}, refused"
    assert seen.process_bytes is not None
    setup = setup_of(recipe)
    planned = process_of(estimate_vram(find_shape(recipe.model.base), setup), setup)
    assert planned is not None
    assert planned.high >= seen.resident_bytes - seen.predicted[0]
