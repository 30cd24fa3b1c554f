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
from studio.jobs.train.objectives.supervised import pack
from studio.probe.torch_cards import TorchBuild
from studio.runs.history import History
from tests.fakes.cuda import FakeCard, FakeMachine
from tests.fakes.tiny_model import make_tiny_model
from tests.gpu import bench, faults, identity, memory, numbers, speed, training
from tests.gpu.bench import GIB, Bench, Seen, Skip

HERE = Path(__file__).parent


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
    assert len(used) >= 12
    for name in used:
        owner: Any = torch
        for part in name.split("."):
            assert hasattr(owner, part), f"torch.{name}"
            owner = getattr(owner, part)


A100 = FakeCard("NVIDIA A100-SXM4-40GB", "GPU-8", gib=40, capability=(8, 0), speed=9)
T4 = FakeCard("Tesla T4", "GPU-4", gib=15, capability=(7, 5))


def identified(machine: FakeMachine, monkeypatch: pytest.MonkeyPatch, card: Bench) -> Seen:
    """What the identity says of a machine, as a process that has just begun on it finds it."""
    machine.start(monkeypatch)
    monkeypatch.setattr(identity, "look", machine.sight)
    return identity.identity(card)


def test_cards_that_nvml_and_torch_number_differently_are_paired(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = identified(FakeMachine([T4, A100]), monkeypatch, card)
    shown = "\n".join(seen.lines)
    assert "pair      torch 0 is NVML 1" in shown
    assert "pair      torch 1 is NVML 0" in shown
    assert "NVML 0    Tesla T4  GPU-4  PCI 00000000:01:00.0  capability 7.5  15.0 GiB" in shown
    assert "auto is   NVIDIA A100-SXM4-40GB  GPU-8" in shown
    assert seen.said.startswith("2 card(s) for torch; NVIDIA A100-SXM4-40GB  GPU-8")
    json.dumps(seen.figures)


def test_the_inherited_mask_is_shown_and_obeyed(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-4")
    seen = identified(FakeMachine([A100, T4]), monkeypatch, card)
    assert "inherited CUDA_VISIBLE_DEVICES=GPU-4" in seen.lines
    assert "pair      torch 0 is NVML 1" in seen.lines
    assert seen.figures["auto"] == "GPU-4"


def test_an_instance_is_paired_with_its_card(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cut = FakeCard("NVIDIA A100", "GPU-8", capability=(8, 0), instances=("MIG-a", "MIG-b"))
    seen = identified(FakeMachine([cut]), monkeypatch, card)
    assert "pair      torch 0 is NVML 0" in seen.lines
    assert any("MIG with 2 instances" in line for line in seen.lines)


@pytest.mark.filterwarnings("ignore:(?s).*(which is of compute capability|is not compatible with):UserWarning")
@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (FakeMachine([A100], driver="550.54.15", serves=(12, 4)), "torch can use no card: NVIDIA A100.*driver"),
        (
            FakeMachine([A100], build=TorchBuild("2.13.0+cpu")),
            "no card: NVIDIA A100.*built for CPUs only",
        ),
        (FakeMachine([FakeCard("Tesla P100", "GPU-6", capability=(6, 0))]), "torch has no code for Tesla P100"),
    ],
    ids=["old driver", "wrong build", "old card"],
)
def test_a_card_that_torch_cannot_use_fails_with_the_reason(
    card: Bench, monkeypatch: pytest.MonkeyPatch, machine: FakeMachine, words: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(AssertionError, match=words):
        identified(machine, monkeypatch, card)


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


@pytest.mark.parametrize(
    "fault",
    [*(f"oom:{stage}" for stage in faults.STAGES), "stop:3", "overflow", "pages", "assert", "native", "traced"],
)
def test_every_fault_finds_what_it_changes(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed: list[str] = []
    owners = (faults.job, faults.between, faults.between.Between, faults.precision.Precision, faults.compiled)
    before = [dict(vars(owner)) for owner in owners]
    monkeypatch.setattr(faults, "register_optimizer_step_pre_hook", lambda hook: None)
    try:
        faults.inject(fault, tmp_path, "cpu")
    finally:
        for owner, names in zip(owners, before, strict=True):
            for name in [name for name, value in vars(owner).items() if names.get(name) is not value]:
                changed.append(name)
                setattr(owner, name, names[name])
    assert changed


def test_what_a_t4_lacks_is_skipped_with_its_reason(card: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    FakeMachine([FakeCard("Tesla T4", "GPU-4", gib=5, capability=(7, 5))]).start(monkeypatch)
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
    monkeypatch.setattr(memory.torch, "zeros", lambda *size, device: size)
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


@pytest.fixture
def cpu(tmp_path: Path) -> Bench:
    """A rehearsal's bench."""
    return Bench("cpu", tmp_path, tmp_path)


def test_a_packed_row_that_sees_another_is_found(cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def as_one_row(rows: Any, device: torch.device) -> dict[str, Any]:
        whole = pack(rows, device)
        return {**whole, "row_lengths": whole["row_lengths"].sum()[None]}

    monkeypatch.setattr(numbers, "pack", as_one_row)
    with pytest.raises(AssertionError, match="apart, allowed"):
        numbers.packed_rows(cpu, "lora", "fp32")


@pytest.mark.parametrize("part", [0, 1])
def test_a_chunked_loss_whose_value_or_gradient_is_off_is_found(
    cpu: Bench, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    from studio.jobs.train import head

    chunk = head._chunk

    def off(*args: Any, **named: Any) -> Any:
        made = list(chunk(*args, **named))
        made[part] = made[part] * 1.001
        return tuple(made)

    monkeypatch.setattr(head, "_chunk", off)
    with pytest.raises(AssertionError, match="apart, allowed"):
        numbers.chunked_loss(cpu, "fp32")


def test_a_4_bit_product_whose_gradient_is_off_is_found(cpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.autograd import _functions

    backward = _functions.MatMul4Bit.backward

    def off(ctx: Any, upstream: Any) -> Any:
        first, *rest = backward(ctx, upstream)
        return first * 1.001, *rest

    monkeypatch.setattr(_functions.MatMul4Bit, "backward", staticmethod(off))
    with pytest.raises(AssertionError, match=r"gradient is .* apart, allowed"):
        numbers.four_bit_products(cpu, "8", "fp32")
