"""What finished runs change in an estimate, and what they never may."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from studio.core.calibration import (
    Observation,
    Setting,
    correct_estimate,
    correct_speed,
    errors_by_setting,
    matching,
    measured_speed,
    process_range,
)
from studio.core.gpu_catalogue import GIB, MIB, find_gpu
from studio.core.throughput import Speed
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import Setup
from tests.core.published_speed import model

CARD = Setting("NVIDIA GeForce RTX 4090", "studio 0.1.0", "qlora", (("torch", "2.13.0"),))
ESTIMATE = estimate_vram(model("Llama-3.1-8B"), Setup(seq_len=2048), find_gpu("4090"))
PREDICTED = (ESTIMATE.allocated.expected, ESTIMATE.reserved.expected, ESTIMATE.device.expected)
SPEED = Speed(1000, 2000, 4000, "a roofline")


def seen(*, tensors: float = 1.0, unused: float = 1.0, outside: int = 400 * MIB, **more: object) -> Observation:
    allocated = int(PREDICTED[0] * tensors)
    reserved = allocated + int((PREDICTED[1] - PREDICTED[0]) * unused)
    fields: dict[str, object] = {"run": "a", "at": 1.0, "setting": CARD, "predicted": PREDICTED}
    fields |= {"allocated_bytes": allocated, "reserved_bytes": reserved, "device_bytes": reserved + outside}
    return Observation(**(fields | more))  # type: ignore[arg-type]


def width(estimate: object, metric: str) -> int:
    found = getattr(estimate, metric)
    return int(found.high - found.low)


def test_only_runs_of_the_same_setting_count():
    others = [
        replace(CARD, device="NVIDIA A100"),
        replace(CARD, engine="studio 0.2.0"),
        replace(CARD, method="lora"),
        replace(CARD, versions=(("torch", "2.14.0"),)),
    ]
    observations = [seen(), *(seen(setting=other) for other in others)]
    assert matching(observations, CARD) == (observations[0],)
    assert correct_estimate(ESTIMATE, ()) is ESTIMATE
    assert correct_speed(SPEED, ()) is SPEED


def test_a_run_moves_the_uncertain_terms_and_narrows_the_range():
    one = correct_estimate(ESTIMATE, [seen(unused=0.5, outside=300 * MIB)])
    assert one.device.expected < ESTIMATE.device.expected
    measured = seen(unused=0.5, outside=300 * MIB)
    assert one.reserved.expected == pytest.approx(measured.reserved_bytes, rel=1e-6)
    assert one.device.expected == pytest.approx(measured.device_bytes, rel=1e-6)
    assert width(one, "device") < width(ESTIMATE, "device")
    assert any("1 finished run" in note for note in one.notes)
    many = correct_estimate(ESTIMATE, [seen(unused=0.5, outside=300 * MIB)] * 8)
    assert width(many, "device") < width(one, "device")


def test_components_add_up_to_the_corrected_peak():
    for optimizer in ("adamw_torch", "paged_adamw_32bit"):
        estimate = estimate_vram(model("Llama-3.1-8B"), Setup(seq_len=2048, optimizer=optimizer), find_gpu("4090"))
        found = correct_estimate(estimate, [seen(tensors=1.05, outside=900 * MIB)])
        before, after = estimate.components, found.components
        tensors = sum(getattr(after, name) for name in after.__slots__ if name != "context")
        assert tensors == pytest.approx(found.allocated.expected, abs=8)
        paged = estimate.device.expected - estimate.reserved.expected - before.context
        assert after.context == pytest.approx(900 * MIB - paged, abs=8)


def test_tensors_that_were_underestimated_are_never_called_safe_again():
    worse = correct_estimate(ESTIMATE, [seen(tensors=1.10), seen(tensors=1.0), seen(tensors=1.0)])
    assert worse.allocated.high >= int(PREDICTED[0] * 1.10)
    assert worse.device.high >= max(seen(tensors=1.10).device_bytes or 0, 0)


@given(
    st.lists(
        st.tuples(st.floats(0.5, 2), st.floats(0.21, 4), st.integers(0, 2 * GIB), st.floats(0.3, 3)),
        min_size=1,
        max_size=12,
    )
)
def test_what_was_measured_lies_in_the_corrected_range(values: list[tuple[float, float, int, float]]):
    runs = [seen(tensors=a, unused=b, outside=c, speed_factor=d) for a, b, c, d in values]
    found = correct_estimate(ESTIMATE, runs)
    speed = correct_speed(SPEED, runs)
    for run in runs:
        assert found.allocated.low - 2 <= (run.allocated_bytes or 0) <= found.allocated.high + 2
        assert (run.device_bytes or 0) <= found.device.high + 8
        assert speed.low <= SPEED.expected * (run.speed_factor or 0) * (1 + 1e-9)
    assert found.allocated.low <= found.allocated.expected <= found.allocated.high
    assert found.device.low <= found.device.expected <= found.device.high
    assert 0 <= speed.low <= speed.expected <= speed.high


@pytest.mark.parametrize(
    "broken",
    [
        {"allocated_bytes": None, "reserved_bytes": None, "device_bytes": None},
        {"allocated_bytes": 1, "reserved_bytes": 1, "device_bytes": 1},
        {"allocated_bytes": 2**49, "reserved_bytes": 2**50, "device_bytes": None},
        {"predicted": (0, 0, 0)},
    ],
)
def test_what_cannot_be_this_estimate_changes_nothing(broken: dict[str, object]):
    found = correct_estimate(ESTIMATE, [seen(**broken)])
    assert (found.allocated, found.reserved) == (ESTIMATE.allocated, ESTIMATE.reserved)


def test_speed_follows_what_was_measured():
    found = correct_speed(SPEED, [seen(speed_factor=0.8), seen(speed_factor=0.9), seen(speed_factor=1.0)])
    assert found.expected == pytest.approx(1800)
    assert found.low <= 1600
    assert found.high / found.low < SPEED.high / SPEED.low
    assert "3 finished" in found.basis


def test_a_cpu_is_known_only_by_its_own_runs():
    assert measured_speed(1e9, []) is None
    assert measured_speed(1e9, [seen()]) is None, "a run whose speed nobody measured"
    found = measured_speed(2e9, [seen(operations_per_second=4e10), seen(operations_per_second=6e10)])
    assert found is not None
    assert found.expected == pytest.approx(25)
    assert found.low <= 20
    assert found.high >= 30


def test_the_process_around_the_tensors_of_a_cpu_run():
    assert process_range([seen()]) is None
    runs = [seen(resident_bytes=PREDICTED[0] + extra * MIB) for extra in (700, 500, 900)]
    found = process_range([*runs, seen(resident_bytes=5)])
    assert found is not None
    assert (found.low, found.expected, found.high) == (500 * MIB, 700 * MIB, 900 * MIB)
    alone = process_range([seen(resident_bytes=PREDICTED[0] + 800 * MIB)])
    assert alone is not None
    assert alone.low < alone.expected == 800 * MIB < alone.high


def test_the_error_so_far_is_told_per_setting_newest_first():
    other = replace(CARD, device="NVIDIA A100")
    runs = [seen(tensors=1.25, at=1.0), seen(tensors=1.0, at=2.0), seen(setting=other, at=9.0, speed_factor=0.5)]
    first, second = errors_by_setting(runs)
    assert (first.setting, first.runs, second.runs) == (other, 1, 2)
    assert first.errors["speed"][0] == pytest.approx(1.0), "twice as fast expected as measured"
    median, worst = second.errors["tensors"]
    assert worst == pytest.approx(-0.2)
    assert median == pytest.approx(-0.1)


def test_what_only_earlier_runs_could_predict_is_compared_with_them():
    setting = replace(CARD, device="cpu: x")
    sizes = {"allocated_bytes": None, "reserved_bytes": None, "device_bytes": None}
    runs = [
        seen(setting=setting, at=float(at), operations_per_second=rate, resident_bytes=PREDICTED[0] + GIB, **sizes)
        for at, rate in enumerate((1e11, 2e11, 1.5e11))
    ]
    assert "speed" not in errors_by_setting(runs[:1])[0].errors
    (found,) = errors_by_setting(runs)
    assert found.errors["speed"] == (pytest.approx(-0.25), pytest.approx(-0.5)), "half as fast expected, then right"
    assert found.errors["process"] == (pytest.approx(0.0), pytest.approx(0.0))
    assert "tensors" not in found.errors
