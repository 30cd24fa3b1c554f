"""Which card is meant: by the plan, by the launch and by the job's torch, on machines that are not here."""

import os
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState

from studio.core.errors import BadInput, JobFailed
from studio.core.events import MemorySeen, Planned
from studio.core.recipe import Recipe
from studio.jobs.base.device import NO_CARD, card_used, job_device, room_on_card
from studio.jobs.train.job import _device as train_device
from studio.jobs.train.memory import MemoryWatch, limit_memory
from studio.launch.kinds import kind_for
from studio.launch.start import start
from studio.probe import device as device_module
from studio.probe.audit import audit_of_run
from studio.probe.chat import chat_request
from studio.probe.device import CHOSEN, CPU_PLACE, MASK, ORDER, other_card_note, place_of, recorded_card
from studio.probe.models import find_base
from studio.probe.plan import plan_for
from studio.probe.torch_cards import TorchBuild
from studio.runs.held_out import HeldOutRecord, keep_record
from studio.runs.job import write_job
from studio.runs.layout import RunPaths, new_run
from studio.runs.requests import AuditRequest, ExportRequest, MeasureRequest, MergeRequest
from tests.fakes.cuda import GIB, FakeCard, FakeMachine
from tests.fakes.runs import write_log
from tests.jobs.conftest import Train, history_of

SMALL = FakeCard("NVIDIA T400", "GPU-5ma11-0001", 4, (7, 5), speed=1)
LARGE = FakeCard("NVIDIA GeForce RTX 4090", "GPU-1a49e-0002", 24, (8, 9), speed=9)
QUICK = FakeCard("NVIDIA GeForce RTX 5080", "GPU-9u1c4-0003", 16, (12, 0), speed=10)
OLD = FakeCard("NVIDIA TITAN Xp", "GPU-01d00-0004", 32, (6, 1), speed=2)
TWINS = [FakeCard("NVIDIA A10", f"GPU-aaaa-{place}", 24, (8, 6)) for place in range(3)]
CUT = FakeCard("NVIDIA A100-SXM4-80GB", "GPU-c07aa-0005", 80, (8, 0), 5, instances=("MIG-11aa-1", "MIG-22bb-2"))
UNCUT = replace(CUT, instances=())
SPARK = FakeCard("NVIDIA GB10", "GPU-6b10-0006", 119, (12, 1))

