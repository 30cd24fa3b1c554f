"""PyTorch's caching allocator of a CUDA device, as bookkeeping: which segments it takes from the driver.

Follows c10/cuda/CUDACachingAllocator.cpp: requests are rounded up to 512 bytes; those of up to 1 MiB live in segments
of 2 MiB, larger ones in segments of 20 MiB or, from 10 MiB on, in one of their own, rounded up to 2 MiB; the smallest
free block that is large enough is taken and split where enough remains; free neighbours within a segment are joined;
segments stay until the cache is emptied. One stream, and no limits to splitting (torch's defaults).

With expandable segments, as our own jobs ask for them, each pool has one segment. It grows by pages of 2 and of 20 MiB
where its last block is free or ends, and whatever a request leaves of a block is split off.
"""

from bisect import bisect_left, insort

MIB = 2**20
_ROUND = 512
_SMALL, _SMALL_SEGMENT = MIB, 2 * MIB
_LARGE_SEGMENT, _OWN_SEGMENT, _SEGMENT_ROUND = 20 * MIB, 10 * MIB, 2 * MIB
"""kMinBlockSize, kSmallSize, kSmallBuffer, kLargeBuffer, kMinLargeAlloc and kRoundLarge."""


class Block:
    """A piece of a segment.

    Attributes:
        size: Bytes.
        address: Where it lies; decides between free blocks of one size.
        pool: 0 for requests of up to 1 MiB, 1 for larger ones.
        free: Whether it is not in use.
        before: The block in front of it in its segment.
        after: The one behind it.
    """

    __slots__ = ("address", "after", "before", "free", "pool", "size")

    def __init__(
        self, size: int, address: int, pool: int, before: "Block | None" = None, after: "Block | None" = None
    ) -> None:
        self.size = size
        self.address = address
        self.pool = pool
        self.free = False
        self.before = before
        self.after = after


