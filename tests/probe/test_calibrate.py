"""A CUDA run as an observation, from events as the job writes them; what it predicts is for its own batches."""

import pytest

from studio.core.calibration import Observation
from studio.core.events import Finished, MemorySeen, Planned, RunEvent, Started, StepDone
from studio.core.gpu_catalogue import GIB, MIB, find_gpu
from studio.core.recipe import Recipe
from studio.core.throughput import speed_of
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.probe.calibrate import observe
from studio.probe.setting import setting_of
from studio.runs.history import History
from tests.core.published_speed import model

LLAMA = model("Llama-3.1-8B")
RECIPE = Recipe().with_("train.seq_len", 2048).with_("train.micro_batch", 2).with_("train.accumulation", 2)
VERSIONS = {"torch": "2.13.0", "peft": "0.21.2", "textual": "8"}
NAME = "NVIDIA GeForce RTX 4090"


def story(*, batch_tokens: int | None = 4096, steps: int = 8, device: str = NAME) -> History:
    """A run of `steps` steps of 8192 tokens, 4 s each and the first 40 s."""
    events: list[RunEvent] = [
        Started(at=1.0, job="train", method="qlora", versions=VERSIONS),
        MemorySeen(at=2.0, step=0, stage="load", peak_bytes=6 * GIB, reserved_bytes=6 * GIB, device_bytes=7 * GIB),
        Planned(
            at=3.0,
            total_steps=steps,
            trainable_parameters=1,
            rows=10,
            held_out_rows=0,
            device=device,
            dtype="bf16",
            loss_path="chunked",
            batch_tokens=batch_tokens,
        ),
    ]
    for step in range(1, steps + 1):
        if step == 1:
            events.append(MemorySeen(at=4.0, step=1, stage="backward", peak_bytes=8 * GIB, reserved_bytes=9 * GIB))
        seconds = 40.0 if step == 1 else 4.0
        events.append(
            StepDone(at=5.0, step=step, loss=1.0, learning_rate=1e-4, grad_norm=1.0, tokens=8192, seconds=seconds)
        )
        events.append(
            MemorySeen(
                at=5.0,
                step=step,
                stage="step",
                peak_bytes=8 * GIB + MIB,
                reserved_bytes=9 * GIB,
                device_bytes=12 * GIB,
            )
        )
    events.append(Finished(at=9.0, outcome="done"))
    history = History()
    history.fold(events)
    return history


def observed(history: History, others_bytes: int | None = 2 * GIB) -> Observation:
    found = observe("run", RECIPE, LLAMA, history, now=9.0, others_bytes=others_bytes)
    assert found is not None
    return found


def test_what_was_measured_stands_beside_what_was_predicted_for_it() -> None:
    found = observed(story())
    gpu = find_gpu("4090")
    estimate = estimate_vram(LLAMA, setup_of(RECIPE), gpu)
    assert found.predicted == (
        estimate.allocated.expected,
        estimate.reserved.expected,
        estimate.device.expected,
    ), "the largest batch was as large as planned"
    assert (found.allocated_bytes, found.reserved_bytes) == (8 * GIB + MIB, 9 * GIB)
    assert found.device_bytes == 10 * GIB, "less what others held when it began"
    assert found.outside_bytes == 1 * GIB
    assert found.setting == setting_of("RTX 4090", "qlora", {"torch": "2.13.0", "peft": "0.21.2"})
    expected = speed_of(LLAMA, setup_of(RECIPE), gpu)
    assert expected is not None
    assert found.speed_factor == pytest.approx(2048 / expected.expected), "the slow first step is not counted"
    stages = {name: (before, after) for name, before, after in found.stages}
    assert stages["load"][1] == 6 * GIB
    predicted = dict(estimate.stages)
    assert stages["backward"] == (max(predicted[name] for name in ("forward", "loss", "backward")), 8 * GIB)
    assert found.resident_bytes is None


def test_shorter_batches_are_compared_with_an_estimate_for_shorter_batches() -> None:
    assert observed(story(batch_tokens=1024)).predicted[0] < observed(story()).predicted[0]


def test_without_knowing_the_others_the_card_says_nothing() -> None:
    found = observed(story(), others_bytes=None)
    assert found.device_bytes is None
    assert found.outside_bytes is None
    assert found.unused_factor is not None


def test_an_unknown_card_still_teaches_its_memory() -> None:
    found = observed(story(device="NVIDIA Something New"))
    assert found.setting.device == "NVIDIA Something New"
    assert found.speed_factor is None
    assert found.operations_per_second is not None
    assert found.resident_bytes is None, "it is no CPU"


@pytest.mark.parametrize(
    "history", [History(), story(batch_tokens=None), story(batch_tokens=0), story(steps=4)], ids=str
)
def test_what_says_too_little_is_no_observation(history: History) -> None:
    assert observe("run", RECIPE, LLAMA, history, now=9.0) is None