MIXED = [SMALL, LARGE, QUICK]
CPU_BUILD = TorchBuild("2.13.0+cpu", None, None, {(12, 6): frozenset({75, 86}), (13, 0): frozenset({75, 86})})
OLD_DRIVER: dict[str, Any] = {"driver": "560.35.03", "serves": (12, 6)}
BUS = {ORDER: "PCI_BUS_ID"}


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a shell that knows nothing of cards."""
    for name in [name for name in os.environ if name.startswith(("CUDA_", "ACCELERATE_", CHOSEN))]:
        monkeypatch.delenv(name)


def _environ(monkeypatch: pytest.MonkeyPatch, mask: str | None, **more: str) -> None:
    for name, text in {**({} if mask is None else {MASK: mask}), **more}.items():
        monkeypatch.setenv(name, text)


MEANT = [
    # no mask: numbers are those of nvidia-smi, whatever CUDA holds for the fastest
    (MIXED, None, {}, "auto", LARGE.uuid),
    (MIXED, None, {}, "cuda", LARGE.uuid),
    (MIXED, None, {}, "cuda:0", SMALL.uuid),
    (MIXED, None, {}, "cuda:1", LARGE.uuid),
    (MIXED, None, {}, "cuda:2", QUICK.uuid),
    (MIXED, None, {ORDER: "FASTEST_FIRST"}, "cuda:0", SMALL.uuid),
    (MIXED, None, BUS, "cuda:2", QUICK.uuid),
    (TWINS, None, {}, "auto", TWINS[0].uuid),
    (TWINS, None, {}, "cuda:2", TWINS[2].uuid),
    ([OLD, LARGE], None, {}, "auto", LARGE.uuid),  # the larger one is too old for this torch
    ([replace(SMALL, lost=True), LARGE], None, {}, "auto", LARGE.uuid),
    ([SPARK], None, {}, "auto", SPARK.uuid),
    # a mask of numbers, by bus and in CUDA's own order
    (MIXED, "2,1", BUS, "cuda:0", QUICK.uuid),
    (MIXED, "2,1", BUS, "cuda:1", LARGE.uuid),
    (MIXED, "2,1", BUS, "auto", LARGE.uuid),
    (MIXED, "0", {}, "auto", QUICK.uuid),
    (MIXED, "0,2", {ORDER: "FASTEST_FIRST"}, "cuda:1", SMALL.uuid),
    (TWINS, "1", {}, "auto", TWINS[1].uuid),
    (TWINS, " 1x , 2", {}, "cuda:1", TWINS[2].uuid),
    (TWINS, "2,9,0", {}, "auto", TWINS[2].uuid),  # what does not exist ends the list
    (TWINS, "2,-1,0", {}, "auto", TWINS[2].uuid),
    (TWINS, "2,GPU-aaaa-0", {}, "auto", TWINS[2].uuid),
    # UUIDs and beginnings of them
    (MIXED, QUICK.uuid, {}, "cuda:0", QUICK.uuid),
    (MIXED, "GPU-1a", {}, "auto", LARGE.uuid),
    (MIXED, "GPU-1a,GPU-9u", {}, "cuda:1", QUICK.uuid),
    (TWINS, "GPU-aaaa-2,GPU-aaaa,GPU-aaaa-0", {}, "auto", TWINS[2].uuid),  # one that means several ends the list
    # instances
    ([CUT], None, {}, "auto", "MIG-11aa-1"),
    ([CUT], "0", {}, "cuda:0", "MIG-11aa-1"),
    ([CUT], CUT.uuid, {}, "auto", "MIG-11aa-1"),
    ([CUT], "MIG-22bb-2", {}, "auto", "MIG-22bb-2"),
    ([CUT], "MIG-22", {}, "cuda", "MIG-22bb-2"),
    ([CUT], "MIG-GPU-c07aa-0005/2/0", {}, "auto", "MIG-22bb-2"),
    ([LARGE, CUT], "MIG-22bb-2", {}, "auto", "MIG-22bb-2"),
    ([UNCUT, LARGE], None, {}, "auto", LARGE.uuid),
    # none, on purpose
    (MIXED, "", {}, "auto", "cpu"),
    (MIXED, "-1", {}, "auto", "cpu"),
    (MIXED, "NoDevFiles", {}, "auto", "cpu"),
    (MIXED, "0", BUS, "cpu", "cpu"),
    ([], None, {}, "auto", "cpu"),
]


@pytest.mark.parametrize(("cards", "mask", "order", "word", "meant"), MEANT)
def test_plan_launch_and_job_mean_one_card(
    cards: list[FakeCard],
    mask: str | None,
    order: dict[str, str],
    word: str,
    meant: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = FakeMachine(cards)
    _environ(monkeypatch, mask, **order)
    place = place_of(word, machine.sight()).or_refuse()
    plan = plan_for(Recipe(), find_base("embedded"), place=place)
    _environ(monkeypatch, None, **place.environment)
    machine.start(monkeypatch)
    device = job_device(word)
    if meant == "cpu":
        assert (plan["card"], plan["setup"]["device"], device) == (None, "cpu", torch.device("cpu"))
        return
    assert plan["card"]["uuid"] == meant
    assert (place.card and place.card.uuid) == meant
    used = card_used(device)
    assert device.index == 0
    assert used == plan["card"], "name, UUID and place on the bus"
    assert torch.cuda.device_count() == 1, "no library can take another"
    assert job_device("auto") == device, "an audit's too"
    assert plan["budget_bytes"] == (machine.cards and _free_bytes(machine, meant))


def _free_bytes(machine: FakeMachine, uuid: str) -> int:
    card = next(card for card in machine.cards if uuid == card.uuid or uuid in (card.instances or ()))
    return (card.gib // 8 if card.instances else card.gib) * GIB - GIB


REFUSED: list[tuple[list[FakeCard], dict[str, Any], str | None, str, tuple[str, ...]]] = [
    (MIXED, OLD_DRIVER, None, "auto", ("RTX 4090", "CUDA 13.0", "580 or newer", "560.35.03", "Update the driver")),
    (MIXED, OLD_DRIVER, None, "cuda:2", ("RTX 5080", "560.35.03", "device.device = cpu")),
    ([LARGE], {"driver": "560.35.03", "serves": None}, None, "auto", ("580 or newer", "560.35.03")),
    ([LARGE], {"build": CPU_BUILD}, None, "auto", ("2.13.0+cpu is built for CPUs only", "whl/cu130", "= cpu")),
    ([LARGE], {"build": CPU_BUILD, **OLD_DRIVER}, None, "auto", ("built for CPUs only", "whl/cu126")),
    ([LARGE], {"build": TorchBuild("2.13.0", None, "6.4")}, None, "auto", ("built for AMD's ROCm 6.4",)),
    ([OLD], {}, None, "auto", ("TITAN Xp is too old", "6.1", "7.5 and newer", "device.device = cpu")),
    ([OLD, LARGE], {}, None, "cuda:0", ("TITAN Xp is too old",)),
    ([replace(SMALL, lost=True), LARGE], {}, None, "cuda:0", ("card 0, which answers nothing", "Xid")),
    ([replace(LARGE, lost=True)], {}, None, "auto", ("card 0, which answers nothing", "= cpu")),
    ([UNCUT], {}, None, "auto", ("MIG on and is cut into no instance", "nvidia-smi mig")),
    (MIXED, {}, None, "cuda:3", ("cuda:0 (NVIDIA T400), cuda:1 (NVIDIA GeForce RTX 4090)", "Choose one of them")),
    (TWINS, {}, "1", "cuda:1", ("under CUDA_VISIBLE_DEVICES=1 there are cuda:0 (NVIDIA A10)",)),
    (TWINS, {}, "7", "auto", ("CUDA_VISIBLE_DEVICES=7 names no card of this machine", "0 (NVIDIA A10)", "= cpu")),
    (TWINS, {}, "1,1", "auto", ("names a card twice",)),
    (TWINS, {}, "GPU-beef", "auto", ("names no card",)),
    (TWINS, {}, "GPU-aaaa", "auto", ("names no card",)),
    ([CUT], {}, "MIG-99", "auto", ("names no card",)),
    (TWINS, {}, "-1", "cuda", ("hides every card", "unset CUDA_VISIBLE_DEVICES")),
    ([], {}, None, "cuda", ("shows no card",)),
]


@pytest.mark.parametrize(("cards", "machine", "mask", "word", "words"), REFUSED)
def test_a_card_that_cannot_be_had_is_refused_before_a_process_starts(
    cards: list[FakeCard],
    machine: dict[str, Any],
    mask: str | None,
    word: str,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _environ(monkeypatch, mask)
    place = place_of(word, FakeMachine(cards, **machine).sight())
    with pytest.raises(BadInput) as caught:
        place.or_refuse()
    for part in words:
        assert part in str(caught.value)
    assert place_of("cpu", FakeMachine(cards, **machine).sight()) == CPU_PLACE, "the way out"


def test_an_order_that_only_cuda_knows_is_asked_for_and_never_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    _environ(monkeypatch, "0")
    sight = replace(FakeMachine(MIXED).sight(), ask=lambda masked: None)
    with pytest.raises(BadInput, match=r"0 \(NVIDIA T400\).*Set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        place_of("auto", sight).or_refuse()
    _environ(monkeypatch, "0", **BUS)
    by_bus = replace(FakeMachine(MIXED).sight(), ask=lambda masked: None)
    assert place_of("auto", by_bus).visible == SMALL.uuid


@pytest.mark.parametrize(
    ("mask", "word", "visible", "name"),
    [
        (None, "auto", "0", QUICK.name),
        (None, "cuda:1", "1", LARGE.name),
        ("2,0", "auto", "2", SMALL.name),
        ("2,0", "cuda:1", "0", QUICK.name),
    ],
)
def test_without_nvml_a_card_has_the_number_that_torch_gives_it(
    mask: str | None, word: str, visible: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine(MIXED, nvml=False)
    _environ(monkeypatch, mask)
    place = place_of(word, machine.sight()).or_refuse()
    assert (place.visible, place.card and place.card.name) == (visible, name)
    assert ORDER not in place.environment, "the number counts as torch counted when it was asked"
    _environ(monkeypatch, None, **place.environment)
    machine.start(monkeypatch)
    assert card_used(job_device(word))["name"] == name


def test_without_nvml_and_torch_s_cards_auto_is_the_cpu_and_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(masked: bool) -> None:
        raise AssertionError("seconds, for a machine that nothing speaks for")

    sight = replace(FakeMachine([], nvml=False).sight(), ask=ask, hinted=False)
    assert place_of("auto", sight).environment == {}


FAILS = [
    ({}, {"driver": "560.35.03", "serves": (12, 6)}, LARGE, ("CUDA 13.0", "560.35.03")),
    ({}, {"build": CPU_BUILD}, LARGE, ("built for CPUs only",)),
    ({}, {"codes": ("sm_75", "sm_80")}, QUICK, ("12.0", "sm_75, sm_80 only")),
    ({}, {"codes": ("sm_80",)}, replace(LARGE, name="Orin", capability=(8, 7)), ("8.7",)),
    ({MASK: "GPU-9u1c4-0003"}, {}, LARGE, ("GPU-9u1c4-0003", "GPU-1a49e-0002")),
]


@pytest.mark.filterwarnings("ignore:(?s).*(which is of compute capability|is not compatible with):UserWarning")
@pytest.mark.parametrize(("environ", "machine", "card", "words"), FAILS)
def test_the_job_looks_again_with_torch_itself_and_never_falls_back_to_the_cpu(
    environ: dict[str, str],
    machine: dict[str, Any],
    card: FakeCard,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeMachine([card], **machine)
    _environ(monkeypatch, card.uuid, **{CHOSEN: environ.get(MASK, card.uuid)})
    monkeypatch.setattr("studio.jobs.base.device.look", fake.sight)
    fake.start(monkeypatch)
    with pytest.raises(JobFailed) as caught:
        job_device("auto")
    assert caught.value.kind == NO_CARD
    for part in words:
        assert part in str(caught.value)
    assert "cpu" in caught.value.advice or "report" in caught.value.advice


@pytest.mark.filterwarnings("ignore:(?s).*(which is of compute capability|is not compatible with):UserWarning")
@pytest.mark.parametrize(
    ("codes", "capability"),
    [(("sm_80",), (8, 9)), (("compute_90",), (12, 1)), (("sm_120a",), (12, 1)), (("sm_87",), (8, 7)), ((), (3, 5))],
)
def test_code_that_runs_on_a_newer_minor_or_is_compiled_there_is_enough(
    codes: tuple[str, ...], capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeMachine([replace(LARGE, capability=capability)], codes=codes).start(monkeypatch)
    assert job_device("auto") == torch.device("cuda", 0)


def test_torch_starts_once_and_a_mask_that_comes_later_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the launcher sets the environment: by the time that a job could, a library may have woken CUDA."""
    machine = FakeMachine(TWINS)
    _environ(monkeypatch, "1")
    machine.start(monkeypatch)
    assert torch.cuda.is_available()
    _environ(monkeypatch, "2")
    assert card_used(job_device("auto"))["uuid"] == TWINS[1].uuid


