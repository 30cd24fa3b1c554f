"""What only a card runs, against stand-ins that know no more names than torch, NVML and CUDA have."""

import ast
import json
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from studio.core.events import Failed
from studio.runs.history import History
from tests.fakes.tiny_model import make_tiny_model
from tests.gpu import bench, faults, identity, memory, numbers, speed, training
from tests.gpu.bench import GIB, Bench, Skip

HERE = Path(__file__).parent
T4 = {"name": "Tesla T4", "uuid": "GPU-4", "pci": "00000000:3b:00.0", "capability": "7.5", "total_bytes": 15 * GIB}


@pytest.fixture
def card(tmp_path: Path) -> Bench:
    """A bench whose device is said to be a card."""
    (tmp_path / "embedded.json").write_text(json.dumps({"why": ""}))
    return Bench("cuda", tmp_path, tmp_path)


def chains(tree: ast.AST) -> set[str]:
    """Every `torch.cuda.x` that is written somewhere, as far as it is dotted."""
    found = set()
    for node in ast.walk(tree):
        names: list[str] = []
        inner: Any = node
        while isinstance(inner, ast.Attribute):
            names.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id == "torch" and names and names[-1] == "cuda":
            found.add(".".join(reversed(names)))
    return found


def test_every_name_of_torch_cuda_exists() -> None:
    used = set().union(*(chains(ast.parse(path.read_text("utf-8"))) for path in HERE.glob("*.py")))
    assert len(used) >= 14
    for name in used:
        owner: Any = torch
        for part in name.split("."):
            assert hasattr(owner, part), f"torch.{name}"
            owner = getattr(owner, part)


def nvml(*cards: dict[str, Any], cuda: int = 12040) -> Any:
    """An NVML that knows these cards and answers nothing else."""
    return SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"550.54.15",
        nvmlSystemGetCudaDriverVersion=lambda: cuda,
        nvmlDeviceGetCount=lambda: len(cards),
        nvmlDeviceGetHandleByIndex=lambda index: cards[index],
        nvmlDeviceGetName=lambda card: card["name"].encode(),
        nvmlDeviceGetUUID=lambda card: card["uuid"],
        nvmlDeviceGetPciInfo=lambda card: SimpleNamespace(busId=card["pci"].upper().encode()),
        nvmlDeviceGetCudaComputeCapability=lambda card: [int(part) for part in card["capability"].split(".")],
        nvmlDeviceGetMemoryInfo=lambda card: SimpleNamespace(total=card["total_bytes"], used=GIB),
    )


def cuda(*cards: dict[str, Any], uuids: bool = True) -> Any:
    """A `torch.cuda` that sees these cards, in this order; older torch tells no UUID."""

    def properties(index: int) -> Any:
        one = cards[index]
        major, minor = (int(part) for part in one["capability"].split("."))
        domain, bus, place = (int(part.partition(".")[0], 16) for part in one["pci"].split(":"))
        seen = {"name": one["name"], "major": major, "minor": minor, "total_memory": one["total_bytes"]}
        seen |= {"pci_domain_id": domain, "pci_bus_id": bus, "pci_device_id": place}
        return SimpleNamespace(**seen, **({"uuid": one["uuid"].removeprefix("GPU-")} if uuids else {}))

    return SimpleNamespace(
        is_available=lambda: bool(cards), device_count=lambda: len(cards), get_device_properties=properties
    )


@pytest.mark.parametrize("uuids", [True, False])
def test_cards_that_nvml_and_torch_number_differently_are_paired(uuids: bool) -> None:
    fast = {**T4, "name": "NVIDIA A100", "uuid": "GPU-8", "pci": "00000000:5e:00.0", "capability": "8.0"}
    listed, driver = identity.nvml_cards(nvml(T4, fast))
    seen = identity.torch_cards(cuda(fast, T4, uuids=uuids))
    assert driver == {"driver": "550.54.15", "cuda": "12.4"}
    assert [one["uuid"] for one in listed] == ["GPU-4", "GPU-8"]
    assert identity.pairs(listed, seen) == ["torch 0 is NVML 1", "torch 1 is NVML 0"]
    assert identity.card_line(listed[0]).startswith("Tesla T4  GPU-4  PCI 00000000:3b:00.0  7.5  15.0 GiB")
    assert identity.pairs([], seen)[0] == "torch 0 is not in NVML's list"
    assert identity.torch_cards(cuda()) == []


