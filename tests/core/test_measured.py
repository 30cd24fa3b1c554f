"""A measurement beside its estimate: which numbers are seen, which are estimated, and what is said to be unknown."""

from typing import Any

import pytest

from studio.core.measured import measured_plan
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import plan_to_dict
from studio.core.vram.setup import Setup

GIB = 2**30
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "vocab_size": 4096,
}
PEAKS = {
    "load": {"base": 2 * GIB},
    "backward": {"base": 2 * GIB, "adapter": GIB, "activations": GIB, "paged": 7 * GIB, "host": 9 * GIB},
    "optimizer": {"base": 2 * GIB, "adapter": GIB, "gradients": GIB // 2},
}


def plan(budget: int | None = None) -> dict[str, Any]:
    shape, setup = shape_from_config(CONFIG), Setup()
    return plan_to_dict(estimate_vram(shape, setup), shape, setup, budget_bytes=budget)


def report(**more: Any) -> dict[str, Any]:
    return {"source": "trace", "peaks": PEAKS, "trainable_parameters": 7, "seconds": 1.5, **more}


def test_it_has_every_field_of_a_plan() -> None:
    document = measured_plan(plan(), report())
    assert plan().keys() <= document.keys()
    assert document["peak_bytes"] == 4 * GIB == document["stages"]["backward"], "paged and host bytes are elsewhere"
    assert document["stage"] == "backward"
    parts = document["components"]
    assert sum(size for name, size in parts.items() if name != "context") == 4 * GIB
    assert document["trainable_parameters"] == 7


def test_a_trace_takes_allocator_and_context_from_the_estimate_and_says_so() -> None:
    expected = plan()
    document = measured_plan(expected, report())
    added = expected["reserved_bytes"] - expected["peak_bytes"]
    assert document["reserved_bytes"] == 4 * GIB + added
    assert document["low_bytes"] == 4 * GIB <= document["reserved_bytes"] < document["device_bytes"]
    assert document["high_bytes"] >= document["device_bytes"]
    assert any("fragmentation" in line for line in document["unknown"])


def test_on_a_cpu_nothing_is_said_of_cards() -> None:
    document = measured_plan({**plan(), "setup": {"device": "cpu"}}, report())
    assert not any("card" in line or "allocator" in line for line in document["unknown"])
    assert any("resident" in line for line in document["unknown"])


def test_a_card_is_believed() -> None:
    seen = report(source="cuda", reserved_bytes=5 * GIB, device_bytes=6 * GIB, card={"name": "X"})
    document = measured_plan(plan(budget=6 * GIB), seen)
    assert (document["reserved_bytes"], document["device_bytes"], document["high_bytes"]) == (5 * GIB, 6 * GIB, 6 * GIB)
    assert document["fits"] is True
    assert document["verdict"] == "fits"


@pytest.mark.parametrize(("budget", "fits"), [(None, None), (3 * GIB, False), (100 * GIB, True)])
def test_whether_it_fits(budget: int | None, fits: bool | None) -> None:
    assert measured_plan(plan(budget), report())["fits"] is fits


def test_the_estimate_stands_beside_it() -> None:
    document = measured_plan(plan(), report())
    expected = plan()["peak_bytes"]
    assert document["estimate"]["peak_bytes"] == expected
    assert document["estimate"]["difference"] == pytest.approx(expected / (4 * GIB) - 1)


def test_without_an_estimate_only_what_was_seen_is_told() -> None:
    document = measured_plan({"estimate": None, "why": "nobody knows this model"}, report())
    assert document["peak_bytes"] == 4 * GIB
    assert document["reserved_bytes"] is document["device_bytes"] is document["fits"] is document["estimate"] is None