@pytest.mark.parametrize("spills", [True, False])
def test_every_job_keeps_to_the_card_where_the_driver_would_spill(
    monkeypatch: pytest.MonkeyPatch, spills: bool
) -> None:
    """Under WSL a chat or an audit that is too large would crawl in main memory; 23 of the 24 GiB are free here."""
    machine = FakeMachine([LARGE])
    machine.start(monkeypatch)
    monkeypatch.setattr("studio.jobs.base.device.spills_to_ram", lambda: spills)
    device = job_device("auto")
    kept = (23 * GIB + 2**21 - 2**28) / (24 * GIB)
    assert machine.fractions == ({0: pytest.approx(kept)} if spills else {})
    assert room_on_card(torch.device("cpu")) is None
    assert (room_on_card(device) is not None) == spills


def test_a_budget_is_set_on_the_card_where_accelerate_s_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine([LARGE])
    machine.start(monkeypatch)
    with pytest.raises(ValueError, match="specified index"):
        torch.cuda.set_per_process_memory_fraction(0.5, torch.device("cuda"))
    device = job_device("auto")
    limit_memory(12, device)
    assert machine.contexts == [torch.device("cuda", 0)]
    assert machine.fractions[0] == pytest.approx(0.5, abs=0.05)
    limit_memory(1000.0, device)
    assert machine.fractions[0] == 1.0
    assert torch.cuda.mem_get_info(device) == (23 * GIB, 24 * GIB)
    with pytest.raises(AssertionError, match="Invalid device id"):
        torch.cuda.get_device_properties(1)
    seen: list[Any] = []
    watch = MemoryWatch(lambda kind, **fields: seen.append((kind, fields)), device)
    monkeypatch.setattr(torch._C, "_cuda_resetPeakMemoryStats", lambda number: None, raising=False)
    watch.see("load", 0)
    assert seen[0][0] is MemorySeen