@pytest.mark.parametrize(
    ("driver", "built", "words"),
    [
        ("12.4", "12.8", "runs"),
        ("13.0", "12.8", "runs"),
        ("12.4", "13.0", "too old"),
        (None, "13.0", "not known"),
        ("13.0", None, "a build for CPUs"),
    ],
)
def test_the_drivers_verdict(driver: str | None, built: str | None, words: str) -> None:
    assert words in identity.driver_verdict(driver, built)


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ("7.5", "sm_75 sm_80 sm_90", True),
        ("8.6", "sm_80 sm_90", True),
        ("8.9", "sm_90", False),
        ("6.1", "sm_75 sm_80", False),
        ("12.0", "sm_90 compute_90", True),
        ("12.0", "sm_100 sm_120a", True),
        ("9.0", "sm_90a", True),
    ],
)
def test_whether_a_build_has_kernels(capability: str, archs: str, runs: bool) -> None:
    assert identity.has_kernels(capability, archs.split()) is runs


class Pool:
    """A card's memory as torch's allocator hands it out: never more than its limit, in blocks of 512 bytes."""

    def __init__(self, total: int, used: int) -> None:
        self.total, self.used, self.limit = total, used, total
        self.emptied = 0

    def empty(self, size: int, *, dtype: Any, device: str) -> int:
        assert device == "cuda" and dtype is torch.uint8
        if self.used + max(512, size) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        self.used += max(512, size)
        return size

    def as_torch(self) -> Any:
        def limit(fraction: float) -> None:
            assert 0 <= fraction <= 1
            self.limit = int(fraction * self.total)

        own = SimpleNamespace(
            synchronize=lambda: None,
            empty_cache=lambda: setattr(self, "emptied", 1),
            memory_reserved=lambda: 300 * 2**20,
            set_per_process_memory_fraction=limit,
            get_device_properties=lambda number: SimpleNamespace(total_memory=self.total),
        )
        return SimpleNamespace(cuda=own, empty=self.empty, uint8=torch.uint8, OutOfMemoryError=torch.OutOfMemoryError)


def test_a_full_card_has_no_block_left_and_is_made_full_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(16 * GIB, 100 * 2**20 + 512 * 3)
    monkeypatch.setattr(faults, "torch", pool.as_torch())
    full = faults.FullCard("loss", "cuda")
    full.stage("forward")
    assert not full.held
    full.stage("loss")
    assert pool.emptied
    assert pool.limit - pool.used < 512
    assert sum(full.held) > 199 * 2**20
    held = len(full.held)
    full.stage("loss")
    assert len(full.held) == held


def turing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of compute capability 7.5 under the names of `torch.cuda` that the checks ask."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (4 * GIB, 15 * GIB))


