"""What is changed so that a recipe fits, in which order, and what is left alone."""

from dataclasses import replace

import pytest

from studio.core.fit import fit
from studio.core.gpu_catalogue import CATALOGUE, GIB, card_of_size, find_gpu
from studio.core.recipe import Recipe, number_of
from studio.core.vram.estimate import estimate_vram
from studio.core.vram.report import VramEstimate
from studio.core.vram.setup import Setup, setup_of
from tests.core.published_rows import shapes

LLAMA = shapes()["Llama-3.1-8B"]


def recipe(**changes: object) -> Recipe:
    result = Recipe().with_("method", "lora").with_("train.micro_batch", 4).with_("train.seq_len", 4096)
    result = result.with_("train.recompute", "none").with_("train.loss", "full")
    for path, value in changes.items():
        result = result.with_(path.replace("__", "."), value)
    return result


def test_what_fits_is_left_alone():
    gpu = find_gpu("H200")
    found = fit(recipe(train__micro_batch=1, train__seq_len=512), LLAMA, gpu, gpu.total_bytes)
    assert found.fix.fits
    assert found.fix.changes == ()


@pytest.mark.parametrize("card", ["4090", "4070", "4060", "T4", "A100 40GB"])
def test_the_result_fits_at_the_high_end_and_every_change_is_needed(card: str):
    gpu = find_gpu(card)
    wanted = recipe()
    found = fit(wanted, LLAMA, gpu, gpu.total_bytes)
    assert found.fix.fits
    assert found.fix.estimate.device.high <= gpu.total_bytes
    assert found.fix.recipe.rows_per_step == wanted.rows_per_step, "the effective batch is kept by accumulation"
    assert not found.fix.recipe.problems()
    for change in found.fix.changes:
        assert change.saves_bytes > 0
        without = found.fix.recipe
        for path, _ in change.change.settings:
            without = without.with_(path, wanted.get(path))
        assert estimate_vram(LLAMA, setup_of(without, gpu), gpu).device.high > gpu.total_bytes


def test_time_is_spent_before_quality_and_quality_before_data():
    gpu = find_gpu("4090")
    roomy = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    assert roomy.fix.recipe.method == "lora", "24 GiB hold 16-bit LoRA"
    small = find_gpu("4070")
    found = fit(recipe(), LLAMA, small, small.total_bytes)
    assert found.fix.recipe.method == "qlora"
    assert (found.fix.recipe.train.seq_len, found.fix.recipe.adapter.rank) == (4096, 16), (
        "12 GiB cost neither rows nor rank"
    )


def test_the_micro_batch_stays_as_large_as_the_other_changes_allow():
    gpu = find_gpu("4090")
    found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    assert found.fix.recipe.train.micro_batch == 2
    assert found.largest["train.micro_batch"] == 3, "a fix keeps the rows of a step, which 3 does not divide"


def test_the_largest_values_fit_and_one_more_does_not():
    gpu = find_gpu("4090")
    found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    for path, value in found.largest.items():
        assert value is not None
        for candidate, fits in ((value, True), (value + 1, False)):
            changed = found.fix.recipe.with_(path, candidate)
            assert (estimate_vram(LLAMA, setup_of(changed), gpu).device.high <= gpu.total_bytes) is fits


def test_where_nothing_fits_there_is_a_card_that_would():
    gpu = find_gpu("GTX 1660 Ti")
    found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    assert not found.fix.fits
    assert set(found.largest.values()) == {None}
    assert found.cards
    sizes = [card.total_bytes for card in found.cards]
    assert sizes == sorted(set(sizes))
    assert min(sizes) > gpu.total_bytes
    needed = estimate_vram(LLAMA, setup_of(found.fix.recipe, found.cards[0]), found.cards[0]).device.high
    assert needed <= found.cards[0].total_bytes
    assert found.most_parameters is not None
    assert found.most_parameters < LLAMA.parameters


def test_a_model_of_the_size_that_would_fit_does_fit():
    gpu = find_gpu("GTX 1660 Ti")
    most = fit(recipe(), LLAMA, gpu, gpu.total_bytes).most_parameters
    assert most is not None
    small = shapes()["Llama-3.2-1B"]
    assert small.parameters < most
    assert fit(recipe(), small, gpu, gpu.total_bytes).fix.fits


