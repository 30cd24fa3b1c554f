"""Faults of NVML, by the numbers that its C functions return: what is known of a card then, and that nothing raises."""

import pytest

from studio.core.gpu_catalogue import GIB
from studio.probe.cards import CardState, card_state, read_cards
from tests.fakes.nvml_library import LOST, NOT_FOUND, NOT_LOADED, NOT_SUPPORTED, RESET, UNKNOWN, Library, LibraryCard


def library(monkeypatch: pytest.MonkeyPatch, *cards: LibraryCard, **changes: object) -> Library:
    return Library(list(cards), **changes).installed(monkeypatch)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "gone"),
    [
        (LOST, "it has fallen off the bus"),
        (RESET, "it must be reset"),
        (NOT_LOADED, "the driver is not loaded any more"),
        (NOT_FOUND, "the driver does not know it any more"),
        (UNKNOWN, ""),
        (NOT_SUPPORTED, ""),
    ],
)
def test_a_card_that_refuses_everything(monkeypatch: pytest.MonkeyPatch, number: int, gone: str) -> None:
    library(monkeypatch, LibraryCard("GPU-a", answers={"every": number}), LibraryCard("GPU-b"))
    assert card_state("GPU-a") == CardState(gone=gone)
    assert card_state("GPU-b").free_bytes == 20 * GIB
    cards, _ = read_cards()
    assert cards is not None
    assert [(card.uuid, card.free_bytes) for card in cards] == [(None, None), ("GPU-b", 20 * GIB)]


@pytest.mark.parametrize("number", [LOST, UNKNOWN])
def test_a_card_whose_handle_is_refused(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    library(monkeypatch, LibraryCard("GPU-a", answers={"nvmlDeviceGetHandle": number}))
    assert bool(card_state("GPU-a").gone) == (number == LOST)
    cards, _ = read_cards()
    assert cards is not None
    assert cards[0].uuid is None


def test_readings_that_are_not_supported_are_not_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetTemperature")
    clocks = ("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons")
    library(monkeypatch, LibraryCard("GPU-a", answers=dict.fromkeys((*refused, *clocks), NOT_SUPPORTED)))
    assert card_state("GPU-a") == CardState()
    cards, _ = read_cards()
    assert cards is not None
    assert (cards[0].uuid, cards[0].total_bytes, cards[0].celsius) == ("GPU-a", None, None)


@pytest.mark.parametrize("number", [NOT_LOADED, UNKNOWN])
def test_without_a_working_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    library(monkeypatch, LibraryCard("GPU-a"), init=number)
    assert read_cards()[0] is None
    assert card_state("GPU-a").gone == ("the driver is not loaded any more" if number == NOT_LOADED else "")


def test_without_the_library_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> object:
        raise OSError("libnvidia-ml.so.1: cannot open shared object file")

    assert card_state("GPU-a", load) == CardState()


def test_a_process_that_has_vanished_has_no_name(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, LibraryCard("GPU-a", processes=[(70, 2 * GIB), (71, GIB)]), gone=frozenset({70}))
    cards, _ = read_cards()
    assert cards is not None
    assert [(one.pid, one.name) for one in cards[0].processes or ()] == [(70, None), (71, "python3")]


def test_mixed_cards_are_found_by_their_uuid(monkeypatch: pytest.MonkeyPatch) -> None:
    old = LibraryCard("GPU-old", "Tesla K80", 3.0, 81, 0x40)
    library(monkeypatch, LibraryCard("GPU-new", free_gib=1.0), old, LibraryCard("GPU-b", answers={"every": LOST}))
    assert (card_state("GPU-old").free_bytes, card_state("GPU-new").free_bytes) == (3 * GIB, GIB)
    assert card_state("GPU-old").reasons == ("it is too hot: the hardware slows it down",)
    assert card_state("GPU-old").celsius == 81


def test_what_lowers_the_clocks_is_told_by_older_drivers_too(monkeypatch: pytest.MonkeyPatch) -> None:
    older = frozenset({"nvmlDeviceGetCurrentClocksEventReasons"})
    library(monkeypatch, LibraryCard("GPU-a", reasons=0x04 | 0x20 | 0x01), lacks=older)
    told = ("it is too hot: the driver lowers its clocks", "it draws as much power as its limit allows")
    assert card_state("GPU-a").reasons == told  # that it idles, bit 1, is nothing to be told