class CachingAllocator:
    """The allocator's state and high-water marks, in bytes.

    Attributes:
        allocated: Bytes of the blocks in use, with what could not be split off them (torch's memory_allocated).
        reserved: Bytes of the segments (torch's memory_reserved).
        most_allocated: Highest `allocated` so far.
        most_reserved: Highest `reserved` so far.
    """

    def __init__(self, capacity: int | None = None, *, expandable: bool = False) -> None:
        """Begin without segments.

        Args:
            expandable: Whether segments grow (PYTORCH_ALLOC_CONF=expandable_segments:True).
            capacity: Bytes that the driver can give. When they are used up, cached segments are given back first; what
                still does not fit is counted nevertheless.
        """
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0
        self._capacity = capacity
        self._expandable = expandable
        self._last: list[Block | None] = [None, None]
        """The last block of each pool's segment, where it grows."""
        self._free: tuple[list[tuple[int, int, Block]], ...] = ([], [])
        # The driver places large segments from the top of its address range downwards and fills small ones upwards:
        # with that order the reserved bytes of nine measured runs come out to 0.1 %; with another, two are 4 and 9 %
        # off.
        self._low, self._high = 0, 0

    def allocate(self, size: int) -> Block:
        """Return a block of at least `size` bytes, which must be at least 1."""
        size += -size % _ROUND
        pool = 1 if size > _SMALL else 0
        free = self._free[pool]
        index = bisect_left(free, (size,))
        if index == len(free):
            index = self._add_segment(size, pool)
        block = free[index][2]
        remaining = block.size - size
        if remaining > _SMALL if pool and not self._expandable else remaining:
            rest = Block(remaining, block.address + size, pool, block, block.after)
            if rest.after:
                rest.after.before = rest
            elif self._expandable:
                self._last[pool] = rest
            block.size, block.after = size, rest
            rest.free = True
            entry = (remaining, rest.address, rest)
            # Five times in six the rest keeps the block's place in the list of free blocks, and so do most blocks that
            # grow (`release`): then nothing in the list moves.
            if not index or free[index - 1] < entry:
                free[index] = entry
            else:
                del free[index]
                insort(free, entry, 0, index)
        else:
            del free[index]
        block.free = False
        self.allocated += block.size
        if self.allocated > self.most_allocated:  # noqa: PLR1730  max takes three times as long, and a plan comes here 50 000 times
            self.most_allocated = self.allocated
        return block

    def release(self, block: Block) -> None:
        """Take a block back and join it with free neighbours."""
        self.allocated -= block.size
        free, before, after = self._free[block.pool], block.before, block.after
        index = -1
        if after and after.free:
            index = bisect_left(free, (after.size, after.address))
            block.size += after.size
            block.after = after = after.after
            if after:
                after.before = block
        if before and before.free:
            if index >= 0:
                del free[index]
            index = bisect_left(free, (before.size, before.address))
            before.size += block.size
            before.after = after
            if after:
                after.before = before
            block = before
        block.free = True
        if self._expandable and block.after is None:
            self._last[block.pool] = block
        entry = (block.size, block.address, block)
        if index < 0:
            insort(free, entry)
        elif index + 1 == len(free) or entry < free[index + 1]:
            free[index] = entry
        else:
            del free[index]
            insort(free, entry, index)

    def empty_cache(self) -> None:
        """Give back the segments that are wholly free, of one that grows its free end (torch.cuda.empty_cache)."""
        for place in (0, 1) if self._expandable else ():
            self._shrink(place)
        for pool in () if self._expandable else self._free:
            before = sum(item[0] for item in pool)
            pool[:] = [item for item in pool if item[2].before or item[2].after]
            self.reserved -= before - sum(item[0] for item in pool)

    def _add_segment(self, size: int, pool: int) -> int:
        """Take a segment from the driver; return where it is among the free blocks: last, for no other was enough."""
        if self._expandable:
            return self._grow(size, pool)
        whole = _SMALL_SEGMENT
        if pool:
            whole = _LARGE_SEGMENT if size < _OWN_SEGMENT else -(-size // _SEGMENT_ROUND) * _SEGMENT_ROUND
        if self._capacity is not None and self.reserved + whole > self._capacity:
            self.empty_cache()
        self.reserved += whole
        self.most_reserved = max(self.most_reserved, self.reserved)
        if whole <= _LARGE_SEGMENT:
            address, self._low = self._low, self._low + whole
        else:
            address = self._high = self._high - whole
        self._free[pool].append((whole, address, Block(whole, address, pool)))
        return len(self._free[pool]) - 1

    def _grow(self, size: int, pool: int) -> int:
        """Map pages behind a pool's last block; return where that is among the free ones: last, as above."""
        page, last, free = _LARGE_SEGMENT if pool else _SMALL_SEGMENT, self._last[pool], self._free[pool]
        whole = -(-(size - (last.size if last and last.free else 0)) // page) * page
        if self._capacity is not None and self.reserved + whole > self._capacity:
            self.empty_cache()
            last = self._last[pool]
            whole = -(-(size - (last.size if last and last.free else 0)) // page) * page
        self.reserved += whole
        self.most_reserved = max(self.most_reserved, self.reserved)
        if last and last.free:
            del free[bisect_left(free, (last.size, last.address))]
            last.size += whole
        else:
            last = self._last[pool] = Block(whole, last.address + last.size if last else 0, pool, last)
            last.free = True
            if last.before:
                last.before.after = last
        free.append((last.size, last.address, last))
        return len(free) - 1

    def _shrink(self, pool: int) -> None:
        page, last, free = _LARGE_SEGMENT if pool else _SMALL_SEGMENT, self._last[pool], self._free[pool]
        pages = last.size // page * page if last and last.free else 0
        if last is None or not pages:
            return
        self.reserved -= pages
        del free[bisect_left(free, (last.size, last.address))]
        last.size -= pages
        if last.size:
            insort(free, (last.size, last.address, last))
            return
        self._last[pool] = last.before
        if last.before:
            last.before.after = None
