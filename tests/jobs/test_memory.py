"""The budget of a run and what its process holds, with a card that only answers as CUDA and NVML would."""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.core.vram.reserve import CONTEXT_BYTES
from studio.jobs.train import memory

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


def test_only_the_own_process_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def processes(*pids: int) -> Callable[[Any], list[Any]]:
        return lambda handle: [SimpleNamespace(pid=pid, usedGpuMemory=pid) for pid in pids]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes(1, os.getpid()))
    assert memory._own_device_bytes("handle") == os.getpid()
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", processes(1))
    assert memory._own_device_bytes("handle") is None, "in a container the driver knows other numbers"
    assert memory._own_device_bytes(None) is None
