"""Compiled layers: the plain step's losses and gradients, its cost said, and layers as written where it cannot be."""

import logging
import time
from typing import Any

import pytest
import torch

from studio.core.recipe import Recipe
from studio.jobs.train import compiled
from studio.jobs.train.batches import Batcher
from studio.jobs.train.compiled import compile_layers, compile_step
from studio.jobs.train.offload import offload_checkpoints
from studio.jobs.train.packing import can_pack
from studio.jobs.train.step_model import StepModel
from studio.runs.layout import RunPaths
from studio.runs.log import read_events
from tests.jobs.conftest import Train, history_of
from tests.jobs.test_exactness import TIGHT, result_of, step_model_of
from tests.jobs.test_offload import HostBytes
from tests.jobs.test_packing import PADDED, rows

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def traced_only(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch traces the layers and runs what it traced with its own operators: no code is generated."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    # pytest's handler on the root logger makes torch write its structured trace, which takes most of the time.
    trace = logging.getLogger("torch.__trace")
    monkeypatch.setattr(trace, "propagate", False)
    monkeypatch.setattr(trace, "disabled", True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def told() -> tuple[list[str], Any]:
    details: list[str] = []
    return details, lambda name, fraction=None, detail="": details.append(detail)


def close(one: tuple[float, dict[str, Any]], other: tuple[float, dict[str, Any]], relative: float = 1e-5) -> None:
    assert one[0] == pytest.approx(other[0], rel=relative)
    assert one[1].keys() == other[1].keys()
    for name, gradient in other[1].items():
        assert (one[1][name] - gradient).norm() <= relative * gradient.norm(), name


@pytest.mark.slow
def test_the_same_losses_and_gradients() -> None:
    step_model = step_model_of("untied", "lora", "chunked")
    wanted = result_of(step_model, PADDED)
    details, tell = told()
    assert not compile_step(step_model, PADDED.batch(rows(20, 5)), tell, CPU)
    assert details[-1].startswith("ready after")
    assert all(parameter.grad is None for parameter in step_model.parameters())
    close(result_of(step_model, PADDED), wanted)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "layers were traced"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "method"), [("untied", "lora"), ("checkpointing", "nf4")])
def test_the_same_for_packed_rows_and_four_bits(case: str, method: str) -> None:
    step_model = step_model_of(case, method, "chunked")
    wanted = result_of(step_model, PADDED)
    assert can_pack(step_model, rows(12, 15), CPU)
    assert not compile_step(step_model, TIGHT.batch(rows(20, 5)), told()[1], CPU)
    for way in (TIGHT, PADDED):
        close(result_of(step_model, way), wanted)


@pytest.mark.slow
def test_one_trace_for_all_layers_and_lengths() -> None:
    step_model = step_model_of("untied", "lora", "chunked")
    compile_layers(step_model.causal)
    for lengths in ((20, 5, 9), (7, 6, 5), (31, 30, 2), (12, 12, 12)):
        step_model(PADDED.batch(rows(*lengths))).backward()
    # The first layer's input wants no gradient, the others' do; and a batch without padding has no mask.
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 4


@pytest.mark.slow
def test_checkpoints_on_the_host_go_together_with_it() -> None:
    step_model = step_model_of("checkpointing", "lora", "chunked")
    wanted = result_of(step_model, PADDED)
    copies = HostBytes()
    offload_checkpoints(step_model, copies)
    compile_layers(step_model.causal)
    close(result_of(step_model, PADDED), wanted)
    assert "arrived" in copies.log


def test_evaluation_runs_as_written() -> None:
    step_model = step_model_of("untied", "lora", "chunked")
    compile_layers(step_model.causal)
    step_model.eval()
    with torch.no_grad():
        step_model(PADDED.batch(rows(20, 5)))
    assert torch._dynamo.utils.counters["frames"]["ok"] == 0


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


def wrong(graph: Any, inputs: Any) -> Any:
    def run(*args: Any) -> Any:
        return tuple(part * 1.5 if part.is_floating_point() else part for part in graph(*args))

    return run


@pytest.mark.parametrize(("backend", "word"), [(broken, "no compiler here"), (wrong, "the compiled loss is")])
@pytest.mark.parametrize("case", ["untied", pytest.param("checkpointing", marks=pytest.mark.slow)])
def test_what_fails_or_is_wrong_runs_as_written(
    monkeypatch: pytest.MonkeyPatch, case: str, backend: Any, word: str
) -> None:
    step_model = step_model_of(case, "lora", "chunked")
    wanted = result_of(step_model, PADDED)
    monkeypatch.setattr(compiled, "BACKEND", backend)
    assert word in compile_step(step_model, PADDED.batch(rows(20, 5)), told()[1], CPU)
    got = result_of(step_model, PADDED)
    assert got[0] == wanted[0]
    assert all(torch.equal(got[1][name], gradient) for name, gradient in wanted[1].items())


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no room"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
)
def test_a_batch_that_does_not_fit_or_a_lost_card_is_not_hidden(
    monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    step_model = step_model_of("untied", "lora", "chunked")

    def full(self: StepModel, batch: dict[str, Any]) -> torch.Tensor:
        raise error

    monkeypatch.setattr(StepModel, "forward", full)
    with pytest.raises(RuntimeError, match=str(error)):
        compile_step(step_model, PADDED.batch(rows(20, 5)), told()[1], CPU)


def costs(paths: RunPaths) -> list[Any]:
    phases = [event for event in read_events(paths.events) if getattr(event, "name", "") == "compiling the layers"]
    return [phase.detail for phase in phases if phase.detail]


@pytest.mark.slow
def test_a_run_says_what_compiling_cost_or_why_it_was_not(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = history_of(train(recipe))
    recipe = recipe.with_("train.compile", True)
    paths = train(recipe)
    history = history_of(paths)
    assert history.failed is None, history.failed
    assert not history.warnings
    assert len(costs(paths)) == 1
    assert list(history.train.losses) == pytest.approx(list(plain.train.losses), rel=1e-4)
    monkeypatch.setattr(compiled, "BACKEND", broken)
    torch._dynamo.reset()
    history = history_of(train(recipe))
    assert [warning.topic for warning in history.warnings] == ["compile"]
    assert list(history.train.losses) == list(plain.train.losses)


@pytest.mark.slow
def test_generated_code_gives_the_same_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's code generator and a compiler, on this processor."""
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    step_model = step_model_of("untied", "lora", "chunked")
    wanted = result_of(step_model, PADDED)
    began = time.perf_counter()
    details, tell = told()
    assert not compile_step(step_model, Batcher(4, 0, CPU).batch(rows(17, 9, 20, 4)), tell, CPU)
    assert int(details[-1].split()[2]) <= round(time.perf_counter() - began)
    close(result_of(step_model, PADDED), wanted, 1e-4)
