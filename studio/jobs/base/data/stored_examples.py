"""Examples that lie on disk: token ids, and a bit for each token that says whether it has a label.

A gigabyte of chats becomes about as many bytes of ids. They are read one example at a time, so that no more of them is
in memory than a batch needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self, overload

import numpy as np
from numpy.typing import NDArray

from studio.jobs.base.data.labels import IGNORED
from studio.jobs.base.data.rows import Example
from studio.runs.spool import FileBytes, HeldBytes, Spool

TOKENS_FILE, LENGTHS_FILE = "tokens.bin", "lengths.bin"


@dataclass(frozen=True, slots=True)
class Packed:
    """Examples as they lie in a file, one after another: the ids of each as int32, then its bits.

    Attributes:
        content: Their bytes.
        lengths: Tokens of each, `[examples]`.
        largest: The largest id.
    """

    content: bytes
    lengths: NDArray[np.int32]
    largest: int

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        """Return examples packed. The labels of each are its ids, or none."""
        parts, lengths, largest = list[bytes](), list[int](), 0
        for example in examples:
            ids = np.ascontiguousarray(example.input_ids, np.int32)
            parts += (ids.tobytes(), np.packbits(example.labels != IGNORED).tobytes())
            lengths.append(len(ids))
            largest = max(largest, int(ids.max(initial=0)))
        return cls(b"".join(parts), np.array(lengths, np.int32), largest)

    def examples(self) -> "StoredExamples":
        """Return the examples, each made when it is asked for."""
        return StoredExamples(HeldBytes(self.content), self.lengths, largest=self.largest)


class StoredExamples(Sequence[Example]):
    """Examples in a file, as `Packed` has them.

    Attributes:
        lengths: Tokens of each example, `[examples]`.
        recalled: Whether an earlier run has made them.
    """

    def __init__(
        self, source: FileBytes | HeldBytes, lengths: NDArray[np.int32], *, largest: int, recalled: bool = False
    ) -> None:
        """Take the bytes of all examples; `largest` is the largest id in them."""
        self._source, self.lengths, self.largest, self.recalled = source, lengths, largest, recalled
        sizes = 4 * lengths.astype(np.int64) + (lengths + 7) // 8
        self._starts = np.concatenate(([0], np.cumsum(sizes)))

    @classmethod
    def opened(cls, folder: Path, *, largest: int, recalled: bool) -> Self:
        """Return the examples that an `ExampleWriter` has written into a folder.

        Raises:
            OSError: The files cannot be read.
        """
        lengths = np.frombuffer((folder / LENGTHS_FILE).read_bytes(), np.int32)
        return cls(FileBytes(folder / TOKENS_FILE), lengths, largest=largest, recalled=recalled)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[one] for one in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        count = int(self.lengths[place])
        data = bytearray(self._source.read(int(self._starts[place]), int(self._starts[place + 1])))
        ids = np.frombuffer(data, np.int32, count).copy()  # a view would keep all that was read
        labelled = np.unpackbits(np.frombuffer(data, np.uint8, offset=4 * count), count=count).view(np.bool_)
        return Example(ids, np.where(labelled, ids, np.int32(IGNORED)))


class ExampleWriter:
    """Writes examples to disk as they are made; in memory, if the disk takes no more."""

    def __init__(self, scratch: Callable[[], Path]) -> None:
        """Begin with no examples; `scratch` makes the folder for them and may raise OSError."""
        self._spool = Spool(scratch, TOKENS_FILE)
        self._lengths: list[NDArray[np.int32]] = []
        self.largest = 0

    def add(self, some: Packed) -> None:
        """Take more examples."""
        self._spool.add(some.content)
        self._lengths.append(some.lengths)
        self.largest = max(self.largest, some.largest)

    def done(self, publish: Callable[[Path], Path]) -> StoredExamples:
        """Return the examples; `publish` is that of `Spool.done`."""
        lengths = np.concatenate([np.zeros(0, np.int32), *self._lengths])
        source, _ = self._spool.done({LENGTHS_FILE: lengths.tobytes()}, publish)
        return StoredExamples(source, lengths, largest=self.largest)

    def drop(self) -> None:
        """Remove what was written and not published."""
        self._spool.drop()