def test_every_change_is_priced_in_bytes_and_time():
    gpu = find_gpu("4070")
    found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    prices = {priced.change.settings[0][0]: priced for priced in found.fix.changes}
    assert prices["train.loss"].time[1] < 1.2
    low, high = prices["train.recompute"].time
    assert 1.1 < low < high < 1.5, "one more forward of three"
    low, high = prices["method"].time
    assert 1.0 <= low < high < 2.5
    total = sum(priced.saves_bytes for priced in found.fix.changes)
    before = estimate_vram(LLAMA, setup_of(recipe()), gpu).device.expected
    assert before - total == found.fix.estimate.device.expected


def test_where_the_speed_of_a_card_is_unknown_a_change_has_its_usual_price():
    gpu = card_of_size(12)
    found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    assert all(priced.time == priced.change.time for priced in found.fix.changes)


def test_what_is_known_better_decides():
    """An estimate that was corrected by runs of this machine replaces the one from the shape alone."""
    gpu = find_gpu("4090")

    def wary(setup: Setup) -> VramEstimate:
        estimate = estimate_vram(LLAMA, setup, gpu)
        device = replace(estimate.device, high=estimate.device.high + 4 * GIB)
        return replace(estimate, device=device)

    usual = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
    careful = fit(recipe(), LLAMA, gpu, gpu.total_bytes, wary)
    assert careful.fix.recipe.train.micro_batch < usual.fix.recipe.train.micro_batch
    assert careful.fix.estimate.device.high <= gpu.total_bytes


def test_rows_are_kept_while_anything_gentler_helps():
    gpu = find_gpu("RTX 4060")
    found = fit(recipe(train__seq_len=8192), LLAMA, gpu, gpu.total_bytes)
    order = [priced.change.settings[0][0] for priced in found.fix.changes]
    assert "method" in order
    if "train.seq_len" in order:
        assert order.index("method") < order.index("train.seq_len")
        longer = [stop for stop in number_of("train.seq_len").stops if found.fix.recipe.train.seq_len < stop <= 8192]
        for stop in longer:
            candidate = found.fix.recipe.with_("train.seq_len", int(stop))
            assert estimate_vram(LLAMA, setup_of(candidate), gpu).device.high > gpu.total_bytes


def test_no_card_at_all():
    found = fit(recipe(), shapes()["Mixtral-8x7B"], find_gpu("T4"), 1 * GIB)
    assert not found.fix.fits
    assert found.cards
    assert all(card.total_bytes > 24 * GIB for card in found.cards), "its experts are in 4 bits"


def test_fused_projections_are_named_as_they_are():
    gpu = find_gpu("GTX 1660 Ti")
    found = fit(recipe(), shapes()["falcon-7b"], gpu, 4 * GIB)
    assert found.fix.recipe.adapter.targets == ("query_key_value",)


def test_every_card_gets_an_answer():
    for gpu in CATALOGUE.values():
        found = fit(recipe(), LLAMA, gpu, gpu.total_bytes)
        assert found.fix.fits == (found.fix.estimate.device.high <= gpu.total_bytes)


def test_checkpoints_in_main_memory_are_offered_with_their_price():
    gpu = find_gpu("4090")
    wanted = recipe(method="qlora", train__micro_batch=1, train__recompute="all", train__loss="chunked")
    now = estimate_vram(LLAMA, setup_of(wanted), gpu)
    offloaded = estimate_vram(LLAMA, setup_of(wanted.with_("train.offload_checkpoints", True)), gpu)
    found = fit(wanted, LLAMA, gpu, (now.device.high + offloaded.device.high) // 2)
    offers = [item for item in found.fix.changes if item.change.settings[0][0] == "train.offload_checkpoints"]
    assert found.fix.fits
    assert len(offers) == 1
    assert offers[0].saves_bytes >= 2**28, "32 layers keep 32 MiB each, the card two of them"
    low, high = offers[0].time
    assert low == 1.0, "copies may hide behind the computation"
    assert 1.0 < high < 1.5
