"""The budget of a run and what its process holds, with a card that only answers as CUDA and NVML would."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.core.recipe import Recipe
from studio.core.vram.reserve import CONTEXT_BYTES
from studio.jobs.base import device as base_device
from studio.jobs.train import memory
from tests.jobs.conftest import Train, history_of

GIB, MIB = 2**30, 2**20
CUDA = torch.device("cuda:0")

Card = Callable[..., list[float]]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """A card of 24 GiB; returns the fractions that the allocator is held to."""

    def answer(own_bytes: int | None) -> list[float]:
        fractions: list[float] = []
        properties = SimpleNamespace(total_memory=24 * GIB)
        monkeypatch.setattr(torch, "zeros", lambda *shape, **where: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * MIB)
        monkeypatch.setattr(
            torch.cuda, "set_per_process_memory_fraction", lambda share, device: fractions.append(share)
        )
        monkeypatch.setattr(memory, "_nvml_handle", lambda device: "handle")
        monkeypatch.setattr(memory, "_own_device_bytes", lambda handle: own_bytes)
        return fractions

    return answer


def test_the_context_is_taken_off_the_budget(card: Card) -> None:
    fractions = card(302 * MIB)
    memory.limit_memory(8.0, CUDA)
    assert fractions == [(8 * GIB - 300 * MIB) / (24 * GIB)], "allocator and context together stay within the budget"


def test_a_context_that_nobody_tells_is_taken_as_the_estimate_takes_it(card: Card) -> None:
    fractions = card(None)
    memory.limit_memory(8.0, CUDA)
    assert fractions == [(8 * GIB - CONTEXT_BYTES) / (24 * GIB)]


def test_a_budget_beyond_the_card_is_the_card_and_one_below_the_context_is_nothing(card: Card) -> None:
    fractions = card(None)
    memory.limit_memory(500.0, CUDA)
    memory.limit_memory(0.1, CUDA)
    assert fractions == [1.0, 0.0]


def test_without_a_budget_or_a_card_nothing_is_limited(card: Card) -> None:
    fractions = card(None)
    memory.limit_memory(0.0, CUDA)
    memory.limit_memory(8.0, torch.device("cpu"))
    assert fractions == []


@pytest.mark.parametrize(
    ("budget", "free_gib", "share", "said"),
    [(0.0, 10.0, 9.75, True), (8.0, 10.0, 8.0, False), (8.0, 6.0, 5.75, True), (0.0, 0.1, 0.0, True)],
)
def test_where_the_driver_spills_a_run_keeps_to_what_is_free_on_the_card(
    card: Card, monkeypatch: pytest.MonkeyPatch, budget: float, free_gib: float, share: float, said: bool
) -> None:
    """Under WSL a run without a budget took main memory for the card's and crawled instead of failing."""
    fractions = card(2 * MIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (int(free_gib * GIB) - 2 * MIB, 24 * GIB))
    monkeypatch.setattr(base_device, "spills_to_ram", lambda: True)
    note = memory.limit_memory(budget, CUDA)
    assert fractions == [pytest.approx(share / 24)]
    assert ("device.budget_gib" in note) == said
    if said and share:
        assert f"{share:.1f} GiB that are free now" in note


def test_where_it_does_not_spill_nothing_is_said(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions = card(None)
    monkeypatch.setattr(base_device, "spills_to_ram", lambda: False)
    assert memory.limit_memory(0.0, CUDA) == memory.limit_memory(8.0, CUDA) == ""
    assert len(fractions) == 1
    monkeypatch.setattr(base_device, "spills_to_ram", lambda: True)
    assert memory.limit_memory(0.0, torch.device("cpu")) == ""


def test_a_run_tells_the_limit_that_nobody_asked_for(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("studio.jobs.train.job.limit_memory", lambda budget, device: "kept to 5.8 GiB")
    warnings = history_of(train(recipe.with_("train.steps", 1))).warnings
    assert [(event.topic, event.message) for event in warnings] == [("memory", "kept to 5.8 GiB")]


def test_only_the_own_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def processes(*pids: int) -> Callable[[Any], list[Any]]:
        return lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=pid) for pid in pids]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes(1, os.getpid()))
    assert memory._own_device_bytes("handle") == os.getpid()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes(1))
    assert memory._own_device_bytes("handle") is None, "in a container the driver knows other numbers"
    assert memory._own_device_bytes(None) is None
