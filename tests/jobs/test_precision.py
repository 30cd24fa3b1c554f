"""One place decides a card's 16-bit format: the plan, the set-up and every job mean the same one."""

import types

import pytest
import torch

from studio.core.errors import JobFailed
from studio.core.gpu_catalogue import CATALOGUE, card_of_size, find_gpu, sixteen_bit
from studio.core.recipe import Recipe
from studio.core.shape_from_config import shape_from_config
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.setup import setup_of
from studio.jobs.audit import answer_models
from studio.jobs.base.precision import choose_precision, half_dtype, steadier_format, without_own_format
from studio.jobs.chat import session
from studio.jobs.train.guards import check_gradient, check_loss
from studio.runs.chat import ChatRequest
from tests.fakes.tiny_model import tiny_config

T4, A10 = torch.device("cuda", 1), torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """An A10, the current device, and a T4; strictly by number, and emulation is always there, as torch has it."""
    capabilities = {0: (8, 6), 1: (7, 5)}

    def of(device: torch.device) -> tuple[int, int]:
        assert device.index is not None, "a device without a number is whichever is current"
        return capabilities[device.index]

    monkeypatch.setattr(torch.cuda, "get_device_capability", of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: ["NVIDIA A10", "Tesla T4"][device.index])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


@pytest.mark.parametrize(("device", "name", "card"), [(T4, "fp16", "Tesla T4"), (A10, "bf16", "A10")])
def test_training_serving_and_planning_take_the_same_format(device: torch.device, name: str, card: str) -> None:
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[name]
    assert choose_precision("auto", device).name == name == setup_of(Recipe(), find_gpu(card)).dtype
    assert choose_precision("auto", device).dtype == dtype == half_dtype(device)
    assert session._dtype(ChatRequest(base="m"), device) == dtype
    assert answer_models._dtype(device, 10**9) == dtype


def test_every_card_of_the_catalogue_has_its_format() -> None:
    for gpu in CATALOGUE.values():
        assert setup_of(Recipe(), gpu).dtype == sixteen_bit(gpu.compute_capability)
        assert gpu.bf16 == (gpu.compute_capability[0] >= 8) == (sixteen_bit(gpu.compute_capability) == "bf16")
    assert setup_of(Recipe()).dtype == setup_of(Recipe(), card_of_size(16)).dtype == "bf16"
    assert setup_of(Recipe().with_("model.dtype", "fp32"), find_gpu("t4")).dtype == "fp32"


@pytest.mark.parametrize("word", ["bf16", "fp16", "fp32"])
def test_what_is_asked_for_is_taken(word: str) -> None:
    for device in (T4, A10, CPU):
        assert choose_precision(word, device).name == word  # type: ignore[arg-type]


def test_a_format_that_a_card_only_emulates_is_said() -> None:
    said = without_own_format(choose_precision("bf16", T4), T4)
    assert "Tesla T4 (compute capability 7.5) has no bf16" in said
    for word, device in (("bf16", A10), ("bf16", CPU), ("fp16", T4), ("auto", T4), ("fp32", T4)):
        assert not without_own_format(choose_precision(word, device), device)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("device", "word", "wanted", "never"),
    [(T4, "auto", "fp32", "to bf16"), (A10, "fp16", "to bf16", "fp32, at"), (A10, "auto", "learning rate", "dtype")],
)
def test_a_card_without_bf16_is_not_advised_to_use_it(device: torch.device, word: str, wanted: str, never: str) -> None:
    steadier = steadier_format(choose_precision(word, device), device)  # type: ignore[arg-type]
    told: list[str] = []
    for guard in (
        lambda: check_loss(float("nan"), 3, steadier),
        lambda: check_gradient(float("inf"), 3, 10, scaled=True, steadier=steadier),
    ):
        with pytest.raises(JobFailed) as failed:
            guard()
        told.append(failed.value.advice)
    for advice in told:
        assert wanted in advice
        assert never not in advice


def test_a_plan_says_what_the_run_will_say() -> None:
    shape = shape_from_config(tiny_config().to_dict())
    for card, word, told in (("t4", "bf16", True), ("t4", "auto", False), ("a10", "bf16", False)):
        recipe = Recipe().with_("model.dtype", word)
        notes = estimate_vram(shape, setup_of(recipe, find_gpu(card)), find_gpu(card)).notes
        assert any("no bf16 of its own" in note for note in notes) == told


def test_a_run_says_it_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from studio.jobs.train import job

    warned: list[str] = []
    worker = types.SimpleNamespace(emit=lambda kind, topic, message: warned.append(topic))
    for word in ("auto", "bf16"):
        job._precision(worker, Recipe().with_("model.dtype", word), T4)  # type: ignore[arg-type]
    assert warned == ["dtype"]