def test_a_training_with_a_budget_gets_its_card_and_its_limit(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = FakeMachine([LARGE])
    machine.start(monkeypatch)
    said: list[Any] = []
    worker: Any = SimpleNamespace(paths=RunPaths(tmp_path), emit=lambda kind, **fields: said.append(fields))
    budgeted = recipe.with_("device.device", "auto").with_("device.budget_gib", 12.0)
    for _ in range(2):
        assert train_device(worker, budgeted) == torch.device("cuda", 0)
        assert machine.fractions[0] == pytest.approx(0.5, abs=0.05)
        assert train_device(worker, recipe.with_("device.device", "cpu")) == torch.device("cpu"), "in one process"
    assert said == []


@pytest.mark.parametrize("kind", ["train", "measure", "merge", "export", "audit"])
def test_no_job_writes_what_cuda_reads(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever launches it does: in the job itself it is too late for a library that has started CUDA, and it leaks."""
    recipe = Recipe().with_("device.device", "cuda:1")
    asked: dict[str, Any] = {
        "train": recipe,
        "measure": MeasureRequest(recipe, how="trace"),
        "merge": MergeRequest("a", "b", "c"),
        "export": ExportRequest("a", "b", "q8_0"),
        "audit": AuditRequest("base"),
    }
    paths = new_run(tmp_path, kind, 1e9)
    write_job(paths, asked[kind])
    began: list[str] = []
    monkeypatch.setattr(f"studio.jobs.{kind}.job.{kind}_run", lambda *words: began.append(kind))
    module = import_module(f"studio.jobs.{kind}.__main__")
    before = {name: text for name, text in os.environ.items() if name.startswith(("CUDA", "LORA_STUDIO"))}
    module._body(SimpleNamespace(paths=paths))
    assert began == [kind]
    assert {name: text for name, text in os.environ.items() if name.startswith(("CUDA", "LORA_STUDIO"))} == before


@pytest.mark.parametrize("name", ["mps", "xpu", "npu", "hpu"])
def test_nothing_but_cuda_is_ever_taken_and_accelerate_has_no_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", name)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for module in (torch.backends.mps, torch.mps, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: True, raising=False)
    before = dict(PartialState._shared_state)
    assert job_device("auto") == torch.device("cpu")
    FakeMachine([LARGE]).start(monkeypatch)
    assert job_device("auto") == torch.device("cuda", 0)
    assert job_device("cpu") == torch.device("cpu"), "also after a card was taken"
    assert dict(PartialState._shared_state) == before, "its singleton was not made"


def test_a_training_is_the_same_whatever_accelerate_was_told(
    train: Train, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`accelerate launch` and `torchrun` leave such variables in what they start, and people in their shells."""
    plain = history_of(train(recipe))
    told = {
        "ACCELERATE_TORCH_DEVICE": "meta",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_USE_FSDP": "true",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
    }
    for name, text in told.items():
        monkeypatch.setenv(name, text)
    before = dict(PartialState._shared_state)
    seen = history_of(train(recipe))
    assert seen.failed is None, seen.failed
    assert (seen.planned and seen.planned.device, seen.planned and seen.planned.card) == ("cpu", {})
    assert list(seen.train.losses) == list(plain.train.losses)
    assert dict(PartialState._shared_state) == before


def test_the_launched_process_has_the_card_in_its_environment(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _environ(monkeypatch, "2,0")
    monkeypatch.setattr(device_module, "look", FakeMachine(TWINS).sight)
    launched: list[dict[str, str]] = []

    def popen(*words: Any, env: dict[str, str], **options: Any) -> Any:
        launched.append(env)
        raise OSError("not really")

    recipe = Recipe().with_("data.path", str(data)).with_("eval.rows", 2).with_("device.device", "cuda:1")
    with pytest.raises(Exception, match="not really"):
        start(recipe, tmp_path / "runs", popen=popen)
    assert {name: launched[0][name] for name in (MASK, ORDER, CHOSEN)} == {
        MASK: TWINS[0].uuid,
        ORDER: "PCI_BUS_ID",
        CHOSEN: TWINS[0].uuid,
    }
    assert os.environ[MASK] == "2,0", "this process keeps its own"


def _trained_on(card: FakeCard, root: Path, device: str = "auto") -> RunPaths:
    paths = new_run(root, "trained", 1e9)
    write_job(paths, Recipe().with_("device.device", device))
    known: dict[str, Any] = {"total_steps": 1, "trainable_parameters": 1, "rows": 1, "held_out_rows": 0}
    used = {"name": card.name, "uuid": card.uuid}
    write_log(paths, Planned(at=1.0, **known, device=card.name, dtype="bf16", loss_path="full", card=used))
    return paths


def test_what_belongs_to_a_run_goes_to_the_run_s_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _trained_on(TWINS[1], tmp_path, device="cuda:2")
    monkeypatch.setattr(device_module, "look", FakeMachine(TWINS).sight)
    assert recorded_card(paths) == TWINS[1].uuid
    audit = AuditRequest("run", run=str(paths.root))
    recipe, fresh = Recipe().with_("device.device", "cuda:2"), new_run(tmp_path, "fresh", 1e9)
    for job, about, wanted in [
        (recipe, paths, TWINS[1].uuid),  # taken up again
        (recipe, None, TWINS[2].uuid),
        (audit, None, TWINS[1].uuid),
        (replace(audit, device="cuda:0"), None, TWINS[0].uuid),
        (replace(audit, device="cpu"), None, ""),
        (AuditRequest("base", model="embedded"), None, TWINS[0].uuid),
        (AuditRequest("race", recipe=recipe), None, TWINS[2].uuid),
        (MeasureRequest(recipe), None, TWINS[2].uuid),
        (MeasureRequest(recipe, how="trace"), None, ""),
        (MergeRequest("a", "b", "c", run=str(paths.root)), None, ""),
        (ExportRequest("a", "b", "q8_0"), None, ""),
    ]:
        assert kind_for(job).check_resume(job, about or fresh).or_refuse().visible == wanted, job
    monkeypatch.setenv(MASK, "0")
    hidden = kind_for(audit).check_resume(audit, fresh)
    assert hidden.visible == TWINS[0].uuid
    assert "the run's card GPU-aaaa-1 is not visible here" in hidden.note


def test_a_chat_with_a_run_is_on_the_run_s_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _trained_on(TWINS[2], tmp_path)
    monkeypatch.setattr(device_module, "look", FakeMachine(TWINS).sight)
    asked = {"root": tmp_path, "base_only": True}
    assert chat_request(paths.name, **asked).environment[MASK] == TWINS[2].uuid
    assert chat_request(paths.name, device="cuda:1", **asked).environment[MASK] == TWINS[1].uuid
    assert chat_request(paths.name, device="cpu", **asked).environment[MASK] == ""
    assert chat_request("embedded", tmp_path).environment[MASK] == TWINS[0].uuid
    monkeypatch.setattr(device_module, "look", FakeMachine(TWINS, **OLD_DRIVER).sight)
    with pytest.raises(BadInput, match=r"580 or newer.*--device cpu"):
        chat_request(paths.name, **asked)


def test_a_run_that_goes_on_elsewhere_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = _trained_on(TWINS[1], tmp_path)
    assert other_card_note(new_run(tmp_path, "fresh", 1e9)) == ""
    for chosen, words in ((TWINS[1].uuid, ""), (TWINS[0].uuid, "this is on GPU-aaaa-0"), ("", "this is on the CPU")):
        monkeypatch.setenv(CHOSEN, chosen)
        note = other_card_note(paths)
        assert words in note
        assert bool(note) == bool(words)


def test_a_card_without_a_uuid_is_passed_by_its_number_on_the_bus(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = FakeMachine([replace(card, uuid="") for card in MIXED])
    place = place_of("cuda:1", machine.sight()).or_refuse()
    assert place.environment == {MASK: "1", ORDER: "PCI_BUS_ID", CHOSEN: "1"}
    _environ(monkeypatch, None, **place.environment)
    machine.start(monkeypatch)
    assert card_used(job_device("cuda:1"))["name"] == LARGE.name, "not QUICK, which CUDA would count before it"


def test_what_chats_and_audits_take_by_default_is_what_the_run_was_told(tmp_path: Path) -> None:
    paths = _trained_on(TWINS[0], tmp_path, device="cpu")
    paths.adapter.mkdir()
    keep_record(paths, HeldOutRecord("embedded", "embedded", "auto", held_out=()))
    assert audit_of_run(paths).device == "cpu"
    assert audit_of_run(paths, device="cuda").device == "cuda"
    assert chat_request(paths.name, tmp_path, base_only=True).device == "cpu"


def test_a_job_passes_its_card_on_to_what_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A race's lanes ask for the recipe's `cuda:2` once more, in a process that sees one card."""
    place = place_of("cuda:2", FakeMachine(TWINS).sight())
    _environ(monkeypatch, None, **place.environment)
    inner = place_of("cuda:2", FakeMachine(TWINS).sight())
    assert inner.environment == {}, "it is in the environment already"
    assert inner.card == place.card
    assert place_of("cpu", FakeMachine(TWINS).sight()) == CPU_PLACE
