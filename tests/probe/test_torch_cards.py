"""What is known of the installed torch without importing it, and what that says of a card."""

from pathlib import Path

import pytest

from studio.probe import torch_cards
from studio.probe.cards import Card, Driver
from studio.probe.torch_cards import (
    TorchBuild,
    ask_torch,
    may_have_card,
    numbers_of,
    read_build,
    runs_on,
    serves,
    torch_build,
    why_unusable,
)

CARD = Card(0, "NVIDIA GeForce RTX 3090", "GPU-1", 24 * 2**30, capability=(8, 6))
TABLE = """
PYTORCH_RELEASES_CODE_CC: dict[str, dict[str, set[int]]] = {
    "12.6": {"x86_64": {50, 61, 75, 86}, "aarch64": {50, 61, 75, 86}},
    "13.0": {
        "x86_64": {75, 86, 120},
        "aarch64": {75, 86, 120},
    },
}


def unrelated() -> None:
    return {}
"""


def _torch(folder: Path, version: str, cuda: str | None, hip: str | None = None) -> Path:
    """The two files of an installed torch that are read; both as its release writes them."""
    (folder / "cuda").mkdir(parents=True)
    kept = {"cuda: Optional[str]": cuda, "hip: Optional[str]": hip}
    lines = [f"__version__ = {version!r}", "debug = False", *(f"{name} = {text!r}" for name, text in kept.items())]
    (folder / "version.py").write_text("from typing import Optional\n\n" + "\n".join(lines) + "\n")
    (folder / "cuda" / "__init__.py").write_text(TABLE)
    return folder


def test_the_installed_torch_is_read_as_it_says_itself() -> None:
    import torch

    build = torch_build()
    assert build is not None
    assert build.version == torch.__version__
    assert build.cuda == numbers_of(torch.version.cuda)
    table = torch.cuda.PYTORCH_RELEASES_CODE_CC
    assert {f"{major}.{minor}" for major, minor in build.releases} == set(table)


@pytest.mark.parametrize(
    ("version", "cuda", "hip", "capabilities"),
    [
        ("2.13.0", "13.0", None, {75, 86, 120}),
        ("2.13.0+cu126", "12.6", None, {50, 61, 75, 86}),
        ("2.13.0+cpu", None, None, set()),
        ("2.13.0+rocm6.4", None, "6.4.43482", set()),
        ("2.13.0a0+ecf3bae40a.nv26.01", "13.0", None, set()),  # NVIDIA's own, with its own list
        ("2.13.0+cu140", "14.0", None, set()),
    ],
)
def test_a_build_says_what_it_has_code_for(
    version: str, cuda: str | None, hip: str | None, capabilities: set[int], tmp_path: Path
) -> None:
    build = read_build(_torch(tmp_path / "torch", version, cuda, hip))
    assert build is not None
    assert (build.version, build.cuda, build.hip) == (version, numbers_of(cuda), hip)
    assert build.capabilities == capabilities


def test_a_torch_that_cannot_be_read_is_unknown_and_refuses_nothing(tmp_path: Path) -> None:
    assert read_build(tmp_path / "missing") is None
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "version.py").write_text("__version__ = nothing()\n")
    assert read_build(tmp_path / "odd") is None
    assert why_unusable(CARD, Driver("1.0", (1, 0)), None) == ""
    bare = _torch(tmp_path / "bare", "2.13.0", "13.0")
    (bare / "cuda" / "__init__.py").unlink()
    build = read_build(bare)
    assert build == TorchBuild("2.13.0", (13, 0))
    assert why_unusable(CARD, Driver("580.65.06", (13, 0)), build) == ""


@pytest.mark.parametrize(
    ("driver", "cuda", "served"),
    [
        (Driver("580.65.06", (13, 0)), (13, 0), True),
        (Driver("580.65.06", (13, 0)), (13, 2), True),  # any minor of the same major
        (Driver("580.65.06", (13, 0)), (12, 6), True),
        (Driver("575.64.03", (12, 9)), (13, 0), False),
        (Driver("535.129.03", (13, 0)), (13, 0), True),  # a compatibility package
        (Driver("540.4.0", (12, 6)), (12, 6), True),  # a Jetson's
        (Driver("560.35.03"), (13, 0), False),
        (Driver("560.35.03"), (12, 8), True),
        (Driver("470.42.01"), (12, 0), False),
        (Driver(), (13, 0), True),  # unknown: the job looks
        (Driver("700.1"), (99, 0), True),
    ],
)
def test_which_cuda_a_driver_serves(driver: Driver, cuda: tuple[int, int], served: bool) -> None:
    assert serves(driver, cuda) is served


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        ("sm_86", (8, 6), True),
        ("sm_80", (8, 6), True),
        ("sm_86", (8, 0), False),
        ("sm_90", (10, 0), False),
        ("sm_80", (8, 7), False),
        ("sm_87", (8, 9), False),
        ("sm_90a", (9, 0), True),
        ("compute_90", (12, 1), True),
        ("compute_120", (9, 0), False),
        ("gfx942", (9, 4), True),
    ],
)
def test_which_code_runs_on_a_card(code: str, capability: tuple[int, int], runs: bool) -> None:
    assert runs_on(code, capability) is runs


def test_what_torch_says_of_its_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_cards, "torch_build", lambda: TorchBuild("2.13.0+cpu"))
    assert ask_torch(str(tmp_path / "missing")) == [], "without asking"
    monkeypatch.setattr(torch_cards, "torch_build", lambda: TorchBuild("2.13.0", (13, 0)))
    assert ask_torch(str(tmp_path / "missing")) is None
    one = '[["Orin", "GPU-1", 64, 8, 7]]'
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for place, (answer, found) in enumerate(
        [(f"echo noise; echo '{one}'", 1), ("echo '[]'", 0), ("echo", None), ("exit 1", None), ("echo '[[1]]'", None)]
    ):
        python = tmp_path / f"python{place}"
        python.write_text(f"#!/bin/sh\necho $CUDA_VISIBLE_DEVICES >> {python}.mask\n{answer}\n")
        python.chmod(0o755)
        seen = ask_torch(str(python))
        assert (None if seen is None else len(seen)) == found
        assert ask_torch(str(python)) == seen
        ask_torch(str(python), masked=False)
        assert Path(f"{python}.mask").read_text() == "3\n\n", "once with the mask, once without"
    assert ask_torch(str(tmp_path / "python0")) == [Card(0, "Orin", "GPU-1", 64, capability=(8, 7))]


def test_without_a_device_nothing_speaks_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert not may_have_card()
    monkeypatch.setattr(Path, "exists", lambda self: str(self) == "/dev/dxg")
    assert may_have_card()