def test_what_a_t4_lacks_is_skipped_with_its_reason(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    turing(monkeypatch)
    with pytest.raises(Skip, match=r"no bf16: compute capability 7\.5"):
        numbers.packed_rows(card, "lora", "bf16")
    with pytest.raises(Skip, match="no bf16"):
        numbers.four_bit_products(card, "8", "bf16")
    with pytest.raises(Skip, match=r"no flash kernels: compute capability 7\.5"):
        numbers.flash_kernel(card)
    with pytest.raises(Skip, match=r"memory too small: 4\.0 GiB free, 6\.0 GiB wanted"):
        memory.full_card(card, "loss")
    with pytest.raises(Skip, match="package not installed: no_such_package"):
        bench.need_package("no_such_package")
    with pytest.raises(Skip, match="package not installed: liger_kernel"):
        training.switched(card, "loss", "train.loss", "liger", "liger_kernel")
    bench.need_dtype(card, "fp16")


def failed(kind: str) -> History:
    history = History()
    history.failed = Failed(at=0.0, failure=kind, message="full", advice="less")
    return history


def test_a_budget_is_judged_by_what_the_driver_counts(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (20 * GIB, 24 * GIB))
    monkeypatch.setattr(Bench, "long", Bench.tiny)

    def runs(*answers: tuple[History, float]) -> None:
        left = list(answers)

        def watched(_: Bench, recipe: Any) -> tuple[History, int]:
            history, share = left.pop(0)
            budget = recipe.device.budget_gib
            return history, int(share * (budget * GIB if budget else 2 * GIB))

        monkeypatch.setattr(memory, "_watched", watched)

    fine, full = History(), failed("out_of_memory")
    runs((fine, 1.0), (fine, 0.95), (full, 0.9))
    assert memory.budget_kept(card).said.endswith("out_of_memory")
    runs((fine, 1.0), (fine, 1.1))
    with pytest.raises(AssertionError, match="of a budget of"):
        memory.budget_kept(card)
    runs((fine, 1.0), (fine, 0.9), (fine, 0.9))
    with pytest.raises(AssertionError, match="ran within a budget"):
        memory.budget_kept(card)
    runs((fine, 1.0), (fine, 0.9), (failed("error"), 0.9))
    with pytest.raises(AssertionError, match="error"):
        memory.budget_kept(card)


def test_waits_are_counted_by_their_place(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    counted: Counter[str] = Counter()
    with speed._Listening(card, counted):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    assert modes == ["warn", "default"]
    assert list(counted.values()) == [3]
    assert next(iter(counted)).startswith("test_stand_in.py:")


def test_launches_of_a_profile() -> None:
    def event(name: str, device: str = "DeviceType.CPU") -> Any:
        return SimpleNamespace(name=name, device_type=device)

    both = [event("cudaLaunchKernel"), event("cuLaunchKernelEx"), event("aten::mm"), event("gemm", "DeviceType.CUDA")]
    assert speed.launched(both) == 2
    assert speed.launched([event("gemm", "DeviceType.CUDA"), event("Memcpy DtoH", "DeviceType.CUDA")]) == 1


def test_a_cards_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_nvml_handle", lambda device: "handle")
    monkeypatch.setattr(memory, "_device_used", lambda handle: 900)
    for name in ("max_memory_allocated", "max_memory_reserved", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 70)
    for own, whose, told in ((500, "this process", 500), (None, "all processes", 900)):
        monkeypatch.setattr(memory, "_own_device_bytes", lambda handle, own=own: own)
        counters = memory.CardCounters(torch.device("cuda", 0))
        assert (counters.whose, counters.driver(), counters.reserved()) == (whose, told, 70)
    meter = memory.StageMeter(counters)
    for stage in ("load", "forward"):
        meter.stage(stage)
    assert meter.peaks().keys() == meter.reserved.keys() == meter.driver.keys() == {"load", "forward"}


UNSLOTH = '''
"""What of Unsloth the benchmark uses, with no name more, and nothing of what it does."""
import torch, transformers
from peft import LoraConfig, get_peft_model

class FastLanguageModel:
    @staticmethod
    def from_pretrained(model_name, *, max_seq_length, dtype, load_in_4bit):
        assert dtype is None and not load_in_4bit and max_seq_length == 256
        model = transformers.AutoModelForCausalLM.from_pretrained(model_name, dtype=torch.float32)
        return model, transformers.AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(model, *, r, lora_alpha, lora_dropout, bias, target_modules, use_gradient_checkpointing, random_state):
        torch.manual_seed(random_state)
        return get_peft_model(model, LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=target_modules))
'''  # noqa: E501


@pytest.mark.slow
def test_unsloths_engine_runs_against_a_stand_in(tmp_path: Path) -> None:
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    model = make_tiny_model(tmp_path / "tiny")
    work = {"method": "lora", "steps": 2, "micro_batch": 2, "accumulation": 1, "base": str(model)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.engines", "unsloth", json.dumps(work)],
        check=False,
        capture_output=True,
        text=True,
        cwd=HERE.parents[1],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("RESULT ")), done.stderr[-2000:])
    report = json.loads(line.removeprefix("RESULT "))
    assert report["engine"] == "unsloth"
    assert len(report["losses"]) == len(report["wall_seconds"]) == len(report["step_tokens"]) == 2
