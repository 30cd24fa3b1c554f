"""The machine as it is found: figures that are there, and None for what is not."""

from pathlib import Path

import psutil
import pytest

from studio.probe import machine
from studio.probe.cards import Driver
from studio.probe.machine import free_disk_bytes, read_machine


def test_what_is_there_is_found(tmp_path: Path) -> None:
    found = read_machine(tmp_path / "not" / "yet" / "there")
    assert found.ram_bytes == psutil.virtual_memory().total
    assert found.disk_bytes is not None
    assert found.disk_bytes > 0
    assert found.cores is not None
    assert found.system


def test_what_cannot_be_read_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError("hidden")

    monkeypatch.setattr(psutil, "virtual_memory", refuse)
    monkeypatch.setattr(machine.shutil, "disk_usage", refuse)
    monkeypatch.setattr(machine, "read_cards", lambda: (None, Driver()))
    found = read_machine(tmp_path)
    assert (found.cards, found.driver, found.ram_bytes, found.disk_bytes) == (None, None, None, None)
    assert free_disk_bytes(tmp_path) is None


def test_segments_grow_where_nobody_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "spills_to_ram", lambda: False)
    assert machine.growing_segments() == {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert machine.growing_segments() == {}
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(machine, "spills_to_ram", lambda: True)
    assert machine.growing_segments() == {}
