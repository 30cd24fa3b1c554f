"""The allocator's bookkeeping, case by case as c10/cuda/CUDACachingAllocator.cpp decides."""

import random

import pytest

from studio.core.stock.allocator import MIB, Block, CachingAllocator


@pytest.mark.parametrize(
    ("size", "block", "segment"),
    [
        (1, 512, 2 * MIB),
        (MIB, MIB, 2 * MIB),
        (MIB + 1, MIB + 512, 20 * MIB),
        (10 * MIB - 512, 10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB, 10 * MIB),
        (11 * MIB, 12 * MIB, 12 * MIB),  # what remains is not split off: 1 MiB at most
    ],
)
def test_a_first_request(size: int, block: int, segment: int):
    allocator = CachingAllocator()
    assert allocator.allocate(size).size == block
    assert (allocator.allocated, allocator.reserved) == (block, segment)


def test_the_smallest_block_that_is_large_enough_is_split():
    allocator = CachingAllocator()
    large, small = allocator.allocate(64 * MIB), allocator.allocate(32 * MIB)
    allocator.release(large)
    allocator.release(small)
    assert allocator.allocate(30 * MIB) is small
    assert allocator.allocate(40 * MIB) is large
    allocator.allocate(24 * MIB)  # the rest of the large one
    assert allocator.reserved == 96 * MIB
    allocator.allocate(3 * MIB)  # 2 MiB are left: a new segment
    assert allocator.reserved == 116 * MIB


def test_free_neighbours_join_again():
    allocator = CachingAllocator()
    allocator.release(allocator.allocate(90 * MIB))
    parts = [allocator.allocate(30 * MIB) for _ in range(3)]
    for part in (parts[0], parts[2], parts[1]):
        allocator.release(part)
    allocator.allocate(90 * MIB)
    assert allocator.most_reserved == 90 * MIB


def test_a_block_in_a_segment_keeps_the_segment():
    allocator = CachingAllocator()
    lone, shared, _kept = allocator.allocate(50 * MIB), allocator.allocate(4 * MIB), allocator.allocate(4 * MIB)
    allocator.release(lone)
    allocator.release(shared)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    assert allocator.most_reserved == 70 * MIB


def test_what_is_cached_makes_room_before_the_card_is_full():
    allocator = CachingAllocator(capacity=100 * MIB)
    allocator.release(allocator.allocate(60 * MIB))
    allocator.allocate(80 * MIB)
    assert allocator.most_reserved == 80 * MIB
    allocator.allocate(40 * MIB)
    assert allocator.most_reserved == 120 * MIB  # there is nothing to give back: it does not fit, and says so


def test_a_segment_that_grows_joins_what_segments_would_keep_apart():
    reserved = []
    for expandable in (False, True):
        allocator = CachingAllocator(expandable=expandable)
        parts = [allocator.allocate(30 * MIB) for _ in range(3)]
        for part in parts:
            allocator.release(part)
        allocator.allocate(85 * MIB)
        allocator.allocate(3 * MIB)
        reserved.append(allocator.reserved // MIB)
        assert allocator.most_reserved == allocator.reserved
    assert reserved == [30 * 3 + 86, 100], "pages of 20 MiB hold 90, and the last one has room for the 3"
    allocator.allocate(700)
    assert allocator.reserved == 102 * MIB


def test_a_growing_segment_gives_its_free_end_back():
    allocator = CachingAllocator(capacity=100 * MIB, expandable=True)
    held, end = allocator.allocate(10 * MIB), allocator.allocate(70 * MIB)
    allocator.release(end)
    allocator.empty_cache()
    assert allocator.reserved == 20 * MIB
    allocator.release(held)
    allocator.empty_cache()
    assert allocator.reserved == 0
    allocator.allocate(45 * MIB)
    assert allocator.reserved == 60 * MIB


@pytest.mark.parametrize("expandable", [False, True])
def test_bytes_are_kept_account_of_whatever_comes(expandable: bool):
    chance, allocator = random.Random(3), CachingAllocator(expandable=expandable)  # noqa: S311
    held: list[Block] = []
    for _ in range(4000):
        if held and chance.random() < 0.5:
            allocator.release(held.pop(chance.randrange(len(held))))
        else:
            held.append(allocator.allocate(int(2 ** chance.uniform(0, 26))))
        assert allocator.allocated == sum(block.size for block in held)
        assert allocator.allocated <= allocator.reserved
    for block in held:
        allocator.release(block)
    allocator.empty_cache()
    assert allocator.allocated == allocator.reserved == 0
